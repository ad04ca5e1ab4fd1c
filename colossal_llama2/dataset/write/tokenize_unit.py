"""One unit of work: read its lines, check and tokenize them, cut them into pieces, and write these to the cache.

Some files a unit, of which the last says that all are complete:

    unit-00000012.tokens   int32, the tokens of all pieces one after the other; a token without loss is ~id (below 0)
    unit-00000012.pieces   an array of PIECE, one entry a piece
    unit-00000012.sides    with --eval_dedup, a byte for each checked record: DROPPED, TRAINED_ON or HELD_OUT
    unit-00000012.json     {"categories": ["news"], "hashes": {"0": "5f3a..."}, "account": {...}, "bad_rows": [],
                            "lost": [], "tokens": 51207, "pieces": 390}
"""

import gc
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colossal_llama2.corpus.data_files import EMPTY_FILE, InputFile, LostFile, Unit
from colossal_llama2.corpus.message_formats import PRETRAINING_DATA
from colossal_llama2.corpus.row_reader import OTHER_REASON, Line, SpanReader, sha256_of
from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.layout.token_ledger import Account
from colossal_llama2.dataset.write import tokenization
from colossal_llama2.dataset.write.held_out import is_held_out
from colossal_llama2.dataset.write.splicing import piece_lengths
from colossal_llama2.dataset.write.tokenization import CONVERSATIONS
from colossal_llama2.dataset.write.unknown_tokens import note_unknown
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.errors import UserError

BATCH_BYTES = 1 << 20
# Token ids are a third to a half of the bytes of the text, at four bytes each.
CACHE_BYTES_PER_INPUT_BYTE = 3
CORRECT_HINT = "; correct or remove the line"
SKIP_HINT = ", or go on without such lines by --on_bad_row skip"
SKIP_FILE_HINT = ", or go on without the rest of such files by --on_bad_file skip"
NO_PIECES = {"tokens": 0, "pieces": 0}
DROPPED, TRAINED_ON, HELD_OUT = range(3)
MASKED_PIECES = "pieces of long sources without a trained token"
# `document` counts the documents of the unit, `offset` the tokens before the piece in the unit's file.
PIECE = np.dtype(
    [
        ("offset", "<i8"),
        ("target_bytes", "<i8"),
        ("length", "<i4"),
        ("document", "<i4"),
        ("category", "<i4"),
        ("file", "<i4"),
        ("held_out", "<i4"),
        ("trained", "<i4"),
        ("predicted", "<i4"),
    ]
)


class UnitTask(NamedTuple):
    """All that a worker needs to do a unit, on whatever machine that shares the folders.

    `files` holds those of the unit's spans; their paths, as the user gave them, count from `base`. `fails_at_bad_file`:
    whether a file that cannot be read to its end is an error, or is noted.
    """

    unit: Unit
    files: dict[int, InputFile]
    settings: Settings
    tokenizer_dir: str
    encoder_class: type[Encoder]
    cache_dir: str
    base: str
    fails_at_bad_file: bool = True


class Progress(NamedTuple):
    """What a finished unit adds to the progress shown: bytes of input, documents, tokens."""

    size: int
    documents: int
    tokens: int


def do_unit(task: UnitTask) -> Progress:
    """Write the files of one unit. Raises UserError with file:line for a bad row, unless those are skipped."""
    unit, folder = task.unit, Path(task.cache_dir)
    if unit.hashes_only:
        (span,) = unit.spans
        hashes = {str(span.file): sha256_of(os.path.join(task.base, task.files[span.file].path))}
        content = {"categories": [], "hashes": hashes, "account": Account().as_json(), "bad_rows": [], "lost": []}
        content.update(NO_PIECES)
        np.zeros(0, PIECE).tofile(folder / f"{unit.name}.pieces")
        store.write_json_whole(folder / f"{unit.name}.json", content)
        return Progress(0, 0, 0)
    needed = unit.size * CACHE_BYTES_PER_INPUT_BYTE
    with (
        store.appearing_file(folder / f"{unit.name}.tokens", needed_bytes=needed) as tokens,
        store.appearing_file(folder / f"{unit.name}.pieces", needed_bytes=needed) as pieces,
    ):
        worker = _UnitWorker(task, tokens=tokens, pieces=pieces)
        with _no_garbage_collection():
            worker.run()
    if task.settings.eval_dedup:
        with store.appearing_file(_sides_file(folder, unit)) as sides:
            sides.write(bytes(worker.sides))
    store.write_json_whole(folder / f"{unit.name}.json", worker.content())
    total = worker.account.total()
    return Progress(unit.size, total.documents, total.tokens_in)


