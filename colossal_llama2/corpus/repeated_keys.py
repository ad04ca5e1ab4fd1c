"""Refuse repeated keys in an object where the value is used: parsers silently keep one of the values.

{"target": "a", "target": "b"}               refused
{"target": "a", "meta": {"id": 1, "id": 2}}  read, because "meta" is ignored
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from colossal_llama2.corpus.message_formats import LISTS, USED_IN_MESSAGE, USED_IN_PART, USED_IN_RECORD
from colossal_llama2.storage.row_errors import RowError

# With more keys, searching the line for each one takes longer than parsing it again.
MAX_FLAT_KEYS = 16
PRETRAINING_FIELDS = frozenset(("source", "target", "text"))
REPEATED = "a repeated key"


class _Repeating(dict):
    """An object with repeated keys, listed in `repeated`."""

    repeated: frozenset[str] = frozenset()


def refuse_repeated_keys(line: bytes, record: dict[str, Any]) -> None:
    """Raise RowError if a key that is read is repeated in a line's record, in a message or in a part of its text.

    A flat record whose line contains each key once, without escapes, is not parsed a second time.
    """
    for key, value in record.items() if len(record) <= MAX_FLAT_KEYS else ():
        if isinstance(value, (dict, list)) or line.count(_quoted(key)) != 1:
            break
    else:
        if len(record) <= MAX_FLAT_KEYS and b"\\u00" not in line:
            return
    found: list[_Repeating] = []

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
        unique = dict(pairs)
        if len(unique) == len(pairs):
            return unique
        repeating = _Repeating(unique)
        times = Counter(key for key, _ in pairs)
        repeating.repeated = frozenset(key for key, count in times.items() if count > 1)
        found.append(repeating)
        return repeating

    parsed = json.loads(line, object_pairs_hook=unique_keys)
    if not found:
        return
    for value, used in _used_objects(parsed):
        repeated = sorted(value.repeated & used) if isinstance(value, _Repeating) else []
        if repeated:
            raise RowError(f"the key {repeated[0]!r:.80} is repeated; each key must be unique", reason=REPEATED)


def _used_objects(record: dict[str, Any]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yield the objects that readers use, each with the keys that they read."""
    yield record, USED_IN_RECORD | PRETRAINING_FIELDS
    for messages in (record.get(name) for name in LISTS):
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict):
                continue
            yield message, USED_IN_MESSAGE
            for parts in message.values():
                yield from ((part, USED_IN_PART) for part in (parts if isinstance(parts, list) else ()))


@lru_cache(maxsize=16)
def _quoted(key: str) -> bytes:
    """A key as it is written in a line, unless it contains escapes."""
    return f'"{key}"'.encode()
