"""One unit of work: read its lines, check and tokenize them, cut them into pieces, and write these to the cache.

read       lines of the unit's spans (`row_reader`), checked (`records`); what cannot be used (`unit_problems`)
tokenize   a quarter of a megabyte of rows at a time (`tokenization`)
cut        documents into pieces (`document_pieces`)
count      every token, by what happened to it (`unit_counts`)
write      the pieces, and last a JSON file that marks the unit as done (`unit_files`)
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.corpus.data_files import InputFile, Unit
from colossal_llama2.corpus.row_reader import Line, SpanReader, sha256_of
from colossal_llama2.dataset.layout.prepare_settings import Settings, WorkSizes
from colossal_llama2.dataset.layout.token_ledger import TokenLedger
from colossal_llama2.dataset.write import tokenization
from colossal_llama2.dataset.write.document_pieces import Document, coded_tokens, cut_documents, document_groups
from colossal_llama2.dataset.write.held_out import is_held_out
from colossal_llama2.dataset.write.records import PretrainRow, Row, SftRow, check_encodable, row_reader
from colossal_llama2.dataset.write.tokenize_chat import chat_tokenizer_of, tokenize_chat
from colossal_llama2.dataset.write.unit_counts import UnitCounts
from colossal_llama2.dataset.write.unit_files import (
    DROPPED,
    HELD_OUT,
    PIECE,
    TRAINED_ON,
    PieceWriter,
    piece_writer,
    unit_file,
    write_sides,
    write_unit_json,
)
from colossal_llama2.dataset.write.unit_problems import UnitProblems
from colossal_llama2.dataset.write.unknown_tokens import count_unknown
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.registry import shared_encoder

# So little that the tokens of a batch, of which Python needs 32 bytes each, stay in the processor's cache.
BATCH_BYTES = 1 << 18
NO_PIECES = {"tokens": 0, "pieces": 0}


class UnitTask(NamedTuple):
    """All that a worker needs to do a unit, on any machine that shares the folders.

    Attributes:
        files: those of the unit's spans, by number.
        tokenizer_dir: an absolute path.
        encoder_class: the class of the encoder that `choose_encoder` has chosen.
        base: the folder that the paths of `files`, as the user gave them, are relative to.
        fails_at_bad_file: whether a file that cannot be read to its end is an error; otherwise it is recorded.
    """

    unit: Unit
    files: dict[int, InputFile]
    settings: Settings
    tokenizer_dir: str
    encoder_class: type[Encoder]
    cache_dir: str
    base: str
    fails_at_bad_file: bool = True
    sizes: WorkSizes = WorkSizes()

    @property
    def name(self) -> str:
        """How messages name it."""
        return self.unit.name


class Progress(NamedTuple):
    """What a finished unit adds to the progress shown: bytes of input, documents, tokens."""

    size: int
    documents: int
    tokens: int


def do_unit(task: UnitTask) -> Progress:
    """Write the files of one unit. Raises UserError with file:line for a bad row, unless those are skipped."""
    unit, folder = task.unit, Path(task.cache_dir)
    if unit.hashes_only:
        _hash_file(task)
        return Progress(0, 0, 0)
    with piece_writer(folder, unit) as writer:
        worker = _UnitWorker(task, writer)
        with _no_garbage_collection():
            worker.run()
    if task.settings.eval_dedup:
        write_sides(folder, unit, bytes(worker.sides))
    write_unit_json(folder, unit, worker.content())
    total = worker.counts.ledger.total()
    return Progress(unit.size, total.documents, total.tokens_in)


def _hash_file(task: UnitTask) -> None:
    """Do the unit of a large file's hash, which has no pieces."""
    (span,) = task.unit.spans
    hashes = {str(span.file): sha256_of(os.path.join(task.base, task.files[span.file].path))}
    content = {"categories": [], "hashes": hashes, "account": TokenLedger().as_json(), "bad_rows": [], "lost": []}
    np.zeros(0, PIECE).tofile(unit_file(task.cache_dir, task.unit, "pieces"))
    write_unit_json(Path(task.cache_dir), task.unit, {**content, **NO_PIECES})


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch off the garbage collector, a tenth of the work: a batch has some hundred thousand objects, no cycles."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _UnitWorker:
    """Takes the lines of one unit through the steps above, a batch of rows at a time."""

    def __init__(self, task: UnitTask, writer: PieceWriter):
        self._task, self._settings, self._writer = task, task.settings, writer
        self._encoder = shared_encoder(task.tokenizer_dir, task.encoder_class, task.sizes.part_characters)
        self._read = row_reader(task.settings)
        self._tokenizer = _tokenizer_of(task, self._encoder)
        self._rows: list[tuple[int, Row]] = []
        self._batch_bytes = self._documents = 0
        self._hashes: dict[str, str] = {}
        self.sides = bytearray()
        self.counts = UnitCounts()
        self._problems = UnitProblems(
            task.files,
            self.counts.ledger,
            skips_bad_rows=task.settings.on_bad_row == "skip",
            fails_at_bad_file=task.fails_at_bad_file,
        )

    def run(self) -> None:
        """Read and tokenize all spans."""
        ledger = self.counts.ledger
        for span in self._task.unit.spans:
            file = self._task.files[span.file]
            reader = SpanReader(file, span, self._task.base)
            lines_before, lost_before = ledger.lines, len(self._problems.lost)
            for line in reader:
                self._take_line(span.file, reader, line)
                if self._batch_bytes >= BATCH_BYTES:
                    self._finish_batch()
            if file.is_one_span and (ledger.lines, len(self._problems.lost)) == (lines_before, lost_before):
                self._problems.empty_file(file.path)
            if reader.sha256 is not None:
                self._hashes[str(span.file)] = reader.sha256
        self._finish_batch()

    def content(self) -> dict[str, Any]:
        """The content of the unit's JSON file."""
        ledger = self.counts.ledger
        return {
            **({"sides": len(self.sides)} if self._settings.eval_dedup else {}),
            "categories": self.counts.categories,
            "hashes": self._hashes,
            "account": ledger.as_json(),
            "bad_rows": self._problems.bad_rows,
            "lost": [lost._asdict() for lost in self._problems.lost],
            "tokens": self._writer.tokens,
            "pieces": ledger.total().pieces,
        }

    def _take_line(self, file: int, reader: SpanReader, line: Line) -> None:
        """Add the record of a line to the batch, or record why there is none."""
        ledger = self.counts.ledger
        ledger.lines += line.count
        self._batch_bytes += line.size
        if line.problem is not None and line.is_lost:
            self._problems.lost_file(self._task.files[file].path, line.number, line.problem, line.reason)
        elif line.problem is not None:
            self._problems.bad_row(file, reader, line.number, line.problem, line.reason)
        elif line.record is None:
            ledger.empty_lines += line.count
        else:
            try:
                row = check_encodable(self._read(line.record), self._encoder)
                self._rows.append((file, self._tokenizer.accept(row)))
            except ValueError as error:
                self._problems.refused(file, reader, line.number, error)

    def _finish_batch(self) -> None:
        rows, self._rows, self._batch_bytes = self._rows, [], 0
        if not rows:
            return
        documents = []
        is_document = np.zeros(len(rows), bool)
        for number, ((file, row), tokens) in enumerate(zip(rows, self._tokenizer.finish(), strict=True)):
            texts = row.texts
            sizes = [len(text.encode()) for text in texts]
            slot = self.counts.add_record(file, row, tokens, texts, sizes)
            if len(tokens.input_ids):
                is_document[number] = True
                documents.append(self._document(slot, file, row, tokens, sizes))
        sides = np.full(len(rows), DROPPED, np.uint8)
        if documents:
            sides[is_document] = np.concatenate([self._write(group) for group in document_groups(documents)])
        self.sides += sides.tobytes()

    def _document(
        self, slot: int, file: int, row: Row, tokens: tokenization.Tokenized, sizes: Sequence[int]
    ) -> Document:
        token_bytes = None
        # A conversation is never longer, and never begins with a trained token.
        is_cut = len(tokens.input_ids) > self._settings.max_length
        if isinstance(row, PretrainRow) and (is_cut or not tokenization.opening_marks(self._encoder)):
            tokens = tokens.as_arrays()
            token_bytes = tokenization.pretrain_token_bytes(row, tokens, encoder=self._encoder)
        target_bytes = row.target_bytes(sizes, exchanges=tokens.exchanges)
        return Document(slot, file, target_bytes, is_held_out(row, self._settings), tokens, token_bytes)

    def _write(self, documents: Sequence[Document]) -> np.ndarray:
        """Cut a group of documents and write the pieces that carry a loss. Returns the side of each document."""
        max_length, overlong = self._settings.max_length, self._settings.overlong
        coded = coded_tokens(documents)
        pieces = cut_documents(documents, coded, first_number=self._documents, max_length=max_length, overlong=overlong)
        has_loss = pieces["predicted"] > 0
        self.counts.add_cuts(documents, max_length=max_length, overlong=overlong)
        self.counts.add_pieces(pieces, has_loss)
        kept = pieces[has_loss]
        for tokens in self._writer.write(coded, kept):
            count_unknown(self.counts.ledger, tokens, self._encoder.unk_id)
        sides = np.full(len(documents), DROPPED, np.uint8)
        sides[kept["document"] - self._documents] = np.where(kept["held_out"], HELD_OUT, TRAINED_ON)
        self._documents += len(documents)
        return sides


