"""Input files as users have them: every form and compression, wrong names, damage, and what is left out."""

import bz2
import datetime
import decimal
import gzip
import importlib.util
import json
import lzma
import os
import random
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest

from colossal_llama2.corpus import data_files, decompression, row_reader
from colossal_llama2.corpus.data_files import Span, find_inputs
from colossal_llama2.corpus.parquet_rows import read_parquet
from colossal_llama2.corpus.row_reader import SpanReader
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.tokenizer.text_sample import read_documents
from tests import tiny
from tests.preparing import flags, manifest, pieces_of, read_jsonl, settings, write_lines

RECORDS = [{"target": text, "meta": {"n": [number, None]}} for number, text in enumerate(tiny.english_documents()[:30])]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACKERS = {
    "": lambda content: content,
    "gz": gzip.compress,
    "zst": zstd,
    "zstd": zstd,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
FORMS = {
    "jsonl": LINES,
    "NDJSON": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\n\xef\xbb\xbf", 1),
    "jl": LINES.replace(b"\n", b"\r"),
    "json": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "JSON": json.dumps(RECORDS, separators=(",", ":")).encode(),
    "lines.json": LINES,
    "pretty.json": b"\n".join(json.dumps(record, indent=1).encode() for record in RECORDS),
}


def put(folder, name: str, content: bytes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def read(folder) -> list:
    """The lines of all files of a folder, with blank ones left out."""
    files = data_files.find_input_files([str(folder)])
    lines = [line for number, file in enumerate(files) for line in SpanReader(file, Span(number, 0, None))]
    return [line for line in lines if line.record is not None or line.problem]


def prepared(folder, tokenizer_dir, output, **others) -> dict:
    keywords = settings([folder], tokenizer_dir, output, splicing="none", no_jsonl=False, **others)
    prepare.prepare_pretrain(**keywords)
    return manifest(output)


@pytest.mark.parametrize("packing", PACKERS)
def test_every_form_gives_the_same_records(packing, tmp_path):
    for name, content in FORMS.items():
        folder = tmp_path / name
        put(folder, f"data.{name}" + (f".{packing.upper()}" if packing else ""), PACKERS[packing](content))
        assert [line.record for line in read(folder)] == RECORDS
    # As written by `cat` and parallel compressors, and with padding at the end.
    if packing:
        parts = b"".join(map(PACKERS[packing], (LINES[:1000], b"", LINES[1000:])))
        path = put(tmp_path / "parts", f"data.jsonl.{packing}", parts)
        assert [line.record for line in read(path.parent)] == RECORDS
        # What follows is not a stream of this kind, and must not be ignored.
        path.write_bytes(parts + b"junk")
        *kept, lost = read(path.parent)
        assert [line.record for line in kept] == RECORDS and lost.is_lost and lost.number == len(RECORDS) + 1
        path.write_bytes(parts[:-9])
        *kept, lost = read(path.parent)
        assert lost.is_lost and kept and [line.record for line in kept] == RECORDS[: len(kept)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", gzip.compress(LINES), "gzip"),
        ("a.jsonl.gz", LINES, "plain text"),
        ("a.jsonl.zst", bz2.compress(LINES), "bzip2"),
        ("a.parquet", LINES, "plain text"),
        ("a.jsonl", FORMS["json"], "a JSON array"),
        ("a.ndjson", FORMS["pretty.json"], "JSON over several lines"),
        ("a.json.xz", "parquet", "parquet"),
    ],
)
def test_a_wrong_name_is_logged_and_the_content_counts(name, content, message, tmp_path, caplog):
    path = put(tmp_path / "in", name, b"")
    if content == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    else:
        path.write_bytes(content)
    caplog.set_level("INFO")
    assert [line.record for line in read(path.parent)] == RECORDS
    assert f"contradicts the file name: {path} ({message})" in caplog.text


def long_zstd(content: bytes) -> bytes:
    """A frame of stored blocks, whose header declares a window of 2 GiB."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3])
    for start in range(0, len(content), 1 << 16):
        block = content[start : start + (1 << 16)]
        is_last = start + (1 << 16) >= len(content)
        frame += (is_last | len(block) << 3).to_bytes(3, "little") + block
    return frame


def test_long_windows_of_zstd(tmp_path):
    skippable = b"\x51\x2a\x4d\x18\x02\0\0\0ab"
    path = put(tmp_path / "in", "a.jsonl.zst", skippable + zstd(LINES[:1000]) + long_zstd(LINES[1000:]))
    found = read(path.parent)
    if importlib.util.find_spec("backports") and importlib.util.find_spec("backports.zstd"):
        assert [line.record for line in found] == RECORDS
        path.write_bytes(path.read_bytes()[:-5])
        *kept, lost = read(path.parent)
        assert lost.is_lost and [line.record for line in kept] == RECORDS[:-1]
    else:
        cure = f"its zstd window is over 128 MiB; run: pip install {decompression.LONG_WINDOWS_PACKAGE}"
        assert found[-1].is_lost and found[-1].problem == cure
        assert [line.record for line in found[:-1]] == RECORDS[: len(found) - 1]


def test_what_is_left_out_is_named_with_its_cure(tokenizer_dir, tmp_path, caplog):
    folder = tmp_path / "in"
    put(folder, "a.jsonl", LINES)
    names = [*"a.txt b.csv c.tar.gz d.gz e.jsonl.lz4 f.jsonlines g.arrow h x.jsonl~".split(), ".hidden.jsonl"]
    for name in names:
        put(folder, name, b"x")
    put(folder / "below", "a.jsonl", LINES)
    written = prepared(folder, tokenizer_dir, tmp_path / "out")
    assert {entry["path"] for entry in written["left_out"]} == {str(folder / name) for name in [*names, "below"]}
    message = [record.message for record in caplog.records if record.message.startswith("not read: ")]
    assert len(message) == 1 and all(str(folder / name) in message[0] for name in [*names, "below"])
    for cure in ("in --data_input_dirs as well", "without the dot", "unpack it", "rename it to *.jsonl", "to Parquet"):
        assert cure in message[0]
    for number in range(50):
        put(folder, f"more{number}.txt", b"x")
    caplog.clear()
    find_inputs([str(folder)])
    assert "and 48 more (text;" in caplog.text and len(caplog.text) < 2000


@pytest.mark.parametrize("other", ["a.json", "a.JSONL", "a.parquet", "a.ndjson.bz2", "a.jl.xz", "a.jsonl.zstd"])
def test_copies_in_any_form_are_refused(other, tmp_path):
    for name in ("a.jsonl", other):
        put(tmp_path, name, LINES)
    put(tmp_path, "notes.txt", b"x")
    with pytest.raises(UserError, match=f"a.jsonl and .*{other}|{other} and .*a.jsonl") as caught:
        find_inputs([str(tmp_path)])
    assert "have the same name" in str(caught.value)


@pytest.mark.parametrize(
    "content, words",
    [
        (LINES.decode().encode("utf-16"), "UTF-16 text.*iconv -f UTF-16"),
        (LINES.decode().encode("utf-16-le"), "UTF-16 text.*iconv"),
        (LINES.decode().encode("utf-32"), "UTF-32 text.*iconv"),
        (gzip.compress(LINES.decode().encode("utf-16")), "UTF-16 text"),
        (gzip.compress(gzip.compress(LINES)), "compressed twice"),
        (b"PK\x03\x04" + LINES, "a zip archive; unpack it"),
        (gzip.compress(b"a".ljust(257, b"\0") + b"ustar\x0000" + LINES), "a tar archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"PAR1" + LINES, "Parquet file is cut short or damaged"),
        (lzma.compress(LINES, format=lzma.FORMAT_ALONE), "binary data, or text that is not UTF-8"),
        (lzma.compress(LINES)[:3], "binary data, or text that is not UTF-8"),
        (bytes(5000), "binary data"),
        ("你好\n".encode("gbk") * 90, "binary data, or text that is not UTF-8"),
    ],
)
@pytest.mark.parametrize("is_large", [False, True])
def test_a_file_that_cannot_be_read_is_named_with_its_cure(content, words, is_large, tmp_path):
    put(tmp_path, "a.jsonl", content)
    files = data_files.find_input_files([str(tmp_path)])
    (unit,) = data_files.units_of(files, 100 if is_large else 4 << 20)
    (line,) = SpanReader(files[0], unit.spans[0])
    assert line.is_lost and line.number == 1 and re.search(words, line.problem)
    with pytest.raises(UserError, match=f"a.jsonl:1: .*{words}"):
        list(read_documents([str(tmp_path)]))


@pytest.mark.parametrize("start", [b"\0\0\n", b"\xff\n", "好".encode() * 3000 + b"\n", b'{"a": "\xff"}\r\r'])
def test_bad_lines_at_the_start_are_bad_rows_and_no_lost_file(start, tmp_path):
    put(tmp_path, "a.jsonl", start + LINES)
    files = data_files.find_input_files([str(tmp_path)])
    lines = list(SpanReader(files[0], data_files.units_of(files)[0].spans[0]))
    assert not any(line.is_lost for line in lines) and lines[0].problem
    assert sum(line.record is not None for line in lines) == LINES.count(b"\n")


@pytest.mark.slow
def test_a_cut_array_is_a_lost_file_and_not_bad_rows(tokenizer_dir, tmp_path, run_script, caplog, capsys):
    whole = json.dumps(RECORDS, indent=1).encode()
    cut = put(tmp_path / "in", "cut.json", b'"target"'.join(whole.split(b'"target"')[:21]) + b'"tar')
    rest = put(tmp_path / "in", "rest.jsonl", LINES + b'{"text": 1}\n{"a": \n')
    broken_line = cut.read_text().count("\n", 0, cut.read_text().rindex("{")) + 1
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", splicing="none")
    words = f"{cut}:{broken_line}: the file is cut off inside the record that begins here, after 20 records"
    with pytest.raises(UserError, match=f"{words}.*--on_bad_file skip"):
        prepare.prepare_pretrain(**keywords)
    assert not (tmp_path / "out" / "arrow").exists()
    with pytest.raises(UserError, match="rest.jsonl:31"):
        prepare.prepare_pretrain(**keywords, on_bad_file="skip")
    with pytest.raises(RunError, match="1 of the input files could not be read to the end"):
        prepare.prepare_pretrain(**keywords, on_bad_row="skip")
    written = manifest(tmp_path / "out")
    assert [(lost["file"], lost["line"]) for lost in written["lost_files"]] == [(str(cut), broken_line)]
    assert written["total"]["documents"] == 50 and written["lines"] == 52 and written["bad_rows"] == 2
    assert written["bad_reasons"]["not JSON"] == 1
    message = capsys.readouterr().out
    assert "LOST FILES" in message and "bad rows: not JSON" in message and f"lost: {words}" in caplog.text
    skipped = [json.loads(line) for line in (tmp_path / "out" / "arrow" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in skipped] == [(str(rest), 31), (str(rest), 32)]
    # The command itself, on finished output.
    words_of_command = [*flags(keywords), "--on_bad_row", "skip", "--on_bad_file"]
    for on_bad_file, code in (("fail", 1), ("skip", 0)):
        done = run_script("prepare_pretrain_dataset.py", *words_of_command, on_bad_file)
        assert done.returncode == code and "nothing to do" in done.stderr and words in done.stderr


def test_files_that_cannot_be_opened_are_skipped_on_request(tokenizer_dir, tmp_path):
    put(tmp_path / "in", "a.jsonl", LINES)
    put(tmp_path / "in", "b.jsonl", b"")
    put(tmp_path / "in", "c.json", b"[ ]")
    os.mkfifo(tmp_path / "in" / "d.json")
    written = prepared(tmp_path / "in", tokenizer_dir, tmp_path / "out", on_bad_file="skip")
    assert [(os.path.basename(lost["file"]), lost["line"]) for lost in written["lost_files"]] == [
        ("b.jsonl", 0),
        ("d.json", 0),
        ("c.json", 0),
    ]
    assert written["total"]["documents"] == len(RECORDS)
    put(tmp_path / "empty", "b.jsonl", b"")
    with pytest.raises(UserError, match="none of the files can be read. The first: .*b.jsonl is empty"):
        prepared(tmp_path / "empty", tokenizer_dir, tmp_path / "none", on_bad_file="skip")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "stage, lines, words",
    [
        ("pretrain", [{"messages": [{"role": "user", "content": "q"}]}], "use prepare_sft_dataset.py"),
        ("pretrain", [b"plain text"], "not JSON"),
        ("pretrain", [b"[1]", b"[2]"], "a JSON list given"),
        ("sft", [{"target": "t"}], "use prepare_pretrain_dataset.py"),
    ],
)
def test_many_bad_rows_are_explained(stage, lines, words, tokenizer_dir, tmp_path, caplog):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    good = [row if stage == "sft" else {"target": "a text"}]
    command = prepare.prepare_sft if stage == "sft" else prepare.prepare_pretrain
    write_lines(tmp_path / "in" / "bad.jsonl", [*lines * 3, *good])
    write_lines(tmp_path / "in" / "few.jsonl", [*good * 40, b"x"])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", on_bad_row="skip", max_length=256)
    with pytest.raises(UserError, match=words):
        command(**{**keywords, "on_bad_row": "fail"})
    caplog.clear()
    command(**keywords)
    (message,) = [record.message for record in caplog.records if "skipped as bad" in record.message]
    assert "bad.jsonl" in message and words in message


def test_parquet_gives_the_records_of_jsonl(tmp_path):
    records = [
        {"target": "a é", "messages": [{"role": "user", "content": "q"}, {"role": "x", "content": None}], "n": 1.5},
        {"target": None, "messages": [], "n": float("nan")},
    ]
    table = pyarrow.Table.from_pylist(records)
    table = table.append_column("category", pyarrow.array(["x", "y"]).dictionary_encode())
    table = table.append_column("when", pyarrow.array([datetime.datetime(2024, 5, 1, 12)] * 2))
    table = table.append_column("price", pyarrow.array([decimal.Decimal("1.10")] * 2))
    table = table.append_column("bytes", pyarrow.array([b"text", b"\xff\xfe"]))
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=1)
    others = {"when": "2024-05-01T12:00:00", "price": "1.10"}
    assert [line.record for line in read(tmp_path)] == [
        {**records[0], "category": "x", **others, "bytes": "text"},
        {**records[1], "n": None, "category": "y", **others, "bytes": {"binary_bytes": 2}},
    ]
    # Values without a Python type do not spoil rows that do not need them.
    columns = {
        "target": ["a", "b"],
        "day": pyarrow.array([1, 1 << 30], pyarrow.date32()),
        "for": pyarrow.array([1, 1 << 62], pyarrow.duration("s")),
        "at": pyarrow.array([1, 2], pyarrow.timestamp("us", "Nowhere/Else")),
    }
    parquet.write_table(pyarrow.table(columns), path)
    unknown_zone = {"unreadable": "timestamp[us, tz=Nowhere/Else]"}
    assert [line.record for line in read(tmp_path)] == [
        {"target": "a", "day": "1970-01-02", "for": "0:00:01", "at": unknown_zone},
        {"target": "b", "day": {"unreadable": "date32[day]"}, "for": {"unreadable": "duration[s]"}, "at": unknown_zone},
    ]
    # Rows before the damage are used.
    table = pyarrow.table({"target": [f"{random.Random(n).random()}" * 20 for n in range(3000)]})
    parquet.write_table(table, path, row_group_size=1000, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    start = parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\0" * 2000 + whole[start + 2000 :])
    *kept, lost = read(tmp_path)
    assert lost.is_lost and lost.number == 2001 and len(kept) == 2000
    path.write_bytes(whole[:-5000])
    (lost,) = read(tmp_path)
    assert lost.is_lost and "cut short" in lost.problem
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["target", "target"])
    parquet.write_table(twice, path)
    assert "two columns have the name 'target'" in read(tmp_path)[0].problem


def test_a_row_is_as_long_as_a_line_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr("colossal_llama2.corpus.parquet_rows.MAX_LINE_BYTES", 100)
    parquet.write_table(pyarrow.table({"target": ["x", "x" * 200, "y"]}), tmp_path / "a.parquet")
    first, long, last = read(tmp_path)
    assert (first.record, last.record) == ({"target": "x"}, {"target": "y"}) and long.reason == "over 32 MiB"


def test_times_that_python_cannot_hold_spoil_no_row_of_parquet(tmp_path):
    late = 2**62
    columns = {
        "target": ["a"],
        "late": pyarrow.array([late], pyarrow.timestamp("us")),
        "unknown": pyarrow.array([1], pyarrow.timestamp("us", "Mars/Olympus")),
        "nested": pyarrow.array([[{"at": late}]], pyarrow.list_(pyarrow.struct([("at", pyarrow.timestamp("ms"))]))),
        "day": pyarrow.array([2**31 - 1], pyarrow.date32()),
        "long": pyarrow.array([late], pyarrow.duration("ms")),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    (row,) = read_parquet(str(tmp_path / "a.parquet"))
    record = json.loads(row.content)
    assert record.pop("target") == "a" and list(record) == list(columns)[1:]
    assert [list(value) for value in record.values()] == [["unreadable"]] * 5


# In a separate process: it must not even import what the file names.
OPEN_PARQUET = """
import sys
from colossal_llama2.corpus.parquet_rows import read_parquet
print([row.content for row in read_parquet(sys.argv[1])], "antigravity" in sys.modules)
"""


def test_nothing_in_a_parquet_file_is_run(tmp_path):
    code = b"cantigravity\nfly\n."
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": code}
    fields = [pyarrow.field("target", pyarrow.string(), metadata=metadata)]
    schema = pyarrow.schema(fields, metadata={b"pandas": b'{"index_columns": ["antigravity"]}'})
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])], schema=schema), tmp_path / "a.parquet")
    command = [sys.executable, "-c", OPEN_PARQUET, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == """[b'{"target":"a"}'] False"""


def test_a_mixed_folder_is_prepared_like_its_lines(tokenizer_dir, tmp_path):
    parts = [RECORDS[start : start + 6] for start in range(0, 30, 6)]
    lines = [[json.dumps(record).encode() for record in part] for part in parts]
    put(tmp_path / "mixed", "0.json", json.dumps(parts[0], indent=4).encode())
    put(tmp_path / "mixed", "1.jl", b"\r".join(lines[1]))
    put(tmp_path / "mixed", "2.ndjson.bz2", bz2.compress(b"\n".join(lines[2])))
    parquet.write_table(pyarrow.Table.from_pylist(parts[3]), tmp_path / "mixed" / "3.parquet")
    put(tmp_path / "mixed", "4.json", b"\r\n".join(lines[4]))
    for number, part in enumerate(lines):
        put(tmp_path / "plain", f"{number}.jsonl", b"\n".join(part))
    for name in ("mixed", "plain"):
        prepared(tmp_path / name, tokenizer_dir, tmp_path / f"out-{name}", sizes=WorkSizes(unit_bytes=3000))
    mixed, plain = (list(pieces_of(read_jsonl(tmp_path / f"out-{name}" / "jsonl"))) for name in ("mixed", "plain"))
    assert sorted(mixed) == sorted(plain)
    assert list(read_documents([str(tmp_path / "mixed")])) == list(read_documents([str(tmp_path / "plain")]))
    hashes = [entry["sha256"] for entry in manifest(tmp_path / "out-mixed")["inputs"]]
    assert hashes == [row_reader.sha256_of(path) for path in sorted((tmp_path / "mixed").iterdir())]
