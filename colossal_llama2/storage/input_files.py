"""Untrusted files: opened only if they are regular files of a plausible size, and parsed strictly.

A received folder may have a FIFO, a device or a directory under any name, or a file of any size. Opening one can hang
or fill the memory, so each is checked before it is opened. A link to a regular file counts as a regular file: Hugging
Face's caches are made of links.
"""

import codecs
import os
import stat
from pathlib import Path

from colossal_llama2.errors import PERMISSION_CURE, UserError
from colossal_llama2.storage import json_input

MIB = 2**20
# Settings, indexes of shards and added tokens are far smaller; the largest tokenizer.json in use is 33 MB.
JSON_BYTES = 128 * MIB
ANY_SIZE = 2**63 - 1
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def check_regular(path: Path, *, max_bytes: int = JSON_BYTES, allows_empty: bool = False) -> None:
    """Check that a file can be opened and read to its end, without opening it.

    Raises:
        UserError: it is missing, not a regular file, empty (unless `allows_empty`), larger than `max_bytes`, or this
            user may not read it.
    """
    try:
        found = os.stat(path)
    except PermissionError:
        raise UserError(f"{path}: this user may not enter a folder above it{PERMISSION_CURE}")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again from its source")
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in KINDS.items() if is_kind(found.st_mode)), "something else")
        raise UserError(f"{path}: is {kind}, not a regular file; remove it, or copy the file again from its source")
    # Files of /proc report a size of 0, and some never end.
    if found.st_size == 0 and not (allows_empty and found.st_dev == os.stat(path.parent).st_dev):
        raise UserError(f"{path}: is empty; copy it again from its source")
    if found.st_size > max_bytes:
        raise UserError(
            f"{path}: has {found.st_size:,} bytes, at most {max_bytes:,} are allowed for such a file; "
            f"copy it again from its source"
        )
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UserError(f"{path}: this user may not read it{PERMISSION_CURE}")


def is_regular(path: Path) -> bool:
    """Whether the file exists. Raises UserError if something of that name is not a regular file or a link to one."""
    if not os.path.lexists(path):
        return False
    check_regular(path, max_bytes=ANY_SIZE)
    return True


def read_settings(path: Path, *, allows_mark: bool = False) -> dict:
    """The object in a JSON settings file.

    Args:
        allows_mark: accept a byte order mark. Off for files that libraries open too, since they would fail; on for
            config.json and generation_config.json, which only this package reads here, and rewrites.

    Raises:
        UserError: the file cannot be read, or is not a JSON object as in RFC 8259. Python's own parser also accepts
            NaN, Infinity, and repeated keys with different values, which others refuse or read differently.
    """
    check_regular(path)
    try:
        content = path.read_bytes()
        if not allows_mark and content.startswith(codecs.BOM_UTF8):
            raise ValueError("begins with a byte order mark")
        settings = json_input.parse(content, allows_constants=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again from its source")
    except ValueError as error:
        raise UserError(f"{path}: is not a JSON object in UTF-8 ({error}); copy it again from its source")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: is not a JSON object; copy it again from its source")
    return settings
