"""The lock of a run's folder on several hosts: which lock is taken over, and that a run that lost it writes nothing.

Another host is a process with another host name and kernel. Where a file system has no flock, none of them has.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossal_llama2.errors import UserError
from colossal_llama2.train.run_folder import lock_claim, lock_holder, lock_reach, lock_record, run_lock
from colossal_llama2.train.run_folder.lock_reach import Mount

# A run on another host: takes the lock, and writes a line to a file whenever it may.
OTHER = """
import fcntl, os, socket, sys, time
from pathlib import Path
from colossal_llama2.errors import UserError
from colossal_llama2.train.run_folder import lock_claim, lock_holder, lock_record, run_lock
folder, host, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
socket.gethostname = lambda: host
lock_record.kernel_id = lambda: f"kernel of {host}"
lock_holder.BEAT_SECONDS, lock_holder.FRESH_SECONDS, lock_holder.SETTLE_SECONDS = 0.1, 0.3, 1.0
lock_claim.STALE_SECONDS, lock_claim.LEASE_SECONDS = 1.5, 1.5
if "no-flock" in options:
    def missing(*args):
        raise OSError("no locks on this file system")
    fcntl.flock = missing
if "no-beats" in options:
    lock_holder.HeldLock._beat = lambda self: None
try:
    with run_lock.locked(folder):
        print("won", flush=True)
        run_lock.settle(folder)
        print("settled", flush=True)
        while not (folder / "stop").exists():
            run_lock.check_held(folder, may_be_fresh=True)
            with (folder / "log").open("a") as log:
                log.write(f"{host}\\n")
            time.sleep(0.02)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture
