"""Which process of a job this is, by the environment, and what happens to ranks whose launcher is killed."""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from colossal_llama2 import launcher, logs
from colossal_llama2.engine.ranks import meeting
from colossal_llama2.engine.ranks.liveness import Watch
from colossal_llama2.errors import LaunchError
from colossal_llama2.launcher import Place
from tests.conftest import ROOT
from tests.launching import free_port

BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
ADDRESS = {"MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}


@pytest.fixture
def settle(monkeypatch):
    """Settle in an environment with these variables and none of other launchers."""
    names = (*launcher.NAMES, *(name for names in launcher.OTHERS.values() for name in names))

    def settle_in(**variables) -> Place:
        monkeypatch.setattr(launcher, "_settled", None)
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(variables)
        return launcher.settle()

    # Settling also sets variables, which monkeypatch would not restore.
    with mock.patch.dict(os.environ):
        yield settle_in


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"WORLD_SIZE": "8"},
        {"RANK": "x", "LOCAL_RANK": ""},
        {**BY_HAND, "RANK": ""},
        {**BY_HAND, "MASTER_PORT": " "},
        {"RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "old", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    ],
)
def test_leftover_variables_are_ignored_and_logged(settle, variables):
    here = settle(**variables)
    assert (here.rank, here.local_rank, here.world_size, here.launcher, here.problem) == (0, 0, 1, None, None)
    assert all(f"{name}={value}" in here.note for name, value in variables.items() if value.strip())
    # Libraries read them as well.
    assert not [name for name in launcher.NAMES if name in os.environ]


def test_a_clean_environment_logs_nothing(settle):
    assert settle() == launcher.ALONE


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (BY_HAND, (1, 1, 2, "by hand")),
        ({**BY_HAND, "MASTER_ADDR": "node-0"}, (1, 0, 2, "by hand")),
        ({**BY_HAND, "MASTER_ADDR": "node-0", "SLURM_LOCALID": "1"}, (1, 1, 2, "by hand")),
        ({**BY_HAND, "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, (1, 0, 2, "torchrun")),
        ({**SRUN, **ADDRESS}, (3, 1, 4, "srun")),
        ({**SRUN, **ADDRESS, "WORLD_SIZE": "4"}, (3, 1, 4, "srun")),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0", **ADDRESS},
            (2, 0, 3, "mpirun"),
        ),
    ],
)
def test_launchers_are_known_by_what_they_set(settle, variables, expected):
    here = settle(**variables)
    assert (here.rank, here.local_rank, here.world_size, here.launcher) == expected
    assert here.problem is None and here.parent == os.getppid()
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == [str(n) for n in expected[:3]]


@pytest.mark.parametrize("name", [None, *ADDRESS])
def test_srun_without_an_address_is_refused(settle, name):
    here = settle(**SRUN, **({name: ADDRESS[name]} if name else {}))
    missing = " and ".join(other for other in ADDRESS if other != name)
    assert f"srun started 4 processes without {missing}, so they cannot connect" in here.problem
    assert "export MASTER_ADDR" in here.problem and "unset SLURM_STEP_NUM_TASKS" in here.problem
    # The script of sbatch itself, and an interactive shell.
    assert settle(SLURM_PROCID="0", SLURM_LOCALID="0") == settle(**{**SRUN, "SLURM_STEP_NUM_TASKS": "1"})


def test_srun_overrides_leftover_variables(settle):
    here = settle(**SRUN, **ADDRESS, RANK="0", LOCAL_WORLD_SIZE="9", TORCHELASTIC_RUN_ID="old")
    assert (here.rank, here.local_rank, here.world_size, here.launcher) == (3, 1, 4, "srun")
    assert here.note.endswith("rank 3 of 4; ignoring RANK=0, LOCAL_WORLD_SIZE=9, TORCHELASTIC_RUN_ID=old")
    assert not {"LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & set(os.environ)


def test_ranks_started_by_hand_in_the_shell_of_a_batch_job_are_not_sruns(settle):
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ranks = [settle(**{**BY_HAND, **batch, "RANK": rank}) for rank in "01"]
    assert [(here.launcher, here.local_rank) for here in ranks] == [("by hand", 0), ("by hand", 1)]


def test_spaces_around_an_address_are_removed_for_pytorch_too(settle):
    settle(**{**BY_HAND, "MASTER_ADDR": " localhost "})
    assert os.environ["MASTER_ADDR"] == "localhost"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "x"}, "RANK=x in the environment, a whole number from 0 to 1 allowed"),
        ({"RANK": "2"}, "RANK=2 in the environment, a whole number from 0 to 1 allowed since WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment, a whole number of at least 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment, a whole number from 1 to 65535"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x"),
    ],
)
def test_impossible_values_are_reported(settle, changed, message):
    here = settle(**{**BY_HAND, **changed})
    assert message in here.problem and "unset RANK, WORLD_SIZE" in here.problem
    assert (here.rank, here.world_size) == (0, 1)


