"""One bin: arrange its pieces into samples and write them as arrow and as jsonl.

A sample of two documents, the first of which has a source:

    {"input_ids": [1, 41287, ..., 53429, 2, 1, 9027, ..., 2], "labels": [-100, -100, ..., 53429, 2, 1, 9027, ..., 2],
     "sequence_lengths": [61, 103], "document_categories": ["riddle", "sports"], "document_sources": ["zh", "en"],
     "document_target_bytes": [6, 412]}

`document_target_bytes` is the UTF-8 bytes of the text that a piece predicts: for a whole document, all text that
carries the loss; for a piece of a cut document, the text of its tokens except the first, which nothing in the piece
predicts.

Fine-tuning adds `inputs_decode`, `labels_decode`, `seq_length` and `seq_category`, for reading a sample by eye.

Peak memory: one batch, and about 150 bytes per piece of this bin, of which `splicing` needs 64 (181 with "none").
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.arrow_folder import DATA_FILE, ArrowFolder, list_column, named_list_column, rows_of
from colossal_llama2.dataset.layout.columns import (
    DOCUMENT_BYTES,
    DOCUMENT_CATEGORIES,
    DOCUMENT_LENGTHS,
    DOCUMENT_SOURCES,
    IGNORE_INDEX,
    INPUT_IDS,
    INPUTS_TEXT,
    LABELS,
    LABELS_TEXT,
    PREDICTED_BYTES,
    SAMPLE_CATEGORY,
    SAMPLE_LENGTH,
)
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.write import tokenization
from colossal_llama2.dataset.write.splicing import splice
from colossal_llama2.dataset.write.tokenize_chat import names_of
from colossal_llama2.encoding.registry import shared_encoder

BATCH_TOKENS = 1 << 19
# Estimates for ids and labels together.
ARROW_BYTES_PER_TOKEN = 8
JSONL_BYTES_PER_TOKEN = 12
MAX_OPEN_FILES = 64
# A piece that was dealt to a bin: the fields of its PIECE, and the unit that holds its tokens.
MEMBER = np.dtype(
    [
        ("unit", "<i4"),
        ("document", "<i4"),
        ("offset", "<i8"),
        ("target_bytes", "<i8"),
        ("length", "<i4"),
        ("category", "<i4"),
        ("source", "<i4"),
        ("predicted", "<i4"),
        ("trained", "<i4"),
    ]
)
COLUMNS: dict[str, Any] = {
    INPUT_IDS: ["int32"],
    LABELS: ["int32"],
    DOCUMENT_LENGTHS: ["int32"],
    DOCUMENT_CATEGORIES: ["string"],
    DOCUMENT_SOURCES: ["string"],
    DOCUMENT_BYTES: ["int64"],
}
SFT_COLUMNS: dict[str, Any] = {
    INPUTS_TEXT: "string",
    LABELS_TEXT: ["string"],
    SAMPLE_LENGTH: "int32",
    SAMPLE_CATEGORY: "string",
}


class BinTask(NamedTuple):
    """All that a worker needs to write a bin. The members' numbers refer to `categories` and `sources`."""

    number: int
    settings: Settings
    tokenizer_dir: str
    cache_dir: str
    jsonl_dir: str
    arrow_dir: str
    categories: list[str]
    sources: list[str]

    @property
    def name(self) -> str:
        """How messages name it."""
        return self.settings.bin_name(self.number)


def members_file(cache_dir: str, name: str) -> Path:
    """The file with the members of a bin, which `assign_bins` writes."""
    return Path(cache_dir) / "dealt" / f"{name}.members"


def bin_counts_file(cache_dir: str, name: str) -> Path:
    """The file that marks a bin as written, with its counts."""
    return Path(cache_dir) / f"bin-{name}.json"


def write_bin(task: BinTask) -> dict[str, Any]:
    """Write one bin. Returns its counts, made from what was written:

    {"name": "part-00000", "samples": 217, "tokens": 443866, "trained": 443000, "predicted": 442700, "pieces": 390,
     "longest": 4096, "fingerprint": "0f5a...", "bytes": 3612040}

    `longest` is the length of the longest sample in tokens, `bytes` the size of the arrow file.
    """
    settings, name = task.settings, task.settings.bin_name(task.number)
    members = np.fromfile(members_file(task.cache_dir, name), dtype=MEMBER)
    members = members[np.lexsort((members["offset"], members["unit"]))]
    documents = members["unit"].astype(np.int64) << 32 | members["document"]
    order, counts = splice(
        members["length"],
        documents,
        max_length=settings.max_length,
        splicing=settings.splicing,
        seed=[settings.seed, task.number],
    )
    tokens = int(members["length"].sum())
    summary: dict[str, Any] = {"name": name, "samples": len(counts), "tokens": tokens, "trained": 0, "predicted": 0}
    with ExitStack() as stack:
        if settings.writes_jsonl:
            path = Path(task.jsonl_dir) / f"{name}.jsonl"
            jsonl = stack.enter_context(store.appearing_file(path, needed_bytes=tokens * JSONL_BYTES_PER_TOKEN))
        final = Path(task.arrow_dir) / name
        folder = stack.enter_context(store.appearing_folder(final, needed_bytes=tokens * ARROW_BYTES_PER_TOKEN))
        columns = COLUMNS if settings.stage == "pretrain" else {**COLUMNS, **SFT_COLUMNS}
        arrow = ArrowFolder(folder, columns, description=PREDICTED_BYTES)
        stack.callback(arrow.close)
        for batch, batch_counts in _batches(members[order], counts):
            columns, trained, predicted = _columns(batch, batch_counts, task)
            summary["trained"] += trained
            summary["predicted"] += predicted
            arrow.write(columns)
            if settings.writes_jsonl:
                with store.full_disk_reported(path, tokens * JSONL_BYTES_PER_TOKEN):
                    _write_lines(jsonl, columns)
        summary["pieces"] = len(members)
        summary["longest"] = int(np.add.reduceat(members["length"][order], np.cumsum(counts) - counts).max())
        summary["fingerprint"] = arrow.finish()
    summary["bytes"] = (final / DATA_FILE).stat().st_size
    store.write_json_whole(bin_counts_file(task.cache_dir, name), summary)
    return summary


