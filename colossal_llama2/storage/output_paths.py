"""Check that a command can write to the paths in its flags, before it does anything else."""

import os
import stat
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import check_can_create


def check_output_folder(path: Path, flag: str) -> None:
    """Raise a UserError unless the path is a writable folder, or can be created as one."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{flag} {path}: is {_kind(path)}, not a folder; give another path")
    check_can_create(path, flag)


def check_output_file(path: Path, flag: str) -> None:
    """Raise a UserError unless the path is a regular file that can be replaced, or can be created as one."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{flag} {path}: is {_kind(path)}, not a file; give another path")
    check_can_create(path, flag)
    if path.is_file():
        # It is replaced by a file that is created beside it.
        check_can_create(path.absolute().parent, flag)


def check_apart(one: Path, flag: str, other: Path, other_flag: str) -> None:
    """Raise a UserError if a file is also the path of another output, or of a folder above it.

    Args:
        one: the file; `other` may be a file or a folder.
    """
    file, place = (Path(os.path.realpath(path)) for path in (one, other))
    if file == place:
        raise UserError(f"{flag} {one}: is the same path as {other_flag}; give two paths")
    if file in place.parents:
        raise UserError(f"{flag} {one}: would have to be a folder above {other_flag} {other}; give another file")


def _kind(path: Path) -> str:
    if not path.exists():
        return "a broken link"
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a device, a pipe or a socket"
