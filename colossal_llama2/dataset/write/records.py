"""Check a raw record: a `PretrainRow` or an `SftRow`, or a RowError with the reason and the cure."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.corpus.category_names import NO_CATEGORY_SFT
from colossal_llama2.corpus.conversation import ROLES, SYSTEM_TEXT, Conversation, read_conversation
from colossal_llama2.corpus.loss_marks import ALL_MARKS, read_mark
from colossal_llama2.corpus.message_formats import LISTS, NOT_TEXT, RECORDS_INSIDE, recognize, where_records_lie
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.storage.row_errors import RowError

if TYPE_CHECKING:
    from colossal_llama2.dataset.layout.prepare_settings import Settings

NO_CATEGORY_PRETRAIN = "unknown"

# Reasons why a record is a bad row.
NO_TARGET = 'no "target" or "text"'
CONVERSATIONS = "this looks like SFT data: use prepare_sft_dataset.py"
NO_TOKEN = "a character that the tokenizer cannot encode"
EMPTY_TARGET = 'an empty "target" or "text"'
# Notes: what is counted of records that are used.
OTHER_MARKS = "documents with an unusual loss mark, ignored"
BOTH_TEXTS = 'records with "target" and "text", of which "target" is read'


class Row(Protocol):
    """A checked record of either stage, as the rest of data preparation sees it.

    Attributes:
        category: counted by it, and written with its pieces.
        notes: counted in the token ledger.
    """

    @property
    def category(self) -> str: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def format(self) -> str | None:
        """The name of its conversation format in `message_formats.FORMATS`; None for pre-training records."""

    @property
    def texts(self) -> list[str]:
        """Every text of the record, in the order of the input."""

    @property
    def identity_texts(self) -> list[str]:
        """The texts whose hash decides whether the record is held out."""

    @property
    def measured_texts(self) -> list[str]:
        """The texts that an evaluation measures if the record is held out."""

    @property
    def seen_texts(self) -> list[str]:
        """The texts that the model sees if the record is trained on, without system texts."""

    def target_bytes(self, sizes: Sequence[int], *, exchanges: int) -> int:
        """UTF-8 bytes of the text that carries the loss.

        Args:
            sizes: UTF-8 bytes of each of `texts`.
            exchanges: how many leading exchanges of a conversation are kept.
        """


class PretrainRow(NamedTuple):
    """A checked pre-training record. One that `is_masked` goes into no sample."""

    source: str
    target: str
    category: str
    notes: tuple[str, ...] = ()
    is_masked: bool = False

    @property
    def format(self) -> None:
        """Pre-training records have one format only."""
        return None

    @property
    def texts(self) -> list[str]:
        """Source and target."""
        return [self.source, self.target]

    @property
    def identity_texts(self) -> list[str]:
        """The target: records that differ only in their source are on the same side."""
        return [self.target]

    @property
    def measured_texts(self) -> list[str]:
        """The target."""
        return [self.target]

    @property
    def seen_texts(self) -> list[str]:
        """Source and target."""
        return [self.source, self.target]

    def target_bytes(self, sizes: Sequence[int], *, exchanges: int) -> int:
        """Those of the target."""
        return sizes[-1]


class SftRow(NamedTuple):
    """A checked fine-tuning record. `format` is its format, one of `message_formats.FORMATS`."""

    conversation: Conversation
    category: str
    format: str
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The system text, then of each message its own system text and its text."""
        messages = chain(*self.conversation.exchanges, self.conversation.unanswered)
        texts = (text for message in messages for text in (message.system_text, message.text))
        return [self.conversation.system_text, *texts]

    @property
    def identity_texts(self) -> list[str]:
        """Every message up to the last answer, without system texts."""
        return [message.text for message in chain(*self.conversation.exchanges)]

    @property
    def measured_texts(self) -> list[str]:
        """The trained answers."""
        return [message.text for message in chain(*self.conversation.exchanges) if message.is_trained]

    @property
    def seen_texts(self) -> list[str]:
        """Every message up to the last answer, without system texts."""
        return self.identity_texts

    def target_bytes(self, sizes: Sequence[int], *, exchanges: int) -> int:
        """Those of the trained answers of the exchanges that are kept."""
        answers = (exchange[-1] for exchange in self.conversation.exchanges[:exchanges])
        return sum(len(answer.text.encode()) for answer in answers if answer.is_trained)