def is_done(cache_dir: Path, unit: Unit) -> bool:
    """Whether an earlier run did a unit, and its files are as long as they were then."""
    content = store.read_json_or_none(cache_dir / f"{unit.name}.json")
    if not isinstance(content, dict):
        return False
    sizes = {"pieces": PIECE.itemsize, "tokens": np.dtype(np.int32).itemsize}
    if "sides" in content:
        sizes["sides"] = 1
    paths = {name: cache_dir / f"{unit.name}.{name}" for name in sizes}
    return all(
        (path.stat().st_size if path.exists() else 0) == content.get(name, -1) * sizes[name]
        for name, path in paths.items()
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Spare the search for cycles, a tenth of the work: a batch is some hundred thousand objects without any."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def unit_pieces(cache_dir: Path, unit: Unit) -> np.ndarray:
    """The array of PIECE of a finished unit."""
    return np.fromfile(cache_dir / f"{unit.name}.pieces", dtype=PIECE)


def unit_sides(cache_dir: Path, unit: Unit) -> bytes:
    """The side of each checked record of a finished unit of a run with --eval_dedup."""
    return _sides_file(cache_dir, unit).read_bytes()


def _sides_file(cache_dir: Path, unit: Unit) -> Path:
    return cache_dir / f"{unit.name}.sides"


@lru_cache(maxsize=2)
def encoder_of(tokenizer_dir: str, encoder_class: type[Encoder] = Encoder) -> Encoder:
    """An encoder of this process, loaded once."""
    return encoder_class(tokenizer_dir)


class _Document(NamedTuple):
    """A tokenized record on its way into pieces.

    `token_bytes` is how many of the `target_bytes` each token stands for; None if it is one whole piece.
    """

    slot: int
    target_bytes: int
    held_out: bool
    tokens: tokenization.Tokenized
    token_bytes: np.ndarray | None


class _UnitWorker:
    """The state of one unit while it is done: a batch of rows, and what has come of the earlier ones."""

    def __init__(self, task: UnitTask, *, tokens, pieces):
        self._task, self._tokens_file, self._pieces_file = task, tokens, pieces
        self._tokens_path = Path(task.cache_dir, f"{task.unit.name}.tokens")
        self._needed_bytes = task.unit.size * CACHE_BYTES_PER_INPUT_BYTE
        self._encoder = encoder_of(task.tokenizer_dir, task.encoder_class)
        self._read, self._tokenize = _functions(task)
        self._rows: list[tuple[int, Any]] = []
        self._batch_bytes = self._tokens_written = self._documents = 0
        # (file, category) to a number, in the order of appearance.
        self._slots: dict[tuple[int, str], int] = {}
        self.account = Account()
        self.sides = bytearray()
        self._hashes: dict[str, str] = {}
        self._bad_rows: list[dict[str, Any]] = []
        self._lost: list[LostFile] = []

    def run(self) -> None:
        """Read and tokenize all spans."""
        for span in self._task.unit.spans:
            file = self._task.files[span.file]
            reader = SpanReader(file, span, self._task.base)
            lines_before, lost_before = self.account.lines, len(self._lost)
            for line in reader:
                self.account.lines += line.count
                self._batch_bytes += line.size
                if line.is_lost:
                    self._note_lost(file.path, line)
                elif line.problem is not None:
                    self._note_bad_row(span.file, reader, line.number, line.problem, line.reason)
                elif line.record is None:
                    self.account.empty_lines += line.count
                else:
                    self._take(span.file, reader, line)
                if self._batch_bytes >= BATCH_BYTES:
                    self._finish_batch()
            if file.is_one_span and (self.account.lines, len(self._lost)) == (lines_before, lost_before):
                empty = Line(0, 0, None, f"{file.path} {EMPTY_FILE}", reason="holds nothing", is_lost=True)
                self._note_lost(file.path, empty)
            if reader.sha256 is not None:
                self._hashes[str(span.file)] = reader.sha256
        self._finish_batch()

    def content(self) -> dict[str, Any]:
        """What the unit's JSON file says."""
        categories = [category for _, category in self._slots]
        sides = {"sides": len(self.sides)} if self._task.settings.eval_dedup else {}
        return {
            **sides,
            "categories": categories,
            "hashes": self._hashes,
            "account": self.account.as_json(),
            "bad_rows": self._bad_rows,
            "lost": [lost._asdict() for lost in self._lost],
            "tokens": self._tokens_written,
            "pieces": self.account.total().pieces,
        }

    def _take(self, file: int, reader: SpanReader, line: Line) -> None:
        """Put a record into the batch, unless the stage's reader refuses it."""
        try:
            self._rows.append((file, self._read(line.record)))
        except ValueError as error:
            self.account.count_roles(getattr(error, "roles", {}))
            reason = getattr(error, "reason", OTHER_REASON)
            # Data of the other stage is right as it is.
            cure = "" if reason in (CONVERSATIONS, PRETRAINING_DATA) else CORRECT_HINT
            self._note_bad_row(file, reader, line.number, f"{error}{cure}", reason)

    def _note_bad_row(self, file: int, reader: SpanReader, number: int, problem: str, reason: str) -> None:
        path = self._task.files[file].path
        if self._task.settings.on_bad_row == "fail":
            raise UserError(f"{path}:{reader.line_number(number)}: {problem}{SKIP_HINT}")
        self.account.bad_row(file, reason, problem)
        # The line of the span: how many lines are before it is known when all spans are read.
        self._bad_rows.append({"file": path, "line": number, "reason": reason, "problem": problem})

    def _note_lost(self, path: str, line: Line) -> None:
        """Note a file that cannot be read on. It is read by this unit alone, so its lines are the span's."""
        lost = LostFile(path, line.number, line.reason, line.problem)
        if self._task.fails_at_bad_file:
            raise UserError(f"{lost}{SKIP_FILE_HINT}")
        self._lost.append(lost)

    def _finish_batch(self) -> None:
        rows, self._rows, self._batch_bytes = self._rows, [], 0
        if not rows:
            return
        documents = []
        is_document = np.zeros(len(rows), bool)
        tokenized = self._tokenize([row for _, row in rows])
        for number, ((file, row), tokens) in enumerate(zip(rows, tokenized, strict=True)):
            slot = self._slots.setdefault((file, row.category), len(self._slots))
            tally = self.account.tally(file, row.category)
            texts = texts_of(row)
            tally.documents += 1
            tally.characters += sum(map(len, texts))
            sizes = [len(text.encode()) for text in texts]
            tally.bytes += sum(sizes)
            tally.tokens_in += tokens.tokens_in
            for drop in tokens.drops:
                tally.drop(drop.reason, documents=1, tokens=drop.tokens)
            if len(tokens.input_ids):
                is_document[number] = True
                held_out = is_held_out(row, self._task.settings)
                documents.append(
                    _Document(slot, _target_bytes(row, tokens, sizes), held_out, tokens, self._token_bytes(row, tokens))
                )
            for note in row.notes:
                self.account.note(note)
            if hasattr(row, "format"):
                self.account.formats[row.format] = self.account.formats.get(row.format, 0) + 1
        sides = np.full(len(rows), DROPPED, np.uint8)
        if documents:
            sides[is_document] = np.concatenate([self._write(group) for group in _groups(documents)])
        self.sides += sides.tobytes()

    def _write(self, documents: Sequence[_Document]) -> np.ndarray:
        """Cut the documents of a batch and write those pieces that bring a loss. Returns the side of each document."""
        coded = _coded(documents)
        pieces = self._cut(documents)
        starts = pieces["offset"]
        # Bounds of every other stretch are what a truncated document leaves out.
        bounds = np.stack([starts, starts + pieces["length"]], axis=1).ravel()
        is_trained = np.append(coded >= 0, False)
        trained = np.add.reduceat(is_trained, bounds, dtype=np.int32)[::2]
        pieces["trained"] = trained
        pieces["predicted"] = trained - is_trained[starts]
        has_loss = pieces["predicted"] > 0
        self._count(pieces, has_loss)
        kept = pieces[has_loss]
        with store.full_disk_told(self._tokens_path, self._needed_bytes):
            for start, stop in _stretches(kept):
                self._tokens_file.write(coded[start:stop].data)
                note_unknown(self.account, coded[start:stop], self._encoder.unk_id)
        kept["offset"] = self._tokens_written + np.cumsum(kept["length"], dtype=np.int64) - kept["length"]
        self._tokens_written += int(kept["length"].sum())
        sides = np.full(len(documents), DROPPED, np.uint8)
        sides[kept["document"] - self._documents] = np.where(kept["held_out"], HELD_OUT, TRAINED_ON)
        self._documents += len(documents)
        self._pieces_file.write(kept.tobytes())
        return sides

    def _cut(self, documents: Sequence[_Document]) -> np.ndarray:
        """The pieces of the documents; `offset` counts from the batch's first token."""
        settings = self._task.settings
        rows, offset = [], 0
        slots = list(self._slots)
        for number, document in enumerate(documents, start=self._documents):
            length = len(document.tokens.input_ids)
            file, category = slots[document.slot]
            lengths: list[int] = [length]
            if length > settings.max_length:
                tally = self.account.tally(file, category)
                tally.cut_documents += 1
                if settings.overlong == "split":
                    lengths = piece_lengths(length, max_length=settings.max_length)
                else:
                    lengths = [settings.max_length]
                    tally.truncated += length - settings.max_length
            start = 0
            for piece in lengths:
                size = _predicted_bytes(document, start, start + piece)
                rows.append((offset + start, size, piece, number, document.slot, file, document.held_out, 0, 0))
                start += piece
            offset += length
        return np.array(rows, dtype=PIECE)

    def _token_bytes(self, row, tokens: tokenization.Tokenized) -> np.ndarray | None:
        """The bytes of the learnt text that each token of a document stands for, if the document will be cut."""
        if len(tokens.input_ids) <= self._task.settings.max_length:
            return None
        return tokenization.pretrain_token_bytes(row, tokens, encoder=self._encoder)

    def _count(self, pieces: np.ndarray, has_loss: np.ndarray) -> None:
        """Add the pieces of a batch to the tallies: all categories at once, as each piece may have its own."""
        present, category = np.unique(pieces["category"], return_inverse=True)
        is_held_out = has_loss & (pieces["held_out"] > 0)
        # The pieces of a document follow each other.
        held_out = np.flatnonzero(is_held_out)
        documents = pieces["document"][held_out]
        begins = held_out[np.append(True, documents[1:] != documents[:-1])[: len(held_out)]]

        def sums(which: np.ndarray, name: str | None = None) -> list[int]:
            weights = None if name is None else pieces[name][which]
            # Sums of floats are exact up to 2^53.
            return np.bincount(category[which], weights, minlength=len(present)).astype(np.int64).tolist()

        columns = (
            sums(has_loss, "trained"),
            sums(has_loss, "length"),
            sums(has_loss, "predicted"),
            sums(has_loss),
            sums(is_held_out),
            sums(begins),
            sums(~has_loss),
            sums(~has_loss, "length"),
        )
        slots = list(self._slots)
        for slot, *counts in zip(present.tolist(), *columns, strict=True):
            trained, length, predicted, kept, held_out_pieces, held_out_documents, dropped, dropped_tokens = counts
            tally = self.account.tally(*slots[slot])
            tally.trained += trained
            tally.masked += length - trained
            tally.predicted += predicted
            tally.pieces += kept
            tally.held_out_pieces += held_out_pieces
            # Documents of which every piece was dropped are not in eval/.
            tally.held_out_documents += held_out_documents
            if dropped:
                tally.drop(MASKED_PIECES, documents=dropped, tokens=dropped_tokens)


def _functions(task: UnitTask) -> tuple[Callable, Callable]:
    """How a record of the stage is checked, and how checked ones are tokenized."""
    encoder = encoder_of(task.tokenizer_dir, task.encoder_class)
    read = tokenization.row_reader(task.settings)
    if task.settings.stage == "pretrain":
        return read, partial(tokenization.tokenize_pretrain, encoder=encoder)
    tokenize = partial(
        tokenization.tokenize_sft,
        encoder=encoder,
        max_length=task.settings.max_length,
        prefix_after_marks=task.settings.prefix_after_marks,
    )
    return read, tokenize


def texts_of(row) -> list[str]:
    """Every text of a checked record, those to learn last."""
    if isinstance(row, tokenization.PretrainRow):
        return [row.source, row.target]
    conversation = row.conversation
    messages = chain(*conversation.exchanges, conversation.unanswered)
    texts = (text for message in messages for text in (message.system_text, message.text))
    return [conversation.system_text, *texts]


def _target_bytes(row, tokens: tokenization.Tokenized, sizes: Sequence[int]) -> int:
    """UTF-8 bytes of the text that carries the loss: the last of `sizes`, or of a conversation the answers kept."""
    if isinstance(row, tokenization.PretrainRow):
        return sizes[-1]
    answers = (exchange[-1] for exchange in row.conversation.exchanges[: tokens.exchanges])
    return sum(len(answer.text.encode()) for answer in answers if answer.is_trained)


def _groups(documents: Sequence[_Document]) -> Iterator[list[_Document]]:
    """The documents in their order: each long one alone, so that its tokens need not be copied."""
    group: list[_Document] = []
    for document in documents:
        if isinstance(document.tokens.input_ids, np.ndarray):
            yield from filter(None, (group, [document]))
            group = []
        else:
            group.append(document)
    if group:
        yield group


def _stretches(pieces: np.ndarray) -> list[tuple[int, int]]:
    """Where pieces lie, as [start, stop) ranges of their batch's tokens; those that touch come as one."""
    starts, stops = pieces["offset"], pieces["offset"] + pieces["length"]
    begins = np.append(True, starts[1:] != stops[:-1])[: len(pieces)]
    ends = np.append(begins[1:], True)[: len(pieces)]
    return list(zip(starts[begins].tolist(), stops[ends].tolist(), strict=True))


def _coded(documents: Sequence[_Document]) -> np.ndarray:
    """The tokens of all documents as one int32 array, with ~id for those without loss.

    That of a long document, which is alone, is its own array.
    """
    if isinstance(documents[0].tokens.input_ids, np.ndarray):
        (document,) = documents
        coded, mask = document.tokens.input_ids, document.tokens.labels == IGNORE_INDEX
        if document.tokens.labels is not coded:
            np.invert(coded, out=coded, where=mask)
        return coded
    ids = array("i")
    masked = []
    for document in documents:
        tokens = document.tokens
        # Where there is no mask, both are one list.
        if tokens.labels is not tokens.input_ids:
            masked.append((len(ids), np.array(tokens.labels, np.int32) == IGNORE_INDEX))
        ids.fromlist(tokens.input_ids)
    coded = np.frombuffer(ids, np.int32)
    for start, mask in masked:
        stretch = coded[start : start + len(mask)]
        stretch[mask] = ~stretch[mask]
    return coded


def _predicted_bytes(document: _Document, start: int, stop: int) -> int:
    """UTF-8 bytes of the text that is predicted in a piece [start, stop): of its first token nothing predicts any."""
    if document.token_bytes is None:
        return document.target_bytes
    return int(document.token_bytes[start + 1 : stop].sum())