def test_commands_that_are_never_launched_ignore_all_of_it(settle, capsys):
    """They do not settle: in a container of a training job, every shell has these variables."""
    settle()
    os.environ.update(BY_HAND)
    launcher._settled = None
    assert logs.is_first_rank()


# Ranks that connect.


class Ends(list):
    """Watches of this process, which do not end it but record which rank was lost, and how."""

    def watch(self, rank, size, *, timeout=20.0):
        watch = Watch("train.py", Place(rank=rank, local_rank=rank, world_size=size), timeout, lambda: None)
        watch._end = lambda lost, what: self.append((rank, lost, what))
        return watch

    def wait_for(self, end):
        deadline = time.monotonic() + 30.0
        while end not in self:
            assert time.monotonic() < deadline, list(self)
            time.sleep(0.01)


@pytest.fixture
def port(monkeypatch):
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def meet(*watches):
    waits = [threading.Thread(target=watch.wait) for watch in watches]
    for watch in watches:
        watch.begin()
    for thread in waits:
        thread.start()
    for thread in waits:
        thread.join(60.0)
        assert not thread.is_alive()


def test_ranks_connect_in_any_order_among_strangers_and_notice_a_death(port):
    ends = Ends()
    first, second, third = (ends.watch(rank, 3) for rank in range(3))
    # It starts before rank 0.
    second.begin()
    first.begin()
    silent = socket.create_connection(("localhost", port))
    with socket.create_connection(("localhost", port)) as hasty:
        # Closing it resets the connection.
        hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    endless = b"x" * meeting.MAX_LINE
    for words in (b"GET / HTTP/1.1\n\n", b"\xff\xfe\n", b"hello secret 1 3 host\n", b"hello\n", endless):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)
            assert stranger.recv(64) == b""
    third.begin()
    for watch in (third, second, first):
        watch.wait()
    assert silent.recv(64) == b""
    # PyTorch uses the port now.
    with socket.create_server(("", port)):
        third._lines[0].connection.shutdown(socket.SHUT_RDWR)
        ends.wait_for((0, 2, "died"))
    ends.wait_for((2, 0, "died"))
    first._send_to_all("lost 2 died")
    ends.wait_for((1, 2, "died"))


def test_a_rank_that_fails_sends_its_reason(port, monkeypatch):
    monkeypatch.setattr("colossal_llama2.engine.ranks.liveness.VERDICT_SECONDS", 0.1)
    ends = Ends()
    first, second = ends.watch(0, 2), ends.watch(1, 2)
    meet(first, second)
    second.leave("failed --dataset x: no such folder")
    ends.wait_for((0, 1, "failed: --dataset x: no such folder"))
    assert ends[0] == (0, 1, "failed: --dataset x: no such folder")


def problem_of(watch):
    with pytest.raises(LaunchError) as error:
        watch.begin()
        watch.wait()
    return str(error.value)


def test_ranks_of_different_jobs_are_reported(port):
    ends = Ends()
    first = ends.watch(0, 2)
    first.begin()
    assert "rank 1 on" in problem_of(ends.watch(1, 3)) and "WORLD_SIZE=3, rank 0 has 2" in str(first._problem)
    with pytest.raises(LaunchError, match="WORLD_SIZE=3"):
        first.wait()
    # Two processes with rank 0 on this host, and a rank that no other one connects to.
    assert f"MASTER_PORT={port}: rank 0 cannot listen there" in problem_of(ends.watch(0, 2))
    first._gives_up = True


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example.org"])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_impossible_host_name_is_reported_at_once(monkeypatch, port, host, rank):
    monkeypatch.setenv("MASTER_ADDR", host)
    start = time.monotonic()
    assert f"MASTER_ADDR={host}" in problem_of(Ends().watch(rank, 2))
    assert time.monotonic() - start < meeting.UNREACHABLE_SECONDS


def test_any_fault_of_the_search_for_rank_0_is_raised(monkeypatch, port):
    monkeypatch.setattr(meeting, "introduce", lambda *args, **more: 1 / 0)
    watch = Ends().watch(1, 2)
    watch.begin()
    with pytest.raises(ZeroDivisionError):
        watch.wait()


