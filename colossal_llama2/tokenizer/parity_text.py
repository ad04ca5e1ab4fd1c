"""Sample documents for measuring tokenizers from jsonl and text files of any size, in bounded memory and time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer.text_sample import Sample, draw

SAMPLE_BYTES = 8 * 2**20
# From files that are larger in total, evenly spaced stretches of this total size are read.
READ_BYTES = 256 * 2**20
STRETCH_BYTES = 2**20
MAX_DOCUMENT_CHARACTERS = 20_000
SUFFIXES = (".jsonl", ".txt")
SEED = 0


class _Line(NamedTuple):
    where: str
    content: bytes


def read_parity_text(
    paths: Sequence[str],
    *,
    sample_bytes: int = SAMPLE_BYTES,
    read_bytes: int = READ_BYTES,
    stretch_bytes: int = STRETCH_BYTES,
) -> list[str]:
    """Documents from jsonl and text files, and from folders with such files, each once; the same ones in every run.

    A document is the text of a jsonl line in "source" and "target", "text", "content" or "messages", or a paragraph of
    a text file. More than `sample_bytes` of text is sampled by a hash; of more than `read_bytes` of files, only evenly
    spaced stretches are read. Raises UserError for a path without documents, and for a line that is not JSON.
    """
    files = [file for path in paths for file in _files(Path(path))]
    total = sum(file.stat().st_size for file in files)
    share = min(1.0, read_bytes / total) if total else 1.0
    sample: Sample[str] = Sample(sample_bytes)
    for file in files:
        lines = _lines(file, share, stretch_bytes)
        for text in _records(lines) if file.suffix == ".jsonl" else _paragraphs(lines):
            text = text[:MAX_DOCUMENT_CHARACTERS]
            sample.add(draw(text, SEED)[1], text, len(text.encode()))
    if not sample.items():
        raise UserError(f"--parity_text {' '.join(paths)} holds no text; give jsonl or text files with documents")
    return sample.items()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--parity_text {path} is neither a file nor a folder; give jsonl or text files, or folders")
    inside = sorted(
        file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file() and file.name[0] != "."
    )
    if not inside:
        raise UserError(f"--parity_text {path} has no *.jsonl or *.txt directly inside; subfolders are not read")
    return inside


def _lines(file: Path, share: float, stretch_bytes: int) -> Iterator[_Line]:
    """Yield the lines of a file; with a `share` below 1, only those in stretches that make up this share of it."""
    with file.open("rb") as stream:
        if share >= 1:
            for number, line in enumerate(stream, start=1):
                yield _Line(f"{file}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            return
        start, size = 0, file.stat().st_size
        while start < size:
            # A line belongs to the stretch in which it begins.
            stream.seek(max(start - 1, 0))
            if start:
                stream.readline()
            while start <= (position := stream.tell()) < min(start + stretch_bytes, size):
                yield _Line(f"{file} at byte {position}", stream.readline())
            yield _Line("", b"")
            start += max(int(stretch_bytes / share), 1)


def _records(lines: Iterator[_Line]) -> Iterator[str]:
    import orjson

    for line in lines:
        if not line.content.strip():
            continue
        try:
            record = orjson.loads(line.content)
        except orjson.JSONDecodeError as error:
            raise UserError(f"{line.where}: not JSON ({error}); each line must be one JSON object in UTF-8")
        yield from filter(None, _texts_of(record, line.where))


def _texts_of(record: dict, where: str) -> list[str]:
    if isinstance(record, dict):
        if isinstance(record.get("target"), str):
            return [f"{record.get('source') or ''}{record['target']}"]
        if isinstance(record.get("messages"), list):
            contents = [message.get("content") for message in record["messages"] if isinstance(message, dict)]
            return [content for content in contents if isinstance(content, str)]
        for name in ("text", "content"):
            if isinstance(record.get(name), str):
                return [record[name]]
    raise UserError(
        f'{where}: no text in this line; each line must be one JSON object with "target", "text", "content" or '
        '"messages"'
    )


def _paragraphs(lines: Iterator[_Line]) -> Iterator[str]:
    """Yield paragraphs, lines joined up to an empty one. Invalid UTF-8 is replaced, which does no harm here."""
    paragraph: list[str] = []
    size = 0
    for line in lines:
        text = line.content.decode(errors="replace")
        if text.strip():
            paragraph.append(text)
            size += len(text)
        if paragraph and (not text.strip() or size >= MAX_DOCUMENT_CHARACTERS):
            yield "".join(paragraph).rstrip("\n")
            paragraph, size = [], 0
    if paragraph:
        yield "".join(paragraph).rstrip("\n")
