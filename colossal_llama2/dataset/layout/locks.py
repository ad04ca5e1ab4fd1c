"""Locks on files (flock), by which runs keep out of each other's folders.

A lock ends with its process, however that ends. NFS has such locks between machines from Linux 2.6.12 on, and wants a
file that is open for writing.
"""

import fcntl
import os
from contextlib import ExitStack, suppress
from pathlib import Path

from colossal_llama2.errors import UserError


class RefusedError(UserError):
    """A run that may not touch what is there: another one is at work, or what it left was made of something else."""


def hold(stack: ExitStack, path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Hold the lock on a file until the stack closes. The file is made, and removed by the last that held it.

    Args:
        shared: others may hold it in this way too.
        wait: until no other holds it, in place of being refused.

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
            raise RefusedError(f"another run is at work in {path}; wait for it, or name other folders")
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is on a file system without locks ({error.strerror}), which keep two runs apart; name "
                "folders on another, or mount it with locks"
            )
        if _is_still(path, descriptor):
            stack.callback(_release, path, descriptor)
            return
        os.close(descriptor)  # of a run that ended in between, and removed the file


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
