"""Locks on files (flock) that keep two runs out of the same folders.

A lock ends with its process, however the process ends. NFS supports such locks between machines since Linux 2.6.12, and
needs a file that is open for writing.

The filelock package does not fit: its file locks are exclusive only, leave the lock file behind, and fall back to a
file without a lock where the file system has none.
"""

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from colossal_llama2.errors import UserError


class RefusedError(UserError):
    """A run must not change the folder: another run is active, or an earlier one had other input or settings."""


def hold(stack: ExitStack, path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Hold the lock on a file until the stack closes. The file is created; the last holder removes it.

    Args:
        shared: other runs may hold a shared lock at the same time.
        wait: wait for other holders instead of raising.

    Raises:
        RefusedError: another run holds it.
        UserError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError:
            if path.is_symlink() or path.is_dir():
                found = "a link" if path.is_symlink() else "a folder"
                raise RefusedError(f"{path} is {found}, not a lock file; remove it")
            raise
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise RefusedError(f"another run is using {path}; wait for it, or give other folders")
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is on a file system without locks ({error.strerror}), which prevent two runs from "
                "using one folder; give folders on another one, or mount it with locks"
            )
        if _is_still(path, descriptor):
            stack.callback(_release, path, descriptor)
            return
        os.close(descriptor)  # another run ended in between and removed the file


def _is_still(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    return False


def _release(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(path, descriptor):
            path.unlink()
    os.close(descriptor)
