"""One raw record to `input_ids` and `labels`, for pre-training and for fine-tuning.

Marks are added as ids, and each stretch of text with a mask of its own is encoded by itself, so that no token spans a
border of the mask. Rows come in batches, because the encoder is fastest that way.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.corpus.category_names import NO_CATEGORY_SFT
from colossal_llama2.corpus.conversation import (
    ROLES,
    Conversation,
    Segment,
    Turn,
    message_segments,
    opening_text,
    read_conversation,
)
from colossal_llama2.corpus.loss_marks import ALL_MARKS, read_mark
from colossal_llama2.corpus.message_formats import LISTS, NOT_TEXT, RECORDS_INSIDE, recognize, where_records_lie
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.encoding.safe_cuts import is_long
from colossal_llama2.storage.row_errors import RowError

if TYPE_CHECKING:
    import numpy as np

    from colossal_llama2.dataset.layout.prepare_settings import Settings

# Characters. A batch of rows has a quarter of them, and one more row.
MUCH_TEXT = 4 << 20
NO_CATEGORY_PRETRAIN = "unknown"

NO_ANSWER = "conversations without an answer"
FIRST_EXCHANGE_TOO_LONG = "conversations whose first exchange is over max_length"
LATER_EXCHANGES_TOO_LONG = "conversations cut after the last turn that fits"
UNANSWERED = "conversations whose last messages have no answer"
ALL_MASKED = "conversations whose answers are all masked"
TRAINED_TOO_LONG = "conversations whose first trained answer ends over max_length"
MASKED_DOCUMENTS = "documents masked by a loss mark"

# Reasons.
NO_TARGET = 'no "target" or "text"'
CONVERSATIONS = "this looks like SFT data: use prepare_sft_dataset.py"
EMPTY_TARGET = 'an empty "target" or "text"'
# Notes.
OTHER_MARKS = "documents with an unusual loss mark, ignored"
BOTH_TEXTS = 'records with "target" and "text", of which "target" is read'


class PretrainRow(NamedTuple):
    """A checked pre-training record. `notes` are counted in the account. One that `is_masked` goes into no sample."""

    source: str
    target: str
    category: str
    notes: tuple[str, ...] = ()
    is_masked: bool = False


class SftRow(NamedTuple):
    """A checked fine-tuning record.

    `format` is the name of the one that it came in, of `message_formats.FORMATS`. `notes` are counted in the account.
    """

    conversation: Conversation
    category: str
    format: str
    notes: tuple[str, ...] = ()


class Drop(NamedTuple):
    """`tokens` of one record that go into no sample, and why."""

    reason: str
    tokens: int


class Tokenized(NamedTuple):
    """One record as tokens. `input_ids` and `labels` are equally long, and empty if the whole record is dropped.

    `exchanges` of a conversation, the leading ones, are in them.
    Those of a long pre-training document are (tokens,) int32 arrays, which take a tenth of the memory of lists.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    tokens_in: int
    drops: tuple[Drop, ...] = ()
    exchanges: int = 0


def row_reader(settings: "Settings") -> Callable[[dict[str, Any]], Any]:
    """The function that checks a record as a prepare command of these settings does: a PretrainRow or an SftRow."""
    if settings.stage == "pretrain":
        return read_pretrain_document
    return partial(read_sft_row, speakers=settings.speakers, masks_opening=settings.masks_opening)


def read_pretrain_row(row: dict[str, Any]) -> PretrainRow:
    """Check a record of {"source", "target", "category"}; raises RowError with the reason.

    "text" is read where "target" is absent.
    """
    name = "target"
    target, notes = row.get(name), ()
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
    """What to say of a record without text: its fields, and the cure."""
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
    """Whether a loss mark masks the document, and notes. A document may have such a field that is no mark."""
    try:
        return read_mark(row, "the record") is False, ()
    except RowError:
        return False, (OTHER_MARKS,)


def read_pretrain_document(row: dict[str, Any]) -> PretrainRow:
    """The same for a record that is trained on: an empty target is a mistake too."""
    document = read_pretrain_row(row)
    if not document.target:
        name = "text" if is_absent(row.get("target")) else "target"
        raise RowError(f'"{name}" is empty', reason=EMPTY_TARGET)
    return document


def read_sft_row(row: dict[str, Any], *, speakers: Mapping[str, str] = ROLES, masks_opening: bool = True) -> SftRow:
    """Check a record of a conversation in any of `message_formats.FORMATS`; raises RowError with the reason.

    `speakers` and `masks_opening` are those of `read_conversation`.
    """
    turns, system_text, name, notes = recognize(row)
    conversation = read_conversation(turns, system_text=system_text, speakers=speakers, masks_opening=masks_opening)
    category = _category(row, default=NO_CATEGORY_SFT)
    return SftRow(conversation, category, name, notes + conversation.notes)


def _category(row: dict[str, Any], *, default: str) -> str:
    """The category of a record: a text, or the text of a number or truth value."""
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


