"""Take the lock of a run's folder, or find out that another run holds it. How a lock file that is found is judged:

    holder                           flock refused              flock obtained, or the file system has none
    under the same kernel            it runs: refused           obtained: it is dead. None: its process ID decides
    of the same job, restarted       as below                   taken over
    on another host, flock reaches   its beats decide           it is dead: taken over
    on another host, otherwise       its beats decide           its beats decide
    of an earlier version elsewhere  refused                    refused, unless flock reaches all hosts

A holder's record has a number that grows while the process runs (a beat). If it grows, the holder runs: refused. If not
for STALE_SECONDS, the lock is taken over; a holder that was only cut off notices that (lock_holder.py). Clocks of
different hosts are not compared. While flock is refused, the lock is never taken over: a file server releases it some
time after a host was lost.
"""

import enum
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.train.run_folder.lock_reach import HOST, HOSTS, Mount
from colossal_llama2.train.run_folder.lock_record import LockRecord, process_namespace, read_record

# How long a run waits for the previous one, which saves before it ends.
ENDING_SECONDS = 300.0
# After this time without a beat a holder on another host is considered dead.
STALE_SECONDS = 60.0
# How long to wait for a file server to release the flock of a lost host: NFSv4's lease is 90 s.
LEASE_SECONDS = 150.0
LOOK_SECONDS = 0.1
WAIT_OR_STOP = "wait until that run has ended, or stop it"


class Flock(enum.Enum):
    """What an attempt to lock the file returned."""

    OBTAINED = enum.auto()
    REFUSED = enum.auto()
    MISSING = enum.auto()


class Claim(NamedTuple):
    """An open lock file that is free, and whether flock locks it."""

    descriptor: int
    flock: Flock


def claim(path: Path, own: LockRecord, mount: Mount) -> Claim:
    """Open the lock file and lock it. Its content is left, which the caller replaces at once.

    Raises:
        UserError: another run holds the lock, or the file is none that may be written to.
    """
    judge = _Judge(path, own, mount)
    while True:
        descriptor = _open_regular(path)
        is_free = False
        try:
            flock = _try_flock(descriptor)
            # Otherwise the run that had locked it removed it in between.
            if flock is Flock.REFUSED or _is_same_file(descriptor, path):
                is_free = judge.is_free(read_record(descriptor), flock)
                if is_free:
                    return Claim(descriptor, flock)
                time.sleep(LOOK_SECONDS)
        finally:
            if not is_free:
                os.close(descriptor)


def _try_flock(descriptor: int) -> Flock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Flock.REFUSED
    except OSError:
        return Flock.MISSING
    return Flock.OBTAINED


def _is_same_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


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


class _Judge:
    """Looks at a lock file again and again until it is clear whether its holder runs."""

    def __init__(self, path: Path, own: LockRecord, mount: Mount):
        self._path, self._own, self._mount = path, own, mount
        self._ends_at = time.monotonic() + ENDING_SECONDS
        self._announced: set[str] = set()
        self._seen: LockRecord | None = None
        self._seen_at = 0.0

    def is_free(self, owner: LockRecord | None, flock: Flock) -> bool:
        """Whether the file's holder is dead; False means to look again. Raises UserError if the holder runs."""
        if owner is None:
            if flock is Flock.REFUSED:
                raise self._held(None, WAIT_OR_STOP)
            return True
        if flock is Flock.REFUSED and owner.ending and self._may_wait(owner):
            return False
        return self._is_free_here(owner, flock) if owner.is_on_this_host else self._is_free_elsewhere(owner, flock)

    def _is_free_here(self, owner: LockRecord, flock: Flock) -> bool:
        if flock is Flock.MISSING and owner.processes not in (None, process_namespace()):
            # In another container, where its process ID means another process.
            return self._is_silent(owner, flock)
        if flock is Flock.REFUSED or (flock is Flock.MISSING and _is_alive(owner.pid)):
            raise self._held(owner, WAIT_OR_STOP)
        return self._take_over(owner, "which has died")

    def _is_free_elsewhere(self, owner: LockRecord, flock: Flock) -> bool:
        if flock is not Flock.REFUSED and owner.is_restarted_by(self._own):
            return self._take_over(owner, "which this attempt of the same job replaces")
        if flock is Flock.OBTAINED and self._flock_reaches(owner):
            return self._take_over(owner, "which has died: its flock is released")
        if owner.token is None:
            cure = WAIT_OR_STOP if flock is Flock.REFUSED else f"if that run is dead, remove {self._path}"
            raise self._held(owner, cure)
        return self._is_silent(owner, flock)

    def _flock_reaches(self, owner: LockRecord) -> bool:
        """Whether an obtained flock proves that the holder has none: both hosts mount the folder in the same way."""
        if owner.token is None:
            # Of an earlier version, which locked the same file but did not record its file system.
            return self._mount.reaches_hosts
        is_same = owner.file_system is not None and owner.file_system == self._mount.kind
        return is_same and owner.reach != HOST and (owner.reach == HOSTS or self._mount.reaches_hosts)

    def _is_silent(self, owner: LockRecord, flock: Flock) -> bool:
        """Whether the holder has shown no sign of life for long enough."""
        now, before = time.monotonic(), self._seen
        if before is None or before.token != owner.token:
            self._seen, self._seen_at = owner, now
            self._announce(owner, "looking whether it still runs, which takes up to %.0f s", self._limit(flock))
            return False
        if owner.beat != before.beat:
            if owner.ending and self._may_wait(owner):
                self._seen, self._seen_at = owner, now
                return False
            raise self._held(owner, WAIT_OR_STOP)
        if now - self._seen_at < self._limit(flock):
            return False
        if flock is Flock.REFUSED:
            raise self._held(
                owner, f"it has shown no sign of life for {LEASE_SECONDS:g} s; if it is dead, remove {self._path}"
            )
        return self._take_over(owner, f"which has shown no sign of life for {STALE_SECONDS:g} s")

    def _limit(self, flock: Flock) -> float:
        return LEASE_SECONDS if flock is Flock.REFUSED else STALE_SECONDS

    def _may_wait(self, owner: LockRecord) -> bool:
        """Whether a holder that is ending may take more time."""
        if time.monotonic() >= self._ends_at:
            return False
        self._announce(owner, "it is saving before it ends; waiting for its lock")
        return True

    def _announce(self, owner: LockRecord, text: str, *values: object) -> None:
        if text not in self._announced:
            self._announced.add(text)
            logs.get_logger().info("%s: held by process %d on %s: " + text, self._path, owner.pid, owner.host, *values)

    def _take_over(self, owner: LockRecord, why: str) -> bool:
        logs.get_logger().info("Replacing %s of %s, %s", self._path, owner.named(), why)
        return True

    def _held(self, owner: LockRecord | None, cure: str) -> UserError:
        who = "another run" if owner is None else owner.named()
        return UserError(f"--save_dir {self._path.parent}: {who} is writing to it; {cure}, or give another folder")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
