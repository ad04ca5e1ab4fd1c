"""Which entries of a folder are data files, by name, and how to read each file, by its first bytes.

news.jsonl  news.json  news.ndjson  news.jl     also followed by .gz, .zst, .zstd, .bz2 or .xz; in any case
news.parquet
"""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from colossal_llama2.corpus.decompression import compression_of
from colossal_llama2.corpus.json_stream import HEAD_BYTES, layout_of
from colossal_llama2.corpus.parquet_rows import MAGIC

# The only kind of file whose ranges can be read separately.
LINES = "lines"
PARQUET = "parquet"
COMPRESSIONS = ("gzip", "zstd", "bzip2", "xz")
ENDINGS = "*.jsonl, *.json, *.ndjson and *.jl, each also followed by .gz, .zst, .bz2 or .xz, and *.parquet"

_DATA_NAME = re.compile(
    r"(?P<stem>.+?)\.(?P<text>jsonl|json|ndjson|jl)(?:\.(?P<packed>gz|zst|zstd|bz2|xz))?|(?P<table>.+)\.parquet",
    re.IGNORECASE | re.DOTALL,
)
_EXPECTED = {None: "text", "gz": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bzip2", "xz": "xz"}

# For entries that are not read, by name: what they are, as manifests record it, and what to do if they are data.
_LEFT_OUT = (
    (r"\..*", "hidden", "rename it without the dot"),
    (r".*\.(zip|tar|tgz|tbz2?|txz|rar|7z|tar\.\w+|lz4|lzma|lzo|sz|snappy|br|z)", "an archive", "unpack it"),
    (r".*\.(gz|zst|zstd|bz2|xz)", "compressed; the name does not show what", "rename it to *.jsonl.gz or the like"),
    (r".*\.(csv|tsv|xlsx?|ods)", "a table", 'write its rows as lines of {"target": ...}'),
    (r".*\.(arrow|feather|orc|avro|db|sqlite3?)", "a table", "convert it to Parquet"),
    (r".*\.(txt|md|rst|text|html?|xml|pdf|docx?)", "text", 'write it as lines of {"target": ...}'),
    (r".*\.(jsonlines|jsonl?\.\w+)", "of another ending", "rename it to *.jsonl"),
    (r".*", "of another ending", f"rename it to one of {ENDINGS}"),
)

# Contents that cannot be read, by their first bytes.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unpack it, or pack it by gzip or zstd"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed by snappy", "unpack it, or pack it by gzip or zstd"),
    (b"ARROW1", "an Arrow file", "convert it to Parquet"),
    (b"FEA1", "a Feather file", "convert it to Parquet"),
    (b"ORC", "an ORC file", "convert it to Parquet"),
    (b"Obj\x01", "an Avro file", "convert it to Parquet"),
    (b"SQLite format 3\0", "an SQLite database", "export its rows as jsonl"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its rows as jsonl"),
    (b"PARE", "an encrypted Parquet file", "decrypt it"),
    (MAGIC, "a Parquet file that was compressed once more", "unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "run git lfs pull"),
    (b"<!DOCTYPE html", "a web page", "fetch the file itself"),
    (b"<html", "a web page", "fetch the file itself"),
)
# The order matters: a UTF-32 mark begins with a UTF-16 mark.
_WIDE = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_BEGINS_JSON = re.compile(rb"^(?:\xef\xbb\xbf)?[ \t]*[\[{]", re.MULTILINE)
# Control characters that text never contains; white space, escape and record separator are allowed.
_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c\x1d\x1f\x7f]")
_TAR_MAGIC, _TAR_PLACE = b"ustar", 257


class Unreadable(NamedTuple):
    """Why a file cannot be read, with the cure, and the reason under which such files are counted."""

    why: str
    reason: str


class LeftOut(NamedTuple):
    """An entry of an input folder that is not read: what it is, and what to do if it holds data."""

    path: str
    what: str
    cure: str


def data_stem(name: str) -> str | None:
    """The name of a data file without its extensions; None if it is not the name of a data file."""
    found = None if name.startswith(".") else _DATA_NAME.fullmatch(name)
    return found and (found["stem"] or found["table"])


def left_out(path: Path) -> LeftOut:
    """What to log about an entry whose name is not that of a data file."""
    if path.is_dir() and not path.name.startswith("."):
        return LeftOut(str(path), "a folder", "give it in --data_input_dirs as well")
    for pattern, what, cure in _LEFT_OUT:
        if re.fullmatch(pattern, path.name, re.IGNORECASE | re.DOTALL):
            return LeftOut(str(path), what, cure)
    raise ValueError(path)


def kind_of(head: bytes) -> str:
    """How to read a file, from its first `HEAD_BYTES`: one of `COMPRESSIONS`, `PARQUET` or `LINES`, or one of these:

    "array" and "objects" (see `json_stream.layout_of`), plain text that can only be read from its start; "unreadable".
    """
    if compression := compression_of(head):
        return compression
    if head.startswith(MAGIC):
        return PARQUET
    return "unreadable" if unreadable(head) else layout_of(head)


def surprise(name: str, kind: str) -> str | None:
    """What a file actually is, such as "gzip", if that contradicts its name; otherwise None."""
    found = _DATA_NAME.fullmatch(name)
    if found is None or kind == "unreadable":
        return None
    expected = PARQUET if found["table"] else _EXPECTED[found["packed"] and found["packed"].lower()]
    actual = kind if kind in (*COMPRESSIONS, PARQUET) else "text"
    if actual != expected:
        return "plain text" if actual == "text" else actual
    if kind in ("array", "objects") and found["text"].lower() != "json":
        return "a JSON array" if kind == "array" else "JSON over several lines"
    return None


def unreadable(head: bytes) -> Unreadable | None:
    """Why a file that begins with these `HEAD_BYTES` cannot be read; None if it may be JSON."""
    for mark, encoding in _WIDE:
        if head.startswith(mark):
            return _wide(encoding)
    if head[:2] in (b"{\0", b"[\0", b"\0{", b"\0["):
        return _wide("UTF-16")
    if head[_TAR_PLACE : _TAR_PLACE + len(_TAR_MAGIC)] == _TAR_MAGIC:
        return _foreign("a tar archive", "unpack it")
    if compression := compression_of(head):
        return _foreign(f"compressed twice, inside by {compression}", "unpack it once")
    for magic, what, cure in _FOREIGN:
        if head[: len(magic)].lower() == magic.lower():
            return _foreign(what, cure)
    if not _BEGINS_JSON.search(head.replace(b"\r", b"\n")) and _is_binary(head):
        return _foreign("binary data, or text that is not UTF-8", "fetch the file again, or write it as jsonl in UTF-8")
    return None


def _is_binary(head: bytes) -> bool:
    try:
        # Incremental: the last character may be cut off.
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return _NO_TEXT.search(head) is not None


def _wide(encoding: str) -> Unreadable:
    why = f"{encoding} text, but UTF-8 is read; convert it (iconv -f {encoding} -t UTF-8)"
    return Unreadable(why, f"{encoding} text")


def _foreign(what: str, cure: str) -> Unreadable:
    return Unreadable(f"this is {what}; {cure}", what)


def read_head(path: Path) -> bytes:
    """The first `HEAD_BYTES` of a file."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)