def tokenize_pretrain(rows: Sequence[PretrainRow], *, encoder) -> list[Tokenized]:
    """Each row as <s> + source + target + </s>, however long: fitting it into samples is the work of `splicing`.

    Labels are the ids; with a source, <s> and the source are -100. A row that a loss mark masks is dropped.
    """
    are_long = [_has_long_text(row) for row in rows]
    others = [row for row, is_long_row in zip(rows, are_long, strict=True) if not is_long_row]
    openings = _encode_each((row.source or row.target for row in others), encoder=encoder, dummy_prefix=True)
    continuations = _encode_each((row.target for row in others if row.source), encoder=encoder, dummy_prefix=False)
    tokenized = []
    for row, is_long_row in zip(rows, are_long, strict=True):
        if is_long_row:
            input_ids, labels = _long_ids_and_labels(row, encoder=encoder)
        elif row.source:
            source = [encoder.bos_id, *openings[row.source]]
            input_ids = [*source, *continuations[row.target], encoder.eos_id]
            labels = [IGNORE_INDEX] * len(source) + input_ids[len(source) :]
        else:
            # No copy: nobody changes either.
            labels = input_ids = [encoder.bos_id, *openings[row.target], encoder.eos_id]
        tokenized.append(Tokenized(input_ids, labels, len(input_ids)))
    return [_dropped(tokens) if row.is_masked else tokens for row, tokens in zip(rows, tokenized, strict=True)]


def _dropped(tokens: Tokenized) -> Tokenized:
    return Tokenized([], [], tokens.tokens_in, (Drop(MASKED_DOCUMENTS, tokens.tokens_in),))


def _has_long_text(row: PretrainRow) -> bool:
    return is_long(row.target) or is_long(row.source)


def _long_ids_and_labels(row: PretrainRow, *, encoder) -> tuple["np.ndarray", "np.ndarray"]:
    """The ids and labels of a row, as (tokens,) int32 arrays, or one array where all is trained."""
    import numpy as np

    marks = [np.array([mark], np.int32) for mark in (encoder.bos_id, encoder.eos_id)]
    source = [encoder.encode_long(row.source)] if row.source else []
    target = encoder.encode_long(row.target, dummy_prefix=not row.source)
    labels = input_ids = np.concatenate([marks[0], *source, target, marks[1]])
    if source:
        labels = input_ids.copy()
        labels[: 1 + len(source[0])] = IGNORE_INDEX
    return input_ids, labels


def pretrain_token_bytes(row: PretrainRow, tokens: Tokenized, *, encoder) -> "np.ndarray":
    """(tokens,) int32: the UTF-8 bytes of the target that each token of a row of `tokenize_pretrain` stands for.

    They sum to those of the target; marks and the source have none.
    """
    import numpy as np

    sizes = np.zeros(len(tokens.input_ids), np.int32)
    # Behind <s>, or behind <s> and the source, which are masked.
    start = int(np.count_nonzero(np.asarray(tokens.labels) == IGNORE_INDEX)) if row.source else 1
    ids = tokens.input_ids[start:-1]
    sizes[start:-1] = encoder.bytes_of_tokens(row.target, ids, dummy_prefix=not row.source)
    return sizes


def tokenize_sft(
    rows: Sequence[SftRow], *, encoder, max_length: int, prefix_after_marks: bool = False
) -> list[Tokenized]:
    """Each conversation as one sample of at most `max_length` tokens, by the template of `conversation`.

    `prefix_after_marks` gives each text a leading "▁" of its own, as the folder's tokenizer does in transformers (see
    `tokenizer.puts_prefix_after_marks`); otherwise the first alone has one.

    Whole leading exchanges are kept while they fit. What is left out is told in `drops`: exchanges that do not fit,
    closing messages without an answer, and whole conversations of which no trained answer remains.
    """
    plans = [_exchange_segments(row.conversation) for row in rows]
    texts = [[segment.text for exchange in plan for segment in exchange] for plan in plans]
    first_ids = _encode_each((text[0] for text in texts), encoder=encoder, dummy_prefix=True)
    later_texts = (part for text in texts for part in text[1:])
    later_ids = _encode_each(later_texts, encoder=encoder, dummy_prefix=prefix_after_marks)
    tokenized = []
    for row, plan in zip(rows, plans, strict=True):
        exchanges = [[_Encoded(later_ids[segment.text], segment) for segment in exchange] for exchange in plan[1:]]
        opening, *rest = plan[0]
        head = [_Encoded(later_ids[segment.text], segment) for segment in rest]
        exchanges.insert(0, [_Encoded(first_ids[opening.text], opening), *head])
        is_trained = [exchange[-1].is_trained for exchange in row.conversation.exchanges]
        tokenized.append(_keep_what_fits(exchanges, is_trained=is_trained, max_length=max_length, encoder=encoder))
    return tokenized