def check_encodable(row: Row, encoder: Encoder) -> Row:
    """Return a checked record if its texts can be encoded. Raises RowError for a byte that has no token."""
    for text in row.texts:
        problem = encoder.problem_of(text)
        if problem:
            raise RowError(problem, reason=NO_TOKEN)
    return row


def row_reader(settings: "Settings") -> Callable[[dict[str, Any]], Row]:
    """The function that checks a record as a prepare command with these settings does."""
    if settings.stage == "pretrain":
        return read_pretrain_document
    # Another template has a system text of its own, or none.
    default_system = "" if settings.template_text else SYSTEM_TEXT
    return partial(
        read_sft_row,
        speakers=settings.speakers,
        masks_opening=settings.masks_opening,
        default_system=default_system,
    )


def read_pretrain_row(row: dict[str, Any]) -> PretrainRow:
    """Check a record of {"source", "target", "category"}. "text" is read if "target" is absent.

    Raises:
        RowError: with the reason and the cure.
    """
    name = "target"
    target = row.get(name)
    notes: tuple[str, ...] = ()
    if "text" in row:
        if is_absent(target):
            name = "text"
            target = row["text"]
        elif not is_absent(row["text"]):
            notes = (BOTH_TEXTS,)
    if not isinstance(target, str):
        raise _no_target(row, name)
    is_masked = False
    if not ALL_MARKS.isdisjoint(row):
        is_masked, note = _is_masked(row)
        notes += note
    source = row.get("source", "")
    if not isinstance(source, str):
        source = _absent_text(row, "source")
    return PretrainRow(source, target, _category(row, default=NO_CATEGORY_PRETRAIN), notes, is_masked)


def _no_target(row: dict[str, Any], name: str) -> RowError:
    """The error for a record without text, with a cure that depends on its fields."""
    if not is_absent(row.get(name)):
        return RowError(f'"{name}" must be a string', reason=NOT_TEXT)
    if any(not is_absent(row.get(field)) for field in (*LISTS, "instruction")):
        return RowError(f'"target" is missing; {CONVERSATIONS}', reason=CONVERSATIONS)
    if place := where_records_lie(row, ("target", "text")):
        return RowError(f'"target" is missing; {place}', reason=RECORDS_INSIDE)
    texts = [field for field, value in row.items() if isinstance(value, str) and field not in ("source", "category")]
    cure = f'; rename the field that holds the text ({", ".join(texts)[:80]}?) to "target"' if texts else ""
    return RowError(f'"target" is missing{cure}', reason=NO_TARGET)


def _is_masked(row: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a loss mark masks the document, and notes. Here, a field of that name may have another meaning."""
    try:
        return read_mark(row, "the record") is False, ()
    except RowError:
        return False, (OTHER_MARKS,)


def read_pretrain_document(row: dict[str, Any]) -> PretrainRow:
    """Like `read_pretrain_row`, for a record to train on: an empty target is refused too."""
    document = read_pretrain_row(row)
    if not document.target:
        name = "text" if is_absent(row.get("target")) else "target"
        raise RowError(f'"{name}" is empty', reason=EMPTY_TARGET)
    return document


def read_sft_row(
    row: dict[str, Any],
    *,
    speakers: Mapping[str, str] = ROLES,
    masks_opening: bool = True,
    default_system: str = SYSTEM_TEXT,
) -> SftRow:
    """Check a record of a conversation in any of `message_formats.FORMATS`.

    `speakers`, `masks_opening` and `default_system` are those of `read_conversation`.

    Raises:
        RowError: with the reason and the cure.
    """
    turns, system_text, name, notes = recognize(row)
    conversation = read_conversation(
        turns,
        system_text=system_text,
        speakers=speakers,
        masks_opening=masks_opening,
        default_system=default_system,
    )
    category = _category(row, default=NO_CATEGORY_SFT)
    return SftRow(conversation, category, name, notes + conversation.notes)


def _category(row: dict[str, Any], *, default: str) -> str:
    """The category of a record: a text, or the JSON text of a number or boolean."""
    value = row.get("category")
    if isinstance(value, str):
        return value
    if is_absent(value):
        return default
    if isinstance(value, (bool, int, float)) and value not in (float("inf"), float("-inf")):
        return json.dumps(value)
    raise RowError('"category" must be a string or a number', reason=NOT_TEXT)


def _absent_text(row: dict[str, Any], name: str) -> str:
    if is_absent(row[name]):
        return ""
    raise RowError(f'"{name}" must be a string', reason=NOT_TEXT)
