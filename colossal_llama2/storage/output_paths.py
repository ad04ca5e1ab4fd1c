"""Whether a command can write where its flags say, found before it does anything else."""

import os
import stat
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import check_can_create


def check_output_folder(path: Path, flag: str) -> None:
    """Raise a UserError unless there is such a folder to write to, or one can be made."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{flag} {path}: is {_kind(path)}, a folder allowed; name another")
    check_can_create(path, flag)


def check_output_file(path: Path, flag: str) -> None:
    """Raise a UserError unless there is such a regular file to replace, or one can be made."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{flag} {path}: is {_kind(path)}, a file allowed; name another")
    check_can_create(path, flag)
    if path.is_file():
        # It is replaced, and what replaces it is made beside it.
        check_can_create(path.absolute().parent, flag)


def check_apart(one: Path, flag: str, other: Path, other_flag: str) -> None:
    """Raise a UserError if a file is also the path of another output, or a folder on the way to it.

    Args:
        one: the file; `other` may be a file or a folder.
    """
    file, place = (Path(os.path.realpath(path)) for path in (one, other))
    if file == place:
        raise UserError(f"{flag} {one}: is {other_flag} too; name two")
    if file in place.parents:
        raise UserError(f"{flag} {one}: would be a folder above {other_flag} {other}; name another file")


def _kind(path: Path) -> str:
    if not path.exists():
        return "a link that leads nowhere"
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a file" if stat.S_ISREG(mode) else "a device, a pipe or a socket"
