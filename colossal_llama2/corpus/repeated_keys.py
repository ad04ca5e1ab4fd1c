"""Refuse repeated keys in an object where the value is used: parsers silently keep one of the values.

{"target": "a", "target": "b"}               refused
{"target": "a", "meta": {"id": 1, "id": 2}}  read, because "meta" is ignored
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from colossal_llama2.corpus.message_formats import LISTS, USED_IN_MESSAGE, USED_IN_PART, USED_IN_RECORD
from colossal_llama2.storage.row_errors import RowError

PRETRAINING_FIELDS = frozenset(("source", "target", "text"))
REPEATED = "a repeated key"


class _Repeating(dict):
    """An object with repeated keys, listed in `repeated`."""

    repeated: frozenset[str] = frozenset()


def refuse_repeated_keys(line: bytes, record: dict[str, Any], *, also_used: Collection[str] = ()) -> None:
    """Raise RowError if a key that is read is repeated in a line's record, in a message or in a part of its text.

    Args:
        also_used: keys of the record that this reader uses besides those of documents and conversations.
    """
    if _has_all_quotes(line, record):
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
    for value, used in _used_objects(parsed, USED_IN_RECORD | PRETRAINING_FIELDS | set(also_used)):
        repeated = sorted(value.repeated & used) if isinstance(value, _Repeating) else []
        if repeated:
            raise RowError(f"the key {repeated[0]!r:.80} is repeated; each key must be unique", reason=REPEATED)


def _used_objects(record: dict[str, Any], used_in_record: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yield the objects that readers use, each with the keys that they read."""
    yield record, used_in_record
    for messages in (record.get(name) for name in LISTS):
        for message in messages if isinstance(messages, list) else ():
            if not isinstance(message, dict):
                continue
            yield message, USED_IN_MESSAGE
            for parts in message.values():
                yield from ((part, USED_IN_PART) for part in (parts if isinstance(parts, list) else ()))


def _has_all_quotes(line: bytes, record: dict[str, Any]) -> bool:
    """Whether all quotes of a line are those of its parsed record: then the parser has dropped no key and no value.

    A line has two quotes around each key and each text, and one for each quote in them, which is written \\" (or
    \\u0022, for which this returns False). A repeated key adds at least its own two. This takes a tenth of the time of
    parsing the line again.
    """
    texts: list[str] = []
    inner: list[Any] = [record]
    while inner:
        values = inner.pop()
        if isinstance(values, dict):
            texts += values
            values = values.values()
        for value in values:
            if isinstance(value, str):
                texts.append(value)
            elif isinstance(value, (dict, list)):
                inner.append(value)
    inside = line.count(b'"') - 2 * len(texts)
    if not inside:
        return True
    return inside == sum(text.count('"') for text in texts) and b"\\u0022" not in line