def test_rank_0_waits_until_its_name_resolves(monkeypatch, port):
    """As for a service of Kubernetes, whose name resolves only after its process has started."""
    connect, failures = socket.create_connection, iter(range(4))

    def unresolved_at_first(address, **more):
        if next(failures, None) is not None:
            raise socket.gaierror(-2, "Name or service not known")
        return connect(address, **more)

    monkeypatch.setattr(meeting, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(meeting.socket, "create_connection", unresolved_at_first)
    first = Ends().watch(0, 2)
    first.begin()
    assert next(failures, None) is None and first._problem is None
    first._gives_up = True


def test_rank_0_may_be_the_last_to_reach_itself(monkeypatch, port):
    connect, ends = socket.create_connection, Ends()
    first, second = ends.watch(0, 2), ends.watch(1, 2)

    def slow_on_rank_0(address, **more):
        if threading.current_thread() is threading.main_thread():
            assert second._is_linked.wait(30.0)
            # Longer than the other thread needs to notice that no rank is missing.
            time.sleep(0.5)
        return connect(address, **more)

    monkeypatch.setattr(meeting, "UNREACHABLE_SECONDS", 1.0)
    monkeypatch.setattr(meeting.socket, "create_connection", slow_on_rank_0)
    second.begin()
    first.begin()
    for watch in (first, second):
        watch.wait()
    with socket.create_server(("", port)):
        assert first._lines.keys() == {1}


def test_an_address_without_rank_0_is_reported(monkeypatch, port):
    monkeypatch.setattr(meeting, "UNREACHABLE_SECONDS", 0.3)
    ends = Ends()
    assert "rank 1 of 2 did not connect" in problem_of(ends.watch(0, 2, timeout=0.3))
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    for rank in (0, 1):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        assert "MASTER_ADDR=no-such-host.invalid" in problem_of(ends.watch(rank, 2))
    with socket.create_server(("localhost", 0)) as other:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        assert "another program listens there" in problem_of(ends.watch(1, 2))


# Launchers that are killed.

LAUNCHER = """
import os, subprocess, sys, time
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1")
subprocess.Popen([sys.executable, "-c", sys.argv[1], "torchrun"], env={**os.environ, "TORCHELASTIC_RUN_ID": "none"})
subprocess.Popen([sys.executable, "-c", sys.argv[1], "by hand"])
time.sleep(300)
"""
RANK = """
import os, signal, sys, time
from colossal_llama2 import launcher
from colossal_llama2.engine.ranks import orphans
assert launcher.settle().launcher == sys.argv[1], launcher.place()
signal.signal(signal.SIGTERM, lambda *args: (os.write(1, b"SIGTERM\\n"), sys.exit()))
orphans.end_with_launcher()
# At once, since both ranks write to one pipe.
os.write(1, f"{sys.argv[1]} {os.getpid()}\\n".encode())
time.sleep(300)
"""


def test_only_a_launched_rank_ends_when_its_launcher_dies():
    """Nobody reads its errors any more: the launcher passed them on."""
    readable, writable = os.pipe()
    os.close(readable)
    words = [sys.executable, "-c", LAUNCHER, RANK]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=writable, text=True)
    os.close(writable)
    ranks = dict(process.stdout.readline().rsplit(" ", 1) for _ in range(2))
    assert set(ranks) == {"torchrun", "by hand"}
    process.kill()
    start = time.monotonic()
    assert process.stdout.readline() == "SIGTERM\n" and time.monotonic() - start < 30.0
    # Longer than a rank of torchrun needs to notice.
    time.sleep(1.0)
    os.kill(int(ranks["by hand"]), signal.SIGKILL)
    assert process.stdout.read() == ""
    process.wait()


# What started torchrun: a shell's command, here in the place of an ssh connection's.
STARTER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[2], *sys.argv[3:]])
sys.stdin.read()
"""


@pytest.mark.parametrize(("ignored", "ends"), [(False, True), (True, False)])
def test_ranks_end_with_colossalai_run_unless_nohup(tmp_path, ignored, ends):
    """A stand-in for `colossalai run` by name, and one for torchrun, which lives on when its starter is killed."""
    starter = tmp_path / "colossalai"
    starter.write_text(STARTER)
    words = [sys.executable, starter, "run", LAUNCHER, RANK]
    # The tests themselves may have been started with nohup.
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, action),
    )
    ranks = dict(process.stdout.readline().rsplit(" ", 1) for _ in range(2))
    parent = parent_of(int(ranks["torchrun"]))
    # The thread of the rank has looked by then.
    time.sleep(1.0)
    process.kill()
    try:
        has_ended, _, _ = select.select([process.stdout], [], [], 30.0 if ends else 2.0)
        assert bool(has_ended) == ends and (not ends or process.stdout.readline() == "SIGTERM\n")
    finally:
        for pid in (*ranks.values(), parent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        process.communicate()


def parent_of(pid):
    """The process that started another one."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
