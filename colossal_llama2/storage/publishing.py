"""Publish a folder under its final name only when it is complete and on the disk, possibly replacing an old one.

A command writes to `temporary_folder(target.parent, target.name)`, claims it, and publishes it when it is complete:

    remove_leftovers(target)
    with temporary_folder(target.parent, target.name) as folder, claimed(folder):
        ...
        publish(folder, target, replace=overwrite)

No package does this. filelock locks files that it creates, while here the folder itself is locked, so that no lock file
is published; os.rename cannot exchange two folders, so renameat2 is called.
"""

import ctypes
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import discard, sync, sync_entries

AT_FDCWD = -100
RENAME_EXCHANGE = 2
# Number of files of a model with its tokenizer, at most.
LEAST_FILES = 16


def remove_leftovers(target: Path) -> None:
    """Remove what a killed run left beside or inside `target`; if the new folder is missing, restore the old one.

    Raises UserError if another run is still writing to the same target.
    """
    leftover = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    found = [
        Path(entry.path)
        for place in (target.parent, target)
        if place.is_dir()
        for entry in os.scandir(place)
        if leftover.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    ]
    for folder in found:
        if folder.suffix == ".old" and not os.path.lexists(target):
            os.rename(folder, target)
            logs.get_logger().info("an earlier run was killed while replacing %s; its old content is restored", target)
            continue
        with claimed(folder):
            logs.get_logger().info("removing %s, left behind by an earlier run that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder; the lock ends with the process. Raises UserError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {folder}; wait until it ends, or stop it")
        except OSError:
            pass  # a file system without locks: two runs with the same target cannot be detected
        yield
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raise RunError unless `needed` bytes are free on the disk of `folder`, which need not exist yet."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    inodes = os.statvfs(place)
    # A file system that creates inodes on demand reports none at all.
    if inodes.f_files and inodes.f_favail < LEAST_FILES:
        raise RunError(
            f"{place} has room for only {counted(inodes.f_favail, 'more file')} (inodes, see df -i), {LEAST_FILES} are "
            "needed; nothing was written. Remove files, or give a folder on another disk"
        )
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"{needed:,} bytes are needed in {place}, {free:,} bytes are free; nothing was written. "
            "Free space, or give a folder on another disk"
        )


def publish(folder: Path, target: Path, *, replace: bool) -> None:
    """Give a complete folder its final name in the same parent folder, atomically.

    With `replace`, an existing target is exchanged for the new folder and then removed. Without, an existing target is
    an OSError.
    """
    sync(folder)
    if not (replace and os.path.lexists(target)):
        os.rename(folder, target)
    elif not _exchange(folder, target):
        _rename_in_two_steps(folder, target)
    else:
        discard(folder)
    sync_entries(target.parent)


def publish_into(folder: Path, target: Path, *, last: str) -> None:
    """Move the entries of a complete folder into an existing one, the entry named `last` last."""
    sync(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.name == last:
            sync_entries(target)
        os.rename(path, target / path.name)
    sync_entries(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically; False if the C library or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and 0 == rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def _rename_in_two_steps(folder: Path, target: Path) -> None:
    """Replace `target`. If killed in between, it is missing until `remove_leftovers` restores the old one."""
    old = folder.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(folder, target)
    except BaseException:
        with suppress(OSError):
            os.rename(old, target)
        raise
    discard(old)
