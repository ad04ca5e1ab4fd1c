"""A checked record to `input_ids` and `labels`, for pre-training and for fine-tuning.

Marks are added as ids. Each stretch of text with its own mask is encoded separately, so that no token crosses a border
of the mask. Rows come in batches, with which the encoder is fastest.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from colossal_llama2.chat.marks import NO_NAMES
from colossal_llama2.corpus.category_names import NO_CATEGORY_SFT
from colossal_llama2.corpus.conversation import (
    Conversation,
    Segment,
    Turn,
    message_segments,
    opening_text,
    read_conversation,
)
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write.records import PretrainRow, SftRow
from colossal_llama2.encoding.encoder import Encoder

if TYPE_CHECKING:
    from colossal_llama2.encoding.encoder import TokenIds

# Distinct texts of a batch that have more characters together are encoded to arrays. A usual batch has a quarter.
BATCH_CHARACTERS = 4 << 20


# Reasons why tokens of a record go into no sample.
NO_ANSWER = "conversations without an answer"
FIRST_EXCHANGE_TOO_LONG = "conversations whose first exchange is over max_length"
LATER_EXCHANGES_TOO_LONG = "conversations cut after the last turn that fits"
UNANSWERED = "conversations whose last messages have no answer"
ALL_MASKED = "conversations whose answers are all masked"
TRAINED_TOO_LONG = "conversations whose first trained answer ends over max_length"
MASKED_DOCUMENTS = "documents masked by a loss mark"


class Drop(NamedTuple):
    """`tokens` of one record that go into no sample, and the reason."""

    reason: str
    tokens: int


class Tokenized(NamedTuple):
    """One record as tokens. `input_ids` and `labels` have the same length, and are empty if the record is dropped.

    For a conversation, they hold the leading `exchanges`. For a long pre-training document they are (tokens,) int32
    arrays, which take a tenth of the memory of lists.
    """

    input_ids: "TokenIds"
    labels: "TokenIds"
    tokens_in: int
    drops: tuple[Drop, ...] = ()
    exchanges: int = 0

    def as_arrays(self) -> "Tokenized":
        """The same with arrays for lists; a single one if ids and labels are the same list."""
        ids = token_array(self.input_ids)
        return self._replace(input_ids=ids, labels=ids if self.labels is self.input_ids else token_array(self.labels))


def token_array(ids: "TokenIds") -> np.ndarray:
    """(tokens,) int32: a list as an array, or the array itself."""
    return ids if isinstance(ids, np.ndarray) else np.frombuffer(bytearray(packed(ids)), np.int32)


def packed(ids: Sequence[int]) -> bytes:
    """The bytes of a list as int32. numpy's and array's conversions take twice the time."""
    return struct.pack(f"{len(ids)}i", *ids)


def tokenize_pretrain(
    rows: Sequence[PretrainRow], *, encoder: Encoder, batch_characters: int = BATCH_CHARACTERS
) -> list[Tokenized]:
    """Each row as <s> + source + target + </s>, of any length: `document_pieces` cuts it later.

    Labels are the ids; with a source, <s> and the source are -100. A row that a loss mark masks is dropped. Without a
    mark for the beginning (see `Encoder`), there is no <s>.
    """
    opening = opening_marks(encoder)
    has_long = encoder.is_long(max(chain.from_iterable((row.target, row.source) for row in rows), key=len, default=""))
    are_long = [has_long and (encoder.is_long(row.target) or encoder.is_long(row.source)) for row in rows]
    others = [row for row, is_long_row in zip(rows, are_long, strict=True) if not is_long_row]
    encode = partial(_encode_each, encoder=encoder, batch_characters=batch_characters)
    openings = encode((row.source or row.target for row in others), dummy_prefix=True)
    continuations = encode((row.target for row in others if row.source), dummy_prefix=False)
    sources = {row.source for row in others}
    complete: dict[str, TokenIds] = {}
    tokenized = []
    input_ids: TokenIds
    labels: TokenIds
    for row, is_long_row in zip(rows, are_long, strict=True):
        if is_long_row:
            input_ids, labels = _long_ids_and_labels(row, encoder=encoder)
        elif row.source:
            source = [*opening, *openings[row.source]]
            target = [*continuations[row.target], encoder.eos_id]
            input_ids, labels = [*source, *target], [IGNORE_INDEX] * len(source) + target
        else:
            if row.target not in complete:
                ids = openings[row.target]
                complete[row.target] = _with_marks(ids, encoder=encoder, in_place=row.target not in sources)
            # Not copies, because none of them is changed.
            labels = input_ids = complete[row.target]
        tokens = Tokenized(input_ids, labels, len(input_ids))
        tokenized.append(_dropped(tokens) if row.is_masked else tokens)
    return tokenized


def opening_marks(encoder: Encoder) -> list[int]:
    """The ids before a document: <s>, or none if the tokenizer has no such mark."""
    return [encoder.bos_id] if encoder.bos_id >= 0 else []


def message_mark(encoder: Encoder) -> int:
    """The id before a message: <s>, or </s> if the tokenizer has no <s>, since something must part name and message."""
    return encoder.bos_id if encoder.bos_id >= 0 else encoder.eos_id


def _with_marks(ids: "TokenIds", *, encoder: Encoder, in_place: bool) -> "TokenIds":
    """The ids of a document between its marks. Copying all lists would take a tenth of the time of encoding."""
    opening = opening_marks(encoder)
    if not in_place or not isinstance(ids, list):
        return [*opening, *ids, encoder.eos_id]
    ids[:0] = opening
    ids.append(encoder.eos_id)
    return ids


def _dropped(tokens: Tokenized) -> Tokenized:
    return Tokenized([], [], tokens.tokens_in, (Drop(MASKED_DOCUMENTS, tokens.tokens_in),))


def _long_ids_and_labels(row: PretrainRow, *, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """The ids and labels of a row, as (tokens,) int32 arrays; the same array if everything is trained."""
    marks = [np.array(ids, np.int32) for ids in (opening_marks(encoder), [encoder.eos_id])]
    source = [encoder.encode_long(row.source)] if row.source else []
    target = encoder.encode_long(row.target, dummy_prefix=not row.source)
    labels = input_ids = np.concatenate([marks[0], *source, target, marks[1]])
    if source:
        labels = input_ids.copy()
        labels[: len(marks[0]) + len(source[0])] = IGNORE_INDEX
    return input_ids, labels


def pretrain_token_bytes(row: PretrainRow, tokens: Tokenized, *, encoder: Encoder) -> np.ndarray:
    """(tokens,) int32: the UTF-8 bytes of the target that each token of a row from `tokenize_pretrain` stands for.

    They sum to the size of the target; marks and the source count 0.
    """
    sizes = np.zeros(len(tokens.input_ids), np.int32)
    # After <s>, or after <s> and the source, which are masked.
    start = (
        int(np.count_nonzero(np.asarray(tokens.labels) == IGNORE_INDEX)) if row.source else len(opening_marks(encoder))
    )
    ids = tokens.input_ids[start:-1]
    sizes[start:-1] = encoder.bytes_of_tokens(row.target, ids, dummy_prefix=not row.source)
    return sizes


def tokenize_sft(
    rows: Sequence[SftRow],
    *,
    encoder: Encoder,
    max_length: int,
    prefix_after_marks: bool = False,
    batch_characters: int = BATCH_CHARACTERS,
) -> list[Tokenized]:
    """Each conversation as one sample of at most `max_length` tokens, by the template of `conversation`.

    With `prefix_after_marks`, each text is encoded with its own prefix, as the tokenizer does in transformers (see
    `Encoder.puts_prefix_after_marks`); otherwise only the first one is.

    Complete leading exchanges are kept while they fit. `drops` lists the rest: exchanges that do not fit, closing
    messages without an answer, and entire conversations without a trained answer that fits.
    """
    plans = [_exchange_segments(row.conversation) for row in rows]
    texts = [[segment.text for exchange in plan for segment in exchange] for plan in plans]
    encode = partial(_encode_each, encoder=encoder, batch_characters=batch_characters)
    first_ids = encode((text[0] for text in texts), dummy_prefix=True)
    later_ids = encode((part for text in texts for part in text[1:]), dummy_prefix=prefix_after_marks)
    tokenized = []
    for row, plan in zip(rows, plans, strict=True):
        exchanges = [[_Encoded(later_ids[segment.text], segment) for segment in exchange] for exchange in plan[1:]]
        opening, *rest = plan[0]
        head = [_Encoded(later_ids[segment.text], segment) for segment in rest]
        exchanges.insert(0, [_Encoded(first_ids[opening.text], opening), *head])
        is_trained = [exchange[-1].is_trained for exchange in row.conversation.exchanges]
        tokenized.append(_keep_what_fits(exchanges, is_trained=is_trained, max_length=max_length, encoder=encoder))
    return tokenized


def smallest_exchange(encoder: Encoder, *, prefix_after_marks: bool) -> int:
    """The number of tokens of two empty messages with the template's own system text."""
    empty = read_conversation([Turn("human", ""), Turn("assistant", "")])
    row = SftRow(empty, NO_CATEGORY_SFT, "")
    (tokens,) = tokenize_sft([row], encoder=encoder, max_length=2**20, prefix_after_marks=prefix_after_marks)
    return tokens.tokens_in