class BatchTokenizer(Protocol):
    """Tokenizes checked rows, a batch at a time."""

    def accept(self, row: Row) -> Row:
        """Add a row to the batch, and return it with the notes that tokenizing it adds.

        Raises:
            RowError: it cannot be tokenized.
        """

    def finish(self) -> list[tokenization.Tokenized]:
        """The tokens of each row of the batch; begins the next one."""


class _EncodedTogether(BatchTokenizer):
    """Encodes the texts of all rows of a batch together, which is fastest. Every checked row can be encoded."""

    def __init__(self, tokenize: Callable[[Sequence[Any]], list[tokenization.Tokenized]]):
        self._tokenize = tokenize
        self._rows: list[Row] = []

    def accept(self, row: Row) -> Row:
        self._rows.append(row)
        return row

    def finish(self) -> list[tokenization.Tokenized]:
        rows, self._rows = self._rows, []
        return self._tokenize(rows)


class _Rendered(BatchTokenizer):
    """Renders one conversation after the other: its template may refuse any of them."""

    def __init__(self, tokenizer: ChatTokenizer, max_length: int):
        self._tokenizer, self._max_length = tokenizer, max_length
        self._tokenized: list[tokenization.Tokenized] = []

    def accept(self, row: Row) -> Row:
        assert isinstance(row, SftRow)
        tokens, notes = tokenize_chat(row, tokenizer=self._tokenizer, max_length=self._max_length)
        self._tokenized.append(tokens)
        return row._replace(notes=row.notes + notes)

    def finish(self) -> list[tokenization.Tokenized]:
        tokenized, self._tokenized = self._tokenized, []
        return tokenized


def _tokenizer_of(task: UnitTask, encoder: Encoder) -> BatchTokenizer:
    """What tokenizes checked rows of the stage."""
    batch_characters = task.sizes.batch_characters
    if task.settings.stage == "pretrain":
        return _EncodedTogether(
            partial(tokenization.tokenize_pretrain, encoder=encoder, batch_characters=batch_characters)
        )
    rendering = chat_tokenizer_of(task.settings, task.tokenizer_dir)
    if rendering is not None:
        return _Rendered(rendering, task.settings.max_length)
    return _EncodedTogether(
        partial(
            tokenization.tokenize_sft,
            encoder=encoder,
            batch_characters=batch_characters,
            max_length=task.settings.max_length,
            prefix_after_marks=task.settings.prefix_after_marks,
        )
    )
