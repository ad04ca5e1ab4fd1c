"""JSON from untrusted sources: only regular files, of bounded size and depth, with numbers checked.

A file of a received folder may be a FIFO, link to a device, have gigabytes, or be nested so deeply that recursive code
runs out of stack. Every problem is a ValueError with the reason; the caller adds the file's name and the fix.

jsonschema and pydantic check parsed values; they do not limit the size or depth of the text, and do not see repeated
names.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, TypeGuard

MAX_BYTES = 64 << 20
MAX_VALUES = 4_000_000
MAX_DEPTH = 64
# Digits of a whole number: any such number fits into a float. LLaMA-2's own tokenizer_config.json has one of 31 digits
# (model_max_length). The code that uses a number checks its range.
MAX_DIGITS = 300
MAX_WHOLE = 2**53
SHOWN_CHARACTERS = 80


def read_object(path: Path, *, unique_names: bool = True) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds anything else.
        OSError: it cannot be read.
    """
    content = parse(read_regular(path), unique_names=unique_names)
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object but a {type(content).__name__}")
    return content


def read_regular(path: Path, *, most_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file, possibly behind a link. ValueError for any other file, and for a larger one."""
    # Opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > most_bytes:
            raise ValueError(f"{status.st_size:,} bytes, at most {most_bytes:,} allowed")
        return file.read(most_bytes)


def parse(
    content: bytes, *, unique_names: bool = True, most_values: int = MAX_VALUES, allows_constants: bool = True
) -> Any:
    """The value in a JSON text, in UTF-8 with or without a byte order mark.

    Args:
        unique_names: refuse an object that has a name twice, with two values.
        allows_constants: accept NaN, Infinity and -Infinity, which Python writes and RFC 8259 does not allow.

    Raises:
        ValueError: it is not JSON, or too large, or nested too deeply.
    """
    # In memory, a value may be a hundred times larger than its text.
    if content.count(b",") > most_values or content.count(b"[") + content.count(b"{") > most_values:
        raise ValueError(f"more than {most_values:,} values")
    try:
        text = content.decode("utf-8-sig")
        hooks: dict[str, Any] = {"object_pairs_hook": _unique} if unique_names else {}
        if not allows_constants:
            hooks["parse_constant"] = _refuse_constant
        value = json.loads(text, parse_int=_whole, **hooks)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1:,}")
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})")
    except RecursionError:
        raise ValueError("nested too deeply")
    _check_depth(value)
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(f"the name {shown(name)} occurs twice in one object, with two values")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = (list(item.values()) if isinstance(item, dict) else item for item in level)
        level = [inner for items in nested if isinstance(items, list) for inner in items]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value of JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return is_whole(value) or isinstance(value, float) and math.isfinite(value)


def whole_number(content: dict[str, Any], name: str, *, least: int = 0, most: int = MAX_WHOLE) -> int:
    """The whole number of that name. KeyError if there is none, ValueError for anything else and out of the range."""
    value = content[name]
    if not is_whole(value) or not least <= value <= most:
        raise ValueError(f"{name} is {shown(value)}, a whole number from {least} to {most} allowed")
    return value


def number(content: dict[str, Any], name: str, *, least: float = 0.0) -> float:
    """The finite number of that name. KeyError if there is none, ValueError for anything else and for a smaller one."""
    value = content[name]
    if not is_finite(value) or value < least:
        raise ValueError(f"{name} is {shown(value)}, a number of at least {least:g} allowed")
    return float(value)


def typed(content: dict[str, Any], name: str, kind: type) -> Any:
    """The value of that name, of one of JSON's types. KeyError if there is none, ValueError for one of another type."""
    value = content[name]
    if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
        raise ValueError(f"{name} is {shown(value)}, {JSON_NAMES[kind]} allowed")
    return value


JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}


def shown(value: Any) -> str:
    """A value as JSON for a message, truncated if it is long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