def _exchange_segments(conversation: Conversation) -> list[list[Segment]]:
    """One list of segments per exchange; unanswered messages, if there are any, are the last list."""
    groups = [*conversation.exchanges, *([conversation.unanswered] if conversation.unanswered else [])]
    openings = [opening_text(conversation), *[""] * (len(groups) - 1)]
    return [message_segments(group, opening=opening) for group, opening in zip(groups, openings, strict=True)]


class _Encoded(NamedTuple):
    """The ids of a segment's text, a list or an int32 array."""

    ids: "TokenIds"
    segment: Segment

    @property
    def num_tokens(self) -> int:
        """Including the marks around it."""
        return len(self.ids) + 2 * self.segment.is_marked


def _keep_what_fits(
    exchanges: Sequence[Sequence[_Encoded]], *, is_trained: Sequence[bool], max_length: int, encoder: Encoder
) -> Tokenized:
    """Join leading exchanges up to `max_length`, if one of them is trained. Only these become lists of tokens.

    `is_trained` has an entry per answer; exchanges beyond that number have no answer.
    """
    lengths = [sum(encoded.num_tokens for encoded in exchange) for exchange in exchanges]
    # The <s> before everything.
    lengths[0] += len(opening_marks(encoder))
    num_answered = len(is_trained)
    kept = total = 0
    while kept < num_answered and total + lengths[kept] <= max_length:
        total += lengths[kept]
        kept += 1
    everything = sum(lengths)
    if not any(is_trained[:kept]):
        reason = why_nothing_remains(is_trained, kept)
        return Tokenized([], [], everything, (Drop(reason, everything),))
    left_out = {
        LATER_EXCHANGES_TOO_LONG: sum(lengths[kept:num_answered]),
        UNANSWERED: sum(lengths[num_answered:]),
    }
    input_ids, labels = _joined(chain(*exchanges[:kept]), encoder=encoder)
    drops = tuple(Drop(reason, tokens) for reason, tokens in left_out.items() if tokens)
    return Tokenized(input_ids, labels, everything, drops, kept)


