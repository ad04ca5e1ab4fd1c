"""What the holder of a run folder's lock does while it runs: it renews the lock, and notices when it has lost it.

A run that another host believed to be dead may come back: its host was suspended, or cut off from the network. Another
run may have taken the lock over by then. So the lock is read again before anything is published, and every few seconds.
"""

import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from colossal_llama2 import logs
from colossal_llama2.errors import RunError, reason
from colossal_llama2.launcher import report_to_torchrun
from colossal_llama2.storage.files import errors_naming
from colossal_llama2.terminal_text import report_line
from colossal_llama2.train.run_folder.lock_claim import WAIT_OR_STOP, Claim, Flock
from colossal_llama2.train.run_folder.lock_reach import Mount
from colossal_llama2.train.run_folder.lock_record import LockRecord, read_record

BEAT_SECONDS = 5.0
# What was confirmed this recently is not read again before a line of a log is written. Less than the time after which
# another host takes the lock over (run_lock.STALE_SECONDS).
FRESH_SECONDS = 20.0
# How long after its write a lock is certain where flock does not decide: longer than another process needs between
# reading the file and writing its own record.
SETTLE_SECONDS = 3.0
# How long a process that ends waits for a write that is under way.
END_SECONDS = 1.0
# It counts on while the machine sleeps, as the clocks of other hosts do.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class LockLost(Exception):
    """Another process holds, or held, the lock. Its record is the argument, None if the lock file is gone."""


class HeldLock:
    """A lock that this process has taken. Its methods may be called from any thread."""

    def __init__(self, path: Path, claimed: Claim, record: LockRecord, mount: Mount):
        self._path, self._descriptor, self._record, self._mount = path, claimed.descriptor, record, mount
        # Whether no other host can have taken the lock at the same moment.
        self._is_decided_by_flock = claimed.flock is Flock.OBTAINED and (mount.reaches_hosts or mount.is_local)
        self._writing, self._is_over = threading.RLock(), threading.Event()
        self._written_at = self._confirmed_at = 0.0
        self._is_settled = False

    def write(self) -> None:
        """Write the record. Raises OSError."""
        with errors_naming(self._path):
            self._put(self._record)
        self._written_at = self._confirmed_at = _now()

    def begin_beats(self) -> None:
        """Renew the lock from now on; end the process if it is lost."""
        threading.Thread(target=self._beat, daemon=True).start()

    def update(self, **changed: Any) -> None:
        """Change fields of the record. Nothing happens if the lock is lost or over, or cannot be written."""
        with suppress(OSError, LockLost), self._alone():
            self._renew(**changed)

    def check(self, *, may_be_fresh: bool = False) -> None:
        """End this process at once if another one has taken the lock over: even its error handling would write files.

        Args:
            may_be_fresh: do not read the file if it was read a moment ago.

        Raises:
            RunError: the file cannot be read.
        """
        if self._is_over.is_set() or (may_be_fresh and _now() - self._confirmed_at < FRESH_SECONDS):
            return
        try:
            with self._alone():
                self._renew()
        except LockLost as lost:
            self._end_process(lost.args[0])
        except OSError as error:
            raise RunError(f"{self._path} cannot be read ({reason(error)}), so it is unknown who holds the lock")

    def settle(self) -> None:
        """Return when it is certain that this process has the lock. Raises RunError if the file cannot be read.

        Where flock does not decide, several may take the lock at the same time: the last one to write it keeps it, and
        the others end.
        """
        seconds = 0.0 if self._is_decided_by_flock else SETTLE_SECONDS
        time.sleep(max(0.0, self._written_at + seconds - _now()))
        self.check()
        self._is_settled = True

    def remove(self) -> None:
        """Remove the file, if it is still of this process, and stop to renew it. Raises OSError."""
        self._is_over.set()
        # A write that hangs must not keep the process from ending.
        is_alone = self._writing.acquire(timeout=END_SECONDS)
        try:
            if self._is_own(self._current()):
                self._path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        finally:
            if is_alone:
                self._writing.release()

    def close(self) -> None:
        """Release the lock, whether or not the file could be removed."""
        self._is_over.set()
        with suppress(OSError):
            os.close(self._descriptor)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._writing:
            if not self._is_over.is_set():
                yield
                return
        raise OSError("the lock is over")

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            try:
                with self._alone():
                    self._renew(beat=self._record.beat + 1)
            except LockLost as lost:
                self._end_process(lost.args[0])
            except OSError:
                pass  # a storage that does not answer now may do so later; `check` reports it

    def _renew(self, **changed: Any) -> None:
        """Confirm that the lock is still held, and write what changed. Raises LockLost, OSError."""
        started = _now()
        try:
            current = self._current()
        except FileNotFoundError:
            self._restore()
            current = self._record
        if not self._is_own(current):
            raise LockLost(current)
        if changed:
            self._record = replace(self._record, **changed)
            self._put(self._record)
        self._confirmed_at = started

    def _current(self) -> LockRecord | None:
        """The record under the file's name, which may be another file by now. Raises OSError."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return read_record(descriptor)
        finally:
            os.close(descriptor)

    def _is_own(self, record: LockRecord | None) -> bool:
        return record is not None and record.token == self._record.token

    def _restore(self) -> None:
        """Create the file again, which somebody removed.

        Raises:
            LockLost: this process was away for so long that another run may have taken the lock over, and ended.
            OSError: another process is faster.
        """
        if _now() - self._confirmed_at > FRESH_SECONDS:
            raise LockLost(None)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before, self._descriptor = self._descriptor, descriptor
        os.close(before)
        self._put(self._record)
        logs.get_logger().warning("%s was removed while this run uses the folder; it is written again", self._path)

    def _put(self, record: LockRecord) -> None:
        content = record.as_bytes()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))
        if not self._mount.is_local:
            os.fsync(self._descriptor)

    def _loss(self, owner: LockRecord | None) -> str:
        who = "another run" if owner is None else owner.named()
        if not self._is_settled:
            return f"--save_dir {self._path.parent}: {who} is writing to it; {WAIT_OR_STOP}, or give another folder"
        mine = f"the lock of this process on {self._record.host}, which had not renewed it"
        what = f"{who} has taken over {mine}" if owner else f"{mine}, was removed, perhaps by a run that has ended"
        return (
            f"--save_dir {self._path.parent}: {what}; this run ends and writes nothing more. Keep one run, or continue "
            f"later with --resume auto"
        )

    def _end_process(self, owner: LockRecord | None) -> NoReturn:
        text = f"{Path(sys.argv[0]).name}: error: {self._loss(owner)}"
        report_to_torchrun(text)
        report_line(text)
        os._exit(1 if self._is_settled else 2)


def _now() -> float:
    return time.clock_gettime(CLOCK)
