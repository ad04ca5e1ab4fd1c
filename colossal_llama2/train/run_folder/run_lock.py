"""The lock on a run's folder: one run at a time writes to it, and every host of the job sees it.

The filelock package does not fit. This lock file names the host and process that hold it, so that a refused run can
report them, it serves as the lock where the file system has none, and a run that is ending marks it so that the next
one waits.

locked        before torch is imported: a second run in the same folder is refused
mark_ending   when a run begins to end early: the next one waits for it
release       before a process exits at once: a remaining lock file would delay a restart on another host
prepare       before step 1: leftovers are removed, and every rank reads a file of rank 0
check_held    before something is published: another run may have taken the lock over
"""

import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import errors_naming, open_no_link
from colossal_llama2.train.run_folder import checkpoint_files, lock_reach
from colossal_llama2.train.run_folder.file_names import LOCK_NAME
from colossal_llama2.train.run_folder.lock_claim import claim
from colossal_llama2.train.run_folder.lock_holder import HeldLock
from colossal_llama2.train.run_folder.lock_reach import HOST, HOSTS, mount_of
from colossal_llama2.train.run_folder.lock_record import own_record

# A shared file system may show a new file to other hosts only after some seconds.
SHARED_AFTER_SECONDS = 10.0

# The locks that this process holds.
_held_here: dict[Path, HeldLock] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other run can lock the folder. It is created if needed, and removed again if still empty.

    An empty folder may remain if several calls create it at the same time. How a lock that another process left is
    judged is described in lock_claim.py.

    Raises:
        UserError: another run has locked the folder.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, mount = folder / LOCK_NAME, mount_of(folder)
    record = own_record(mount.kind)
    held = HeldLock(path, claim(path, record, mount), record, mount)
    try:
        _held_here[path] = held
        try:
            held.write()
            held.begin_beats()
            yield
        finally:
            _held_here.pop(path, None)
            _remove(held, path)
    finally:
        held.close()
        with suppress(OSError):
            for empty in made:
                empty.rmdir()


def _remove(held: HeldLock, path: Path) -> None:
    """Remove the lock file. A failure, such as on a disk that became read-only, must not hide another error."""
    is_failing = sys.exc_info()[0] is not None
    try:
        held.remove()
    except OSError as error:
        if not is_failing:
            logs.get_logger().warning("%s cannot be removed (%s); remove it before the next run", path, error.strerror)


def release() -> None:
    """Remove the lock file of this process, if it has one, since it is about to exit without leaving `locked`."""
    for held in tuple(_held_here.values()):
        with suppress(OSError):
            held.remove()


def mark_ending() -> None:
    """Write to the lock file that this process is ending, so that the next run waits for it."""
    for held in tuple(_held_here.values()):
        held.update(ending=True)


def check_held(folder: Path, *, may_be_fresh: bool = False) -> None:
    """End this process if it has locked the folder and another run has taken the lock over since.

    Args:
        may_be_fresh: do not read the lock file if it was read a moment ago.

    Raises:
        RunError: the lock file cannot be read.
    """
    held = _held_here.get(folder / LOCK_NAME)
    if held is not None:
        held.check(may_be_fresh=may_be_fresh)


def settle(folder: Path) -> None:
    """Return when it is certain that this process has the lock; end it if another run took it at the same moment.

    Raises:
        RunError: the lock file cannot be read.
    """
    held = _held_here.get(folder / LOCK_NAME)
    if held is not None:
        held.settle()


def prepare(folder: Path) -> None:
    """Remove what a dead run left, and check that all ranks see the same folder. Called on all ranks.

    Raises:
        UserError: the hosts that do not see what rank 0 wrote.
        RunError: the lock cannot be read.
    """
    is_first = logs.is_first_rank()
    token_path = folder / f".token-{collectives.first_rank_value(secrets.token_hex(4))}"
    with collectives.all_or_none():
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            settle(folder)
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
    _try_lock_elsewhere(folder, [host for host, _ in seen])


def _try_lock_elsewhere(folder: Path, hosts: list[str]) -> None:
    """Find out whether flock reaches the job's other hosts, and record it in the lock. Called on all ranks."""
    rank = collectives.place()[0]
    if not any(host != hosts[0] for host in hosts):
        return
    # One rank of each other host.
    tries = hosts[rank] != hosts[0] and hosts.index(hosts[rank]) == rank
    results = collectives.gather_values(lock_reach.locks_out(folder / LOCK_NAME) if tries else None)
    found = [result for result in results if result is not None]
    held = _held_here.get(folder / LOCK_NAME)
    if held is None or not found:
        return
    held.update(reach=HOSTS if all(found) else HOST)
    if not all(found):
        logs.get_logger().info(
            "--save_dir %s: flock on this file system does not reach the job's other hosts, so %s is renewed every few "
            "seconds; a run on another host that finds it first looks for a minute whether this one still runs",
            folder,
            LOCK_NAME,
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_AFTER_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