def start():
    """Start a run on another host; all are killed with the test."""
    runs = []

    def start_one(folder, host, *options, **environment):
        runs.append(
            subprocess.Popen(
                [sys.executable, "-c", OTHER, str(folder), host, *options],
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return runs[-1]

    yield start_one
    for run in runs:
        run.kill()
        run.communicate()


@pytest.fixture
def quick(monkeypatch):
    """Short times, as in OTHER."""
    monkeypatch.setattr(lock_holder, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock_claim, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock_claim, "LEASE_SECONDS", 0.5)


def leave_lock(folder, **fields):
    """A lock that a dead run on another host left."""
    record = lock_record.own_record(lock_reach.mount_of(folder).kind)
    content = {**vars(record), "host": "elsewhere", "pid": 4711, "kernel": "another", **fields}
    (folder / ".lock").write_text(json.dumps(content))


def seconds_to_lock(folder):
    begun = time.monotonic()
    with run_lock.locked(folder):
        return time.monotonic() - begun


def test_a_lock_of_a_killed_container_of_this_machine_is_taken_over_at_once(tmp_path, caplog):
    caplog.set_level("INFO")
    leave_lock(tmp_path, kernel=lock_record.kernel_id(), processes="pid:[1]")
    assert seconds_to_lock(tmp_path) < 0.5
    assert "of process 4711 on elsewhere" in caplog.text and "which has died" in caplog.text


@pytest.mark.parametrize(
    ("fields", "mount", "is_trusted"),
    [
        ({"reach": "hosts", "file_system": "nfs4"}, Mount("nfs4"), True),
        ({"reach": "untested", "file_system": "nfs4"}, Mount("nfs4", reaches_hosts=True), True),
        # The folder's server itself, on which locks of its clients do not count.
        ({"reach": "hosts", "file_system": "nfs4"}, Mount("ext4"), False),
        ({"reach": "untested", "file_system": "ext4"}, Mount("ext4"), False),
        ({"reach": "host", "file_system": "lustre"}, Mount("lustre", reaches_hosts=True), False),
    ],
)
def test_an_obtained_flock_counts_where_it_reaches_the_other_host(
    tmp_path, monkeypatch, quick, caplog, fields, mount, is_trusted
):
    caplog.set_level("INFO")
    monkeypatch.setattr(run_lock, "mount_of", lambda folder: mount)
    leave_lock(tmp_path, **fields)
    seconds = seconds_to_lock(tmp_path)
    assert (seconds < 0.4) == is_trusted
    assert ("its flock is released" if is_trusted else "no sign of life for 0.5 s") in caplog.text


def test_a_restarted_job_replaces_its_own_lock(tmp_path, monkeypatch, quick, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    leave_lock(tmp_path, job="slurm 77", attempt=[1, 0])
    assert seconds_to_lock(tmp_path) < 0.4 and "this attempt of the same job replaces" in caplog.text
    # The same attempt may be another step of the job, which runs.
    leave_lock(tmp_path, job="slurm 77", attempt=[2, 0])
    assert seconds_to_lock(tmp_path) >= 0.5
    # colossalai run gives all jobs this id.
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "colossalai-default-job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert lock_record.own_record(None).job is None


@pytest.mark.parametrize("options", [(), ("no-flock",)])
def test_a_living_run_on_another_host_is_refused(tmp_path, monkeypatch, quick, start, options):
    other = start(tmp_path, "node2", *options)
    assert other.stdout.readline() == "won\n"
    if options:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="process .* on node2 .*; wait until that run has ended"):
        seconds_to_lock(tmp_path)
    assert other.stdout.readline() == "settled\n" and other.poll() is None


def lines_of(host, folder):
    """How many lines that host wrote; a run may be stopped before its first."""
    log = folder / "log"
    return log.read_text().split().count(host) if log.exists() else 0


def no_locks(*args):
    raise OSError("no locks on this file system")


def test_a_lost_host_keeps_its_flock_until_the_server_releases_it(tmp_path, quick, start):
    """As with NFS: flock is refused until the lease of the lost host ends, and then obtained."""
    other = start(tmp_path, "node2", "no-beats")
    assert other.stdout.readline() == "won\n"
    with pytest.raises(UserError, match=r"no sign of life for 0.5 s; if it is dead, remove .*/\.lock"):
        seconds_to_lock(tmp_path)
    os.kill(other.pid, signal.SIGSTOP)
    waiting = start(tmp_path, "node3")
    time.sleep(0.3)
    other.kill()
    assert waiting.stdout.readline() == "won\n"


@pytest.mark.parametrize("leftover", [False, True])
def test_of_many_hosts_that_start_at_once_without_flock_one_runs(tmp_path, start, leftover):
    if leftover:
        leave_lock(tmp_path)
    runs = {f"node{number}": start(tmp_path, f"node{number}", "no-flock") for number in range(6)}
    deadline = time.monotonic() + 60.0
    while sum(run.poll() is None for run in runs.values()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (winner,) = [host for host, run in runs.items() if run.poll() is None]
    for host, run in runs.items():
        if host != winner:
            output = "".join(run.communicate())
            assert run.returncode == 2 and "is writing to it" in output, output
    # It has the lock for certain, and nobody else wrote anything.
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "stop").touch()
    runs[winner].wait(30.0)
    assert set((tmp_path / "log").read_text().split()) == {winner}


@pytest.mark.parametrize("options", [("no-flock",), ("no-flock", "no-beats")])
def test_a_run_that_was_cut_off_and_comes_back_writes_nothing(tmp_path, start, options):
    """Either its next beat or its next write notices that another run has the lock."""
    first = start(tmp_path, "node1", *options)
    assert [first.stdout.readline() for _ in range(2)] == ["won\n", "settled\n"]
    os.kill(first.pid, signal.SIGSTOP)
    second = start(tmp_path, "node2", *options[:1])
    assert [second.stdout.readline() for _ in range(2)] == ["won\n", "settled\n"]
    before = lines_of("node1", tmp_path)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(30.0) == 1
    line = first.stderr.read()
    assert "has taken over the lock of this process on node1" in line and "on node2 since" in line
    assert line.count("\n") == 1
    # The process may have been stopped between its look and its write.
    assert lines_of("node1", tmp_path) <= before + 1
    # The lock is still that of the second run.
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == second.pid and second.poll() is None


def test_a_run_that_comes_back_after_another_one_has_ended_writes_nothing(tmp_path, start):
    first = start(tmp_path, "node1", "no-flock")
    assert [first.stdout.readline() for _ in range(2)] == ["won\n", "settled\n"]
    os.kill(first.pid, signal.SIGSTOP)
    second = start(tmp_path, "node2", "no-flock")
    assert [second.stdout.readline() for _ in range(2)] == ["won\n", "settled\n"]
    second.kill()
    second.wait()
    (tmp_path / ".lock").unlink()
    before = lines_of("node1", tmp_path)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(30.0) == 1
    assert "was removed, perhaps by a run that has ended; this run ends" in first.stderr.read()
    # The process may have been stopped between its look and its write.
    assert lines_of("node1", tmp_path) <= before + 1
    assert not (tmp_path / ".lock").exists()


def test_a_removed_lock_is_written_again(tmp_path, quick, caplog):
    with run_lock.locked(tmp_path):
        before = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").unlink()
        run_lock.check_held(tmp_path)
        assert json.loads((tmp_path / ".lock").read_text())["token"] == before["token"]
        assert "was removed while this run uses the folder" in caplog.text
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_was_taken_over_is_not_removed(tmp_path):
    with run_lock.locked(tmp_path):
        leave_lock(tmp_path)
        run_lock.release()
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "elsewhere"


SIGNS = {"token": "t", "beat": 1, "reach": "hosts", "kernel": "k", "processes": "p", "file_system": "nfs4", "job": None}
OWNER = {"host": "h", "pid": 1, "since": "s"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\x00",
        b"[" * 1024,
        b'{"host": "h", "pid": 1' + b" " * 2000,
        b'{"host": "h", "pid": 1e999, "since": "s"}',
        json.dumps({**OWNER, **SIGNS}).encode(),
        json.dumps({**OWNER, **SIGNS, "attempt": [None]}).encode(),
        json.dumps({**OWNER, **SIGNS, "attempt": [], "beat": "x"}).encode(),
    ],
)
def test_a_lock_without_a_readable_record_is_replaced(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with run_lock.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("pid", [0, -1, 10**30])
def test_a_hostile_process_number_is_harmless(tmp_path, monkeypatch, pid):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    leave_lock(tmp_path, pid=pid, kernel=lock_record.kernel_id())
    try:
        seconds_to_lock(tmp_path)
    except UserError as error:
        assert str(pid) in str(error)


def test_flock_reaches_hosts_by_the_kind_and_options_of_the_mount(tmp_path, monkeypatch):
    real = tmp_path.resolve()
    lines = [
        "21 1 0:20 / / rw,relatime shared:1 - ext4 /dev/root rw",
        f"22 21 0:21 / {real}/nfs\\040four rw - nfs4 server:/a rw,vers=4.2,local_lock=none",
        f"23 21 0:22 / {real}/nolock rw - nfs server:/a rw,vers=3,nolock,local_lock=all",
        f"24 21 0:23 / {real}/lustre rw,flock shared:3 - lustre mgs:/l rw,flock,lazystatfs",
        f"25 21 0:24 / {real}/local rw - lustre mgs:/l rw,localflock",
        f"26 21 0:25 / {real}/local/over rw - beegfs beegfs_nodev rw",
        "torn line",
    ]
    table = tmp_path / "mountinfo"
    table.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(lock_reach, "MOUNTS", table)
    expected = {
        "": Mount("ext4"),
        "nfs four/runs": Mount("nfs4", reaches_hosts=True),
        "nolock": Mount("nfs"),
        "lustre": Mount("lustre", reaches_hosts=True),
        "local": Mount("lustre"),
        "local/over": Mount("beegfs"),
        "lustre2": Mount("ext4"),
    }
    for name, mount in expected.items():
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        assert lock_reach.mount_of(tmp_path / name) == mount, name
    assert Mount("ext4").is_local and not Mount("nfs4").is_local
    monkeypatch.setattr(lock_reach, "MOUNTS", tmp_path / "none")
    assert lock_reach.mount_of(tmp_path) == Mount()


def test_a_lock_is_tried_without_being_kept(tmp_path, start):
    path = Path(tmp_path, ".lock")
    assert lock_reach.locks_out(path) is None
    other = start(tmp_path, "node2")
    assert other.stdout.readline() == "won\n"
    assert lock_reach.locks_out(path) is True
    other.kill()
    other.communicate()
    assert lock_reach.locks_out(path) is False
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
