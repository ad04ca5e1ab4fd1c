"""Where records and lines begin and end, against Python's own json and text files, for blocks of any size."""

import io
import json

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from colossal_llama2.corpus.data_files import InputFile, Span
from colossal_llama2.corpus.json_stream import BrokenDocumentError, RecordReader, layout_of
from colossal_llama2.corpus.row_reader import SpanReader
from colossal_llama2.storage import lines as lines_module
from colossal_llama2.storage.files import parse_object
from colossal_llama2.storage.lines import LineCounter, LineReader

BREAKS = ("\n", "\r\n", "\r")
TEXTS = st.text(st.sampled_from('a"\\{}[],: \n\r\u2028é你'), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(TEXTS, VALUES, max_size=3)


class Blocks:
    """A stream that returns a few bytes at a time."""

    def __init__(self, content: bytes, size: int):
        self._stream, self._size = io.BytesIO(content), size

    def read1(self, size: int) -> bytes:
        return self._stream.read(min(size, self._size))


def read_all(content: bytes, size: int, *, is_array: bool):
    """Records with their lines, and the error that ended the reading early."""
    reader, found = RecordReader(Blocks(content, size), is_array=is_array), []
    try:
        while (record := reader.read()).size:
            found.append((json.loads(record.content), record.line))
    except BrokenDocumentError as error:
        return found, error
    return found, None


def written(values, *, indent, line_break: str, ascii_only: bool) -> str:
    return json.dumps(values, indent=indent, ensure_ascii=ascii_only).replace("\n", line_break)


SPACE = st.sampled_from(["", " ", "\n", "\r\n", "\r", " \n\t"])


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, max_size=4), st.integers(1, 40), st.sampled_from(["", "\ufeff", " \r\n"]), SPACE, st.data())
def test_an_array_gives_what_json_gives(values, size, before, space, data):
    indent, line_break = data.draw(st.sampled_from([(None, ""), (0, "\n"), (2, "\r\n"), (1, "\r")]))
    style = {"indent": indent, "line_break": line_break, "ascii_only": data.draw(st.booleans())}
    content, lines, ends = (before + "[" + space).encode(), [], []
    for number, value in enumerate(values):
        content += ("," + space if number else "").encode()
        lines.append(1 + content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n"))
        content += (written(value, **style) + space).encode()
        ends.append(len(content) - len(space) + (value is None or isinstance(value, (int, float))))
    content += b"]"
    assert json.loads(content.decode().removeprefix("\ufeff")) == values
    found, error = read_all(content + data.draw(st.sampled_from([b"", b"\n", b" \r "])), size, is_array=True)
    assert error is None and found == list(zip(values, lines, strict=True))
    # Cut anywhere, complete records are read and the rest is reported.
    stop = data.draw(st.integers(len(before.encode()) + 1, len(content) - 1))
    kept, error = read_all(content[:stop], size, is_array=True)
    assert error is not None and kept == found[: sum(end <= stop for end in ends)]


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS.filter(bool), min_size=1, max_size=4), st.integers(1, 40), st.sampled_from(BREAKS))
@example([{"a": 1}, {}], 1, "\n")
def test_objects_one_after_the_other(records, size, line_break):
    texts = [written(record, indent=1, line_break=line_break, ascii_only=False) for record in records]
    content = line_break.join(texts).encode()
    assert layout_of(content) == "objects"
    found, error = read_all(content, size, is_array=False)
    assert error is None and [value for value, _ in found] == records
    starts = [1 + sum(text.count(line_break) + 1 for text in texts[:number]) for number in range(len(texts))]
    assert [line for _, line in found] == starts
    marked = "\n".join("\ufeff" + text for text in texts).encode()
    assert [value for value, _ in read_all(marked, size, is_array=False)[0]] == records


