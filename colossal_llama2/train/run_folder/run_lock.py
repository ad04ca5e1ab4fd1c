"""The lock on a run's folder: one run at a time writes to it, and every host of the job sees it.

The filelock package does not fit. This lock file names the host and process that hold it, so that a refused run can
report them, it serves as the lock where the file system has none, and a run that is ending marks it so that the next
one waits.

locked        before torch is imported: a second run in the same folder is refused
mark_ending   when a run begins to end early: the next one on this host waits for it
release       before a process exits at once: a remaining lock file would refuse a restart on another host
prepare       before step 1: leftovers are removed, and every rank reads a file of rank 0
"""

import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import errors_naming, open_no_link
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import LOCK_NAME

# A shared file system may show a new file to other hosts only after some seconds.
SHARED_AFTER_SECONDS = 10.0

# How long a run waits for the previous one, which saves before it ends.
ENDING_SECONDS = 300.0
LOOK_SECONDS = 0.1

# The lock files that this process holds, and their descriptors.
_held_here: dict[Path, int] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other run can lock the folder. It is created if needed, and removed again if still empty.

    An empty folder may remain if several calls create it at the same time.

    The lock file names host and process. The system releases the lock of a dead process on this host. Whether a process
    on another host is dead cannot be found out here, so it is assumed to run.

    Raises:
        UserError: another run has locked the folder.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = _open_locked(path)
    try:
        _check_owner(path, descriptor)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _held_here[path] = descriptor
        try:
            with errors_naming(path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(content).encode(), 0)
            yield
        finally:
            _held_here.pop(path, None)
            _remove(path)
    finally:
        os.close(descriptor)
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def _remove(path: Path) -> None:
    """Remove the lock file. A failure, such as on a disk that became read-only, must not hide another error."""
    is_failing = sys.exc_info()[0] is not None
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if not is_failing:
            logs.get_logger().warning("%s cannot be removed (%s); remove it before the next run", path, error.strerror)


def release() -> None:
    """Remove the lock file of this process, if it has one, since it is about to exit without leaving `locked`."""
    for path in tuple(_held_here):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def mark_ending() -> None:
    """Write to the lock file that this process is ending, so that the next run waits for it."""
    for descriptor in tuple(_held_here.values()):
        # The descriptor may have been closed just now.
        with suppress(OSError, TypeError):
            content = {**json.loads(os.pread(descriptor, 1000, 0)), "ending": True}
            os.pwrite(descriptor, json.dumps(content).encode(), 0)


def _open_locked(path: Path) -> int:
    """Open the lock file and lock it; again, if the run that had locked it removed it in between."""
    deadline, is_first = time.monotonic() + ENDING_SECONDS, True
    while True:
        descriptor = _open_regular(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(descriptor)
            os.close(descriptor)
            if owner is not None and owner["ending"] and time.monotonic() < deadline:
                if is_first:
                    logs.get_logger().info("Process %d is saving before it ends; waiting for its lock", owner["pid"])
                is_first = False
                time.sleep(LOOK_SECONDS)
                continue
            raise _held(path, owner, "wait until that run has ended, or stop it")
        except OSError:
            pass  # a file system without locks: the content of the file decides
        try:
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _open_regular(path: Path) -> int:
    """Open the lock file, or create it. Raises UserError unless it is a regular file with no other name.

    It is written to, and a folder from elsewhere may hold a link of that name.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if not os.path.lexists(path) or stat.S_ISREG(path.lstat().st_mode):
            raise
        kind = "a link" if path.is_symlink() else f"not a regular file ({error.strerror})"
        raise UserError(f"--save_dir {path.parent}: {path.name} in it is {kind}, so it is not written to; remove it")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        os.close(descriptor)
        kind = "has a second name elsewhere (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
        raise UserError(f"--save_dir {path.parent}: {path.name} in it {kind}, so it is not written to; remove it")
    return descriptor


def _owner(descriptor: int) -> dict | None:
    try:
        content = json.loads(os.pread(descriptor, 1000, 0))
        return {
            "host": str(content["host"]),
            "pid": int(content["pid"]),
            "since": str(content["since"]),
            "ending": content.get("ending") is True,
        }
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _check_owner(path: Path, descriptor: int) -> None:
    """Accept the lock file of a dead process on this host. Raises UserError for any other owner."""
    owner = _owner(descriptor)
    if owner is None:
        return
    if owner["host"] != socket.gethostname():
        raise _held(path, owner, f"if that run is dead, remove {path}")
    if _is_alive(owner["pid"]) and not _holds_lock_itself(descriptor):
        raise _held(path, owner, "wait until that run has ended, or stop it")
    logs.get_logger().info("Replacing %s of process %d, which has died", path, owner["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _holds_lock_itself(descriptor: int) -> bool:
    """Whether the file system has locks. If so, this process has the lock, and the one named in the file does not."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _held(path: Path, owner: dict | None, cure: str) -> UserError:
    who = "another run" if owner is None else f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    return UserError(f"--save_dir {path.parent}: {who} is writing to it; {cure}, or give another folder")


def prepare(folder: Path) -> None:
    """Remove what a dead run left, and check that all ranks see the same folder. Called on all ranks.

    Raises:
        UserError: the hosts that do not see what rank 0 wrote.
    """
    is_first = logs.is_first_rank()
    token_path = folder / f".token-{collectives.first_rank_value(secrets.token_hex(4))}"
    with collectives.all_or_none():
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint_files.remove_leftovers(folder)
            with errors_naming(token_path), open_no_link(token_path, "xb") as file:
                file.write(token_path.name.encode())
    seen = collectives.gather_values([socket.gethostname(), _appears(token_path)])
    with collectives.all_or_none():
        if is_first:
            token_path.unlink(missing_ok=True)
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise UserError(
            f"--save_dir {folder}: files that {seen[0][0]} writes there are not visible on {', '.join(blind)}; "
            f"give a folder that all hosts share"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_AFTER_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