def smallest_exchange(encoder, *, prefix_after_marks: bool) -> int:
    """Tokens of a conversation of two empty messages with the template's own system text."""
    empty = read_conversation([Turn("human", ""), Turn("assistant", "")])
    row = SftRow(empty, NO_CATEGORY_SFT, "")
    (tokens,) = tokenize_sft([row], encoder=encoder, max_length=2**20, prefix_after_marks=prefix_after_marks)
    return tokens.tokens_in


def _exchange_segments(conversation: Conversation) -> list[list[Segment]]:
    """One list of segments per exchange; the unanswered messages, if any, make the last one."""
    groups = [*conversation.exchanges, *([conversation.unanswered] if conversation.unanswered else [])]
    openings = [opening_text(conversation), *[""] * (len(groups) - 1)]
    return [message_segments(group, opening=opening) for group, opening in zip(groups, openings, strict=True)]


class _Encoded(NamedTuple):
    """The ids of a segment's text, a list or an int32 array."""

    ids: Sequence[int]
    segment: Segment

    @property
    def num_tokens(self) -> int:
        """With the marks around it."""
        return len(self.ids) + 2 * self.segment.is_marked


def _keep_what_fits(
    exchanges: Sequence[Sequence[_Encoded]], *, is_trained: Sequence[bool], max_length: int, encoder
) -> Tokenized:
    """Join leading exchanges up to `max_length`, if one of them is trained. No others become lists of tokens.

    `is_trained` is of the answers; exchanges beyond their number have none.
    """
    lengths = [sum(encoded.num_tokens for encoded in exchange) for exchange in exchanges]
    # The <s> in front of everything.
    lengths[0] += 1
    num_answered = len(is_trained)
    kept = total = 0
    while kept < num_answered and total + lengths[kept] <= max_length:
        total += lengths[kept]
        kept += 1
    everything = sum(lengths)
    if not any(is_trained[:kept]):
        reason = _why_nothing_remains(is_trained, kept)
        return Tokenized([], [], everything, (Drop(reason, everything),))
    left_out = {
        LATER_EXCHANGES_TOO_LONG: sum(lengths[kept:num_answered]),
        UNANSWERED: sum(lengths[num_answered:]),
    }
    input_ids, labels = _joined(chain(*exchanges[:kept]), encoder=encoder)
    drops = tuple(Drop(reason, tokens) for reason, tokens in left_out.items() if tokens)
    return Tokenized(input_ids, labels, everything, drops, kept)


def _joined(segments: Iterable[_Encoded], *, encoder) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation's segments; the mask follows `is_trained`, never the marks."""
    input_ids, labels = [encoder.bos_id], [IGNORE_INDEX]
    for ids, segment in segments:
        spoken = ids if isinstance(ids, list) else ids.tolist()
        if segment.is_marked:
            input_ids.append(encoder.bos_id)
            labels.append(IGNORE_INDEX)
            spoken = [*spoken, encoder.eos_id]
        input_ids += spoken
        labels += spoken if segment.is_trained else [IGNORE_INDEX] * len(spoken)
    return input_ids, labels


def _why_nothing_remains(is_trained: Sequence[bool], kept: int) -> str:
    if not is_trained:
        return NO_ANSWER
    if not any(is_trained):
        return ALL_MASKED
    return TRAINED_TOO_LONG if kept else FIRST_EXCHANGE_TOO_LONG


def decode_marked(ids: Sequence[int], *, encoder) -> str:
    """The text of `ids` for a reader, with <s> and </s> shown where their ids stand."""
    parts: list[str] = []
    run: list[int] = []
    marks = {encoder.bos_id: "<s>", encoder.eos_id: "</s>"}
    for token in map(int, ids):
        if token in marks:
            parts += [encoder.decode(run), marks[token]]
            run = []
        else:
            run.append(token)
    return "".join([*parts, encoder.decode(run)])


def decode_trained(labels: Sequence[int], *, encoder) -> list[str]:
    """The text of each run of trained labels, with the marks shown: what the model learns to say, turn by turn."""
    runs = groupby(map(int, labels), key=lambda label: label != IGNORE_INDEX)
    return [decode_marked(list(run), encoder=encoder) for is_trained, run in runs if is_trained]


def _encode_each(texts: Iterable[str], *, encoder, dummy_prefix: bool) -> dict[str, Sequence[int]]:
    """Text to ids, each distinct text encoded once: names and system texts recur in every conversation.

    Those of a long text are an array, and so are all of a conversation that is far larger than a batch.
    """
    distinct = [text for text in dict.fromkeys(texts) if text]
    is_much = sum(map(len, distinct)) > MUCH_TEXT
    others = [text for text in distinct if not (is_much or is_long(text))]
    ids = dict(zip(others, encoder.encode(others, dummy_prefix=dummy_prefix), strict=True))
    long = (text for text in distinct if text not in ids)
    return {"": [], **ids, **{text: encoder.encode_long(text, dummy_prefix=dummy_prefix) for text in long}}
