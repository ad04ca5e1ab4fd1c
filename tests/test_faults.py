"""A sample of the faults of tests/faults; `python -m tests.faults` runs all of them, and --mutants tests the checks."""

import pytest

from tests import fork_server
from tests.faults import trace

KINDS = {
    "a change of a file": 4,
    "the middle of a write": 4,
    "order on the disk": 1,
    "at a random moment: zero2": 3,
    "cut, flipped, deleted": 8,
    "malicious file": 5,
    "the watch over pickle": 2,
    "link in a received run folder": 4,
    "stray files of systems": 1,
    "each step of 50": 3,
    "runs started at once": 6,
    "SIGTERM, SIGINT or SIGUSR1": 4,
    "(1, 2, 4)": 42,
    "fp16 overflows": 3,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The command, run on a sample of all faults."""
    reason = trace.can_trace()
    if reason:
        pytest.skip(reason)
    command = ["-m", "tests.faults", "--sample", "--work_dir", tmp_path_factory.mktemp("faults")]
    return fork_server.run(command, timeout=600)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_the_sample_passes(table, kind):
    (row,) = [line for line in table.stdout.splitlines() if kind in line]
    assert row.split("|")[2].strip() == f"{KINDS[kind]}/{KINDS[kind]}", table.stderr[-4000:]


def test_the_command_reports_it(table):
    assert table.returncode == 0, table.stderr[-4000:]
