"""A sample of the faults of tests/faults; `python -m tests.faults` runs all of them, and --mutants tests the checks."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults import trace

KINDS = {
    "a change of a file": 5,
    "the middle of a write": 5,
    "order on the disk": 1,
    "at a random moment: zero2": 4,
    "cut, flipped, deleted": 8,
    "malicious file": 6,
    "the watch over pickle": 2,
    "link in a received run folder": 4,
    "stray files of systems": 1,
    "each step of 50": 5,
    "runs started at once": 10,
    "SIGTERM, SIGINT or SIGUSR1": 4,
    "(1, 2, 4)": 42,
    "fp16 overflows": 2,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The command, run on a sample of all faults."""
    reason = trace.can_trace()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.faults", "--sample", "--work_dir", str(tmp_path_factory.mktemp("faults"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_of_the_sample_passes(table, kind):
    (row,) = [line for line in table.stdout.splitlines() if kind in line]
    assert row.split("|")[2].strip() == f"{KINDS[kind]}/{KINDS[kind]}", table.stderr[-4000:]


def test_the_command_reports_it(table):
    assert table.returncode == 0, table.stderr[-4000:]