@pytest.mark.parametrize(
    "text, words, records, line",
    [
        ('[{"a": 1},\n{"a": ', "cut off inside the record", 1, 2),
        ('[{"a": "x}, {"a": 1}]', "cut off inside the record", 0, 1),
        ('[{"a": 1}\n', '"]" is missing', 1, 2),
        ("[", '"]" is missing', 0, 1),
        ('[{"a": 1},\r]', "a comma without a record", 1, 2),
        ('[{"a": 1} {"a": 2}]', 'expected "," or "]"', 1, 1),
        ('[{"a": [1}, {"a": 2}]', "do not match", 0, 1),
        ('[{"a": 1}]\n\n{"a": 2}', "there is text after", 1, 3),
        ('[{"a": 1}, , {"a": 2}]', "a record should begin here, not", 1, 1),
    ],
)
def test_a_broken_array_is_reported_with_its_line(text, words, records, line):
    for size in (1, 5, 100):
        found, error = read_all(text.encode(), size, is_array=True)
        assert words in str(error) and (len(found), error.line) == (records, line)


def test_a_bad_record_does_not_end_the_file():
    text = b'[{"a": tru}, {"a": "\n"}, 3, nul, "x", [1, 2], {"a": 2}]'
    reader, found = RecordReader(Blocks(text, 3), is_array=True), []
    while (record := reader.read()).size:
        try:
            found.append(parse_object(record.content, "record"))
        except ValueError as error:
            found.append(str(error))
    assert found[-1] == {"a": 2} and len(found) == 7
    assert all("each record must be one JSON object" in problem for problem in found[:-1])


def test_a_record_is_held_only_up_to_the_limit():
    text = json.dumps([{"a": "x" * 41}, {"a": "x" * 5000}, {"a": "x" * 41}, {"b": 1}]).encode()
    reader = RecordReader(Blocks(text, 7), is_array=True, max_bytes=50)
    assert [reader.read().content is not None for _ in range(4)] == [True, False, True, True]


@pytest.mark.parametrize(
    "text, layout",
    [
        ('{"a": 1}\n{"a": 2}\n', "lines"),
        ("", "lines"),
        (' \n\ufeff{"a": 1}', "lines"),
        ('{"a": "cut\n{"a": 2}\n', "lines"),
        ('{"a": [1,\n{"a": 2}\n{"a": 3}\n', "lines"),
        ('{"a": 1,\n"b": 2}\n', "objects"),
        ('\ufeff{\r\n "a": 1', "objects"),
        ('{"a": 1}', "lines"),
        ('\ufeff [{"a": 1}]', "array"),
        ("[", "array"),
        ('[{"a": 1}]\n[{"a": 2}]\n', "lines"),
        ('[{"a": 1},\n{"a": 2}]\n', "array"),
    ],
)
def test_how_a_text_holds_records(text, layout):
    assert layout_of(text.encode()) == layout


@hypothesis_settings(max_examples=120, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", " ", "\t", "\n", "\r", "\r\n"]), max_size=40), st.integers(1, 9))
def test_lines_are_those_of_python(parts, size):
    text = "".join(parts)
    reader, found = LineReader(Blocks(text.encode(), size)), []
    while (line := reader.read()).size:
        found += [line.content.decode().rstrip("\r\n")] if line.count == 1 and line.content else [""] * line.count
    expected = [line.rstrip("\n") for line in io.TextIOWrapper(io.BytesIO(text.encode()))]
    assert [line.strip() for line in found] == [line.strip() for line in expected]
    counter = LineCounter()
    for start in range(0, len(text), size):
        counter.add(text[start : start + size].encode())
    assert counter.count == text.count("\n") + text.count("\r") - text.count("\r\n")


@hypothesis_settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["\n", "\r\n", "\r", "\n\n", " \r\r\n"])), max_size=12),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_ranges_give_each_line_once_with_its_number(tmp_path_factory, lines, step, block):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "ranges.jsonl"
    path.write_bytes("".join(json.dumps({"a": "x" * length}) + end for length, end in lines).encode())
    size = path.stat().st_size
    file = InputFile(str(path), "in", size, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("colossal_llama2.corpus.row_reader.READ_BYTES", block)
        patch.setattr(lines_module, "READ_BYTES", block)
        found, numbers = [], []
        for start in range(0, size, step):
            reader = SpanReader(file, Span(0, start, min(start + step, size)))
            for line in reader:
                found.append(line)
                numbers.append(reader.line_number(line.number))
    whole = list(SpanReader(file, Span(0, 0, None)))
    assert [line.record for line in found if line.record] == [line.record for line in whole if line.record]
    assert [number for line, number in zip(found, numbers, strict=True) if line.record] == [
        line.number for line in whole if line.record
    ]
    assert sum(line.count for line in found) == sum(line.count for line in whole)
