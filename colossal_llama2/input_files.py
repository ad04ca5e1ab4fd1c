"""Files that somebody else wrote: opened only if they are regular files of a plausible size, and parsed strictly.

A folder from a stranger may have a FIFO, a device or a directory under any name, or a file of any size. Opening one of
them can wait for ever or fill the memory, so each is looked at before it is opened. A link to a regular file is a
regular file: the caches of Hugging Face are made of links.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, List, Tuple

from colossal_llama2.errors import UserError

MIB = 2**20
# Settings, indexes of shards and added tokens are far smaller; the largest tokenizer.json in use has 33 MB.
JSON_BYTES = 128 * MIB
ANY_SIZE = 2**63 - 1
MAX_NESTING = 100
KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def check_regular(path: Path, *, max_bytes: int = JSON_BYTES) -> None:
    """Check that a file can be opened and read to its end, without opening it.

    Raises:
        UserError: it is missing, no regular file, empty, or larger than `max_bytes`.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again from its source")
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in KINDS.items() if is_kind(found.st_mode)), "something else")
        raise UserError(f"{path}: is {kind}, not a regular file; remove it, or copy the file again from its source")
    # Files of /proc say that they are empty, and some never end.
    if found.st_size == 0:
        raise UserError(f"{path}: is empty; copy it again from its source")
    if found.st_size > max_bytes:
        raise UserError(
            f"{path}: has {found.st_size:,} bytes, at most {max_bytes:,} are read of such a file; "
            f"copy it again from its source"
        )


def is_regular(path: Path) -> bool:
    """Whether there is a regular file, perhaps by a link. Raises UserError for anything else of that name."""
    if not os.path.lexists(path):
        return False
    check_regular(path, max_bytes=ANY_SIZE)
    return True


def read_settings(path: Path) -> dict:
    """The object in a JSON file of settings that other programs read too, such as config.json.

    Raises:
        UserError: the file cannot be read, or is not an object in JSON of RFC 8259. Python's own parser also takes NaN,
            Infinity, a key twice, and a byte order mark, which others refuse or understand in another way.
    """
    check_regular(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again from its source")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 at byte {error.start + 1}; save it as UTF-8")
    if text.startswith("\ufeff"):
        raise UserError(f"{path}: begins with a byte order mark; save it as UTF-8 without one")
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        content = None
    except ValueError as error:
        raise UserError(f"{path}: is not a JSON object ({error}); copy it again from its source")
    if content is None or _is_deeper(content, MAX_NESTING):
        raise UserError(f"{path}: is nested deeper than {MAX_NESTING} levels; copy it again from its source")
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; copy it again from its source")
    return content


def shown(value: Any) -> str:
    """A value of a JSON file for a message: shortened, and without control characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: List[Tuple[str, Any]]) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {shown(key)} is there twice, with two values")
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    level = [value]
    for _ in range(levels):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