def _joined(segments: Iterable[_Encoded], *, encoder: Encoder) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation's segments. The mask is from `is_trained`."""
    input_ids = opening_marks(encoder)
    labels = [IGNORE_INDEX] * len(input_ids)
    for ids, segment in segments:
        spoken: list[int] = ids if isinstance(ids, list) else np.asarray(ids).tolist()
        if segment.is_marked:
            input_ids.append(message_mark(encoder))
            labels.append(IGNORE_INDEX)
            spoken = [*spoken, encoder.eos_id]
        input_ids += spoken
        labels += spoken if segment.is_trained else [IGNORE_INDEX] * len(spoken)
    return input_ids, labels


def why_nothing_remains(is_trained: Sequence[bool], kept: int) -> str:
    """The reason why a conversation is dropped: `kept` leading exchanges fit, and none of these is trained."""
    if not is_trained:
        return NO_ANSWER
    if not any(is_trained):
        return ALL_MASKED
    return TRAINED_TOO_LONG if kept else FIRST_EXCHANGE_TOO_LONG


def decode_marked(ids: Sequence[int], *, encoder: Encoder, names: Mapping[int, str] = NO_NAMES) -> str:
    """The text of `ids` for a reader, with the marks shown where their ids stand; `names` are those of other marks."""
    parts: list[str] = []
    run: list[int] = []
    marks = {**names, encoder.bos_id: encoder.bos_text, encoder.eos_id: encoder.eos_text}
    for token in map(int, ids):
        if token in marks:
            parts += [encoder.decode(run), marks[token]]
            run = []
        else:
            run.append(token)
    return "".join([*parts, encoder.decode(run)])


def decode_trained(labels: Sequence[int], *, encoder: Encoder, names: Mapping[int, str] = NO_NAMES) -> list[str]:
    """The text of each run of trained labels, with the marks shown: what the model learns to produce, turn by turn."""
    runs = groupby(map(int, labels), key=lambda label: label != IGNORE_INDEX)
    return [decode_marked(list(run), encoder=encoder, names=names) for is_trained, run in runs if is_trained]


def _encode_each(
    texts: Iterable[str], *, encoder: Encoder, dummy_prefix: bool, batch_characters: int
) -> dict[str, "TokenIds"]:
    """A mapping of texts to ids. Each distinct text is encoded once: names and system texts recur in conversations.

    The ids of a long text are an array, and so are those of all texts if they exceed `batch_characters` together, as
    in a conversation that is far larger than a batch.
    """
    distinct = dict.fromkeys(texts)
    distinct.pop("", None)
    is_much = sum(map(len, distinct)) > batch_characters
    has_long = is_much or encoder.is_long(max(distinct, key=len, default=""))
    others = [text for text in distinct if not (is_much or encoder.is_long(text))] if has_long else list(distinct)
    ids: dict[str, TokenIds] = dict(zip(others, encoder.encode(others, dummy_prefix=dummy_prefix), strict=True))
    for text in distinct if has_long else ():
        if text not in ids:
            ids[text] = encoder.encode_long(text, dummy_prefix=dummy_prefix)
    ids[""] = []
    return ids