def _batches(members: np.ndarray, counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the members of consecutive samples, about `BATCH_TOKENS` tokens at a time, and the pieces per sample."""
    ends = np.cumsum(counts)
    tokens = np.cumsum(members["length"], dtype=np.int64)[ends - 1]
    first = 0
    while first < len(counts):
        done = tokens[first - 1] if first else 0
        last = max(int(np.searchsorted(tokens, done + BATCH_TOKENS, side="right")), first + 1)
        start = ends[first - 1] if first else 0
        yield members[start : ends[last - 1]], counts[first:last]
        first = last


def _columns(members: np.ndarray, counts: np.ndarray, task: BinTask) -> tuple[dict[str, Any], int, int]:
    """The arrow columns of a batch, and the numbers of trained and predicted tokens in them."""
    coded = _gather(members, Path(task.cache_dir))
    is_trained = coded >= 0
    trained = int(np.count_nonzero(is_trained))
    ids = labels = coded
    if trained < len(coded):
        ids = np.where(is_trained, coded, ~coded)
        labels = np.where(is_trained, coded, np.int32(IGNORE_INDEX))
    ends = np.cumsum(members["length"])
    sample_ends = ends[np.cumsum(counts) - 1]
    sample_lengths = np.diff(sample_ends, prepend=0)
    columns = {
        INPUT_IDS: list_column(ids, sample_lengths),
        LABELS: list_column(labels, sample_lengths),
        DOCUMENT_LENGTHS: list_column(members["length"].copy(), counts),
        DOCUMENT_CATEGORIES: named_list_column(task.categories, members["category"].copy(), counts),
        DOCUMENT_SOURCES: named_list_column(task.sources, members["source"].copy(), counts),
        DOCUMENT_BYTES: list_column(members["target_bytes"].copy(), counts),
    }
    if task.settings.stage == "sft":
        columns.update(_text_columns(columns, sample_lengths, task))
    return columns, trained, trained - int(np.count_nonzero(is_trained[ends - members["length"]]))


def _gather(members: np.ndarray, cache_dir: Path) -> np.ndarray:
    """(tokens,) int32: the tokens of the members one after the other, read in the order of the cache's files."""
    lengths = members["length"]
    starts = np.cumsum(lengths) - lengths
    tokens = np.empty(int(lengths.sum()), np.int32)
    # Slices of it are made in half the time of numpy's.
    memory, size = tokens.data.cast("B"), tokens.itemsize
    files: OrderedDict[int, int] = OrderedDict()
    try:
        order = np.lexsort((members["offset"], members["unit"]))
        sorted_columns = (members["unit"], members["offset"], lengths, starts)
        for unit, offset, length, start in zip(*(column[order].tolist() for column in sorted_columns), strict=True):
            if unit not in files:
                if len(files) >= MAX_OPEN_FILES:
                    os.close(files.popitem(last=False)[1])
                files[unit] = os.open(cache_dir / f"unit-{unit:08d}.tokens", os.O_RDONLY)
            place = memory[start * size : (start + length) * size]
            if os.preadv(files[unit], [place], offset * size) != length * size:
                raise OSError(f"unit-{unit:08d}.tokens in {cache_dir} is cut short; delete the folder and start over")
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return tokens


def _text_columns(columns: dict[str, Any], lengths: np.ndarray, task: BinTask) -> dict[str, Any]:
    """The original's columns for reading a conversation by eye. Several categories in a sample are joined by ", "."""
    import pyarrow

    categories = [", ".join(sorted(set(names))) for names in columns[DOCUMENT_CATEGORIES].to_pylist()]
    ids, labels = (columns[name].to_pylist() for name in (INPUT_IDS, LABELS))
    encoder, names = shared_encoder(task.tokenizer_dir), names_of(task.settings, task.tokenizer_dir)
    trained = [tokenization.decode_trained(row, encoder=encoder, names=names) for row in labels]
    return {
        INPUTS_TEXT: pyarrow.array([tokenization.decode_marked(row, encoder=encoder, names=names) for row in ids]),
        LABELS_TEXT: pyarrow.array(trained, pyarrow.list_(pyarrow.string())),
        SAMPLE_LENGTH: pyarrow.array(lengths.astype(np.int32)),
        SAMPLE_CATEGORY: pyarrow.array(categories),
    }


def _write_lines(file: BinaryIO, columns: dict[str, Any]) -> None:
    import orjson

    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    for row in rows_of(columns):
        # In most samples no label is masked. Then ids and labels are the same text, which is most of the work.
        if row[LABELS].min() >= 0:
            row[INPUT_IDS] = row[LABELS] = orjson.Fragment(
                orjson.dumps(row[INPUT_IDS], option=orjson.OPT_SERIALIZE_NUMPY)
            )
        file.write(orjson.dumps(row, option=option))
