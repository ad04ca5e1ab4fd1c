"""One run at a time in a --save_dir."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from colossal_llama2.errors import RunError, UserError
from colossal_llama2.train.run_folder import run_lock

HOLDER = """
import sys
from colossal_llama2.errors import UserError
from pathlib import Path
from colossal_llama2.train.run_folder import run_lock
try:
    with run_lock.locked(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def start(folder):
    command = [sys.executable, "-c", HOLDER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_many_starts_at_once_one_wins_and_the_others_name_it(tmp_path):
    processes = [start(tmp_path / "runs" / "one") for _ in range(12)]
    lines = [process.stdout.readline() for process in processes]
    winner = next(process for process, line in zip(processes, lines, strict=True) if line == "won\n")
    assert lines.count("won\n") == 1
    assert all(f"process {winner.pid} on " in line or "another run" in line for line in lines if line != "won\n")
    for process in processes:
        process.communicate()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_to_which_nothing_was_written_does_not_stay(tmp_path):
    with run_lock.locked(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one" / ".lock").is_file()
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    with run_lock.locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.slow
def test_a_run_replaces_the_lock_of_a_killed_process(tmp_path):
    process = start(tmp_path)
    assert process.stdout.readline() == "won\n"
    with pytest.raises(UserError, match=f"process {process.pid} on .* is writing to it"), run_lock.locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert (tmp_path / ".lock").is_file()
    with run_lock.locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_a_run_waits_for_one_that_is_ending(tmp_path):
    ending = HOLDER.replace("sys.stdin.read()", "run_lock.mark_ending(); print('ends', flush=True); sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", ending, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert [process.stdout.readline() for _ in range(2)] == ["won\n", "ends\n"]
    threading.Timer(0.5, process.stdin.close).start()
    start_time = time.monotonic()
    with run_lock.locked(tmp_path):
        assert time.monotonic() - start_time >= 0.4
    process.wait()
    process.stdout.close()


def test_the_lock_of_another_host_is_never_guessed_to_be_dead(tmp_path):
    owner = {"host": "elsewhere", "pid": 1, "since": "2026-01-01 00:00:00"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="process 1 on elsewhere.*remove .*/.lock"), run_lock.locked(tmp_path):
        pass
    assert json.loads((tmp_path / ".lock").read_text()) == owner


def test_without_locks_a_living_process_keeps_the_folder(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("no locks on this file system")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-01 00:00:00"}
    (tmp_path / ".lock").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="wait until that run has ended"), run_lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "folder", "pipe"])
def test_a_lock_that_leads_elsewhere_is_not_written_to(tmp_path, kind):
    """As in a folder from someone else."""
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.write_text("precious")
    lock = folder / ".lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "hard link":
        os.link(other, lock)
    else:
        lock.symlink_to(other if kind == "link" else tmp_path / "new")
    with pytest.raises(UserError, match=".lock in it .*; remove it"), run_lock.locked(folder):
        pass
    assert other.read_text() == "precious" and not (tmp_path / "new").exists() and os.path.lexists(lock)


def test_a_lock_that_cannot_be_removed_hides_no_other_error(tmp_path, monkeypatch, caplog):
    """As on a disk that became read-only while the run saved."""

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.raises(RunError, match="the first"), run_lock.locked(tmp_path):
        monkeypatch.setattr(Path, "unlink", read_only)
        raise RunError("the first")
    assert not caplog.text
    with run_lock.locked(tmp_path):
        pass
    assert ".lock cannot be removed (Read-only file system)" in caplog.text


def test_the_lock_is_taken_before_torch_is_imported(tmp_path, run_script):
    code = (
        "import sys; from pathlib import Path; from colossal_llama2.train import run\n"
        "from colossal_llama2.train.run_folder import run_lock\n"
        f"with run_lock.locked(Path({str(tmp_path)!r})): print('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert process.stdout == "False\n", process.stderr
