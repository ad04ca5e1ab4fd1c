"""Repeated keys in lines of any form: refused where the value is read, whatever the texts beside them contain."""

import json

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from colossal_llama2.corpus import repeated_keys
from colossal_llama2.corpus.repeated_keys import refuse_repeated_keys
from colossal_llama2.storage.row_errors import RowError

KEYS = st.sampled_from(["target", "text", "id", "messages", "from", 'a "key"', "é", ""])
TEXTS = st.lists(st.sampled_from(['"', "\\", 'a"b', '"target": "x"', "文", "\n", "", "/"]), max_size=4).map("".join)
SCALARS = TEXTS | st.sampled_from([1, 1.5, True, None])
# An object is a list of (key, value), so that keys can repeat.
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.lists(st.tuples(KEYS, inner), max_size=3)
)
LINES = st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=6)


def written(value, escape: str) -> str:
    """The JSON text of a value, with its quotes written as `escape`."""
    if isinstance(value, list):
        return "{" + ", ".join(f"{written(key, escape)}: {written(inner, escape)}" for key, inner in value) + "}"
    if isinstance(value, tuple):
        return "[" + ",".join(written(inner, escape) for inner in value) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    characters = (escape if character == '"' else json.dumps(character)[1:-1] for character in value)
    return f'"{"".join(characters)}"'


def is_refused(line: bytes) -> bool:
    try:
        refuse_repeated_keys(line, orjson.loads(line))
    except RowError:
        return True
    return False


@settings(max_examples=500, deadline=None)
@given(LINES, st.sampled_from(['\\"', "\\u0022"]))
# Two quotes that are escaped by number are as many as those of the repeated key.
@example([("target", '""'), ("target", '""')], "\\u0022")
@example([("target", "a"), ("target", "b")], '\\"')
@example([("messages", ([("from", "a"), ("from", "b")],))], '\\"')
def test_the_quick_look_refuses_what_a_second_parse_refuses(pairs, escape):
    line = written(pairs, escape).encode()
    with pytest.MonkeyPatch.context() as patch:
        quick = is_refused(line)
        patch.setattr(repeated_keys, "_has_all_quotes", lambda line, record: False)
        assert quick == is_refused(line)


@pytest.mark.parametrize(
    "line, refused",
    [
        (b'{"target": "a", "target": "a"}', True),
        (b'{"target": "\\u0022\\u0022\\u0022", "tar\\u0067et": ""}', True),
        (b'{"target": "\\"target\\": \\"x\\"", "id": "\\u0022"}', False),
        (b'{"target": "a", "meta": {"id": 1, "id": 2}}', False),
        (b'{"messages": [{"from": "human", "content": "a", "content": "b"}]}', True),
        (b'{"messages": [{"from": "human", "content": [{"text": "a", "text": "b"}]}]}', True),
    ],
)
def test_repeated_keys_are_refused_where_they_are_read(line, refused):
    assert is_refused(line) is refused
