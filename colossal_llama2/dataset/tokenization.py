"""One raw record to `input_ids` and `labels`, for pre-training and for fine-tuning.

Marks are added as ids, and each stretch of text with a mask of its own is encoded by itself, so that no token spans a
border of the mask. Rows come in batches, because the encoder is fastest that way.
"""

from itertools import groupby
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, NamedTuple, Sequence, Tuple

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.conversation import (
    Conversation,
    Segment,
    Turn,
    message_segments,
    opening_text,
    read_conversation,
)
from colossal_llama2.dataset.message_formats import recognize

if TYPE_CHECKING:
    import numpy as np

NO_CATEGORY_PRETRAIN = "unknown"
NO_CATEGORY_SFT = "None"

NO_ANSWER = "conversations without an answer"
FIRST_EXCHANGE_TOO_LONG = "conversations whose first exchange is over max_length"
LATER_EXCHANGES_TOO_LONG = "conversations cut after the last turn that fits"
UNANSWERED = "conversations whose last messages have no answer"


class PretrainRow(NamedTuple):
    """A checked pre-training record. `notes` are counted in the account."""

    source: str
    target: str
    category: str
    notes: Tuple[str, ...] = ()


class SftRow(NamedTuple):
    """A checked fine-tuning record.

    `format` is the name of the one that it came in, of `message_formats.FORMATS`. `notes` are counted in the account.
    """

    conversation: Conversation
    category: str
    format: str
    notes: Tuple[str, ...] = ()


class Drop(NamedTuple):
    """`tokens` of one record that go into no sample, and why."""

    reason: str
    tokens: int


class Tokenized(NamedTuple):
    """One record as tokens. `input_ids` and `labels` are equally long, and empty if the whole record is dropped."""

    input_ids: List[int]
    labels: List[int]
    tokens_in: int
    drops: Tuple[Drop, ...] = ()


def read_pretrain_row(row: Dict[str, Any]) -> PretrainRow:
    """Check a record of {"source", "target", "category"}; raises ValueError with the reason."""
    if "target" not in row:
        raise ValueError('"target" is missing')
    if not isinstance(row["target"], str):
        raise ValueError('"target" must be a string')
    source = _optional_text(row, "source", default="")
    return PretrainRow(source, row["target"], _optional_text(row, "category", default=NO_CATEGORY_PRETRAIN))


def read_pretrain_document(row: Dict[str, Any]) -> PretrainRow:
    """The same for a record that is trained on: an empty target is a mistake too."""
    document = read_pretrain_row(row)
    if not document.target:
        raise ValueError('"target" is empty')
    return document


def read_sft_row(row: Dict[str, Any]) -> SftRow:
    """Check a record of a conversation in any of `message_formats.FORMATS`; raises ValueError with the reason."""
    turns, system_text, name = recognize(row)
    conversation = read_conversation(turns, system_text=system_text)
    return SftRow(conversation, _optional_text(row, "category", default=NO_CATEGORY_SFT), name)


def _optional_text(row: Dict[str, Any], name: str, *, default: str) -> str:
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string')
    return value


def tokenize_pretrain(rows: Sequence[PretrainRow], *, encoder) -> List[Tokenized]:
    """Each row as <s> + source + target + </s>, however long: fitting it into samples is the work of `splicing`.

    Labels are the ids; with a source, <s> and the source are -100.
    """
    openings = _encode_each((row.source or row.target for row in rows), encoder=encoder, dummy_prefix=True)
    continuations = _encode_each((row.target for row in rows if row.source), encoder=encoder, dummy_prefix=False)
    tokenized = []
    for row in rows:
        if row.source:
            source = [encoder.bos_id, *openings[row.source]]
            input_ids = [*source, *continuations[row.target], encoder.eos_id]
            labels = [IGNORE_INDEX] * len(source) + input_ids[len(source) :]
        else:
            # No copy: nobody changes either.
            labels = input_ids = [encoder.bos_id, *openings[row.target], encoder.eos_id]
        tokenized.append(Tokenized(input_ids, labels, len(input_ids)))
    return tokenized


def pretrain_token_bytes(row: PretrainRow, tokens: Tokenized, *, encoder) -> "np.ndarray":
    """(tokens,) int64: the UTF-8 bytes of the target that each token of a row of `tokenize_pretrain` stands for.

    They sum to those of the target; marks and the source have none.
    """
    import numpy as np

    sizes = np.zeros(len(tokens.input_ids), np.int64)
    # Behind <s>, or behind <s> and the source, which are masked.
    start = tokens.labels.count(IGNORE_INDEX) or 1
    ids = tokens.input_ids[start:-1]
    sizes[start:-1] = encoder.bytes_of_tokens(row.target, ids, dummy_prefix=not row.source)
    return sizes


def tokenize_sft(
    rows: Sequence[SftRow], *, encoder, max_length: int, prefix_after_marks: bool = False
) -> List[Tokenized]:
    """Each conversation as one sample of at most `max_length` tokens, by the template of `conversation`.

    `prefix_after_marks` gives each text a leading "▁" of its own, as the folder's tokenizer does in transformers (see
    `tokenizer.puts_prefix_after_marks`); otherwise the first alone has one.

    Whole leading exchanges are kept while they fit. What is left out is told in `drops`: exchanges that do not fit,
    closing messages without an answer, and whole conversations of which nothing remains.
    """
    plans = [_exchange_segments(row.conversation) for row in rows]
    texts = [[segment.text for exchange in plan for segment in exchange] for plan in plans]
    first_ids = _encode_each((text[0] for text in texts), encoder=encoder, dummy_prefix=True)
    later_texts = (part for text in texts for part in text[1:])
    later_ids = _encode_each(later_texts, encoder=encoder, dummy_prefix=prefix_after_marks)
    tokenized = []
    for row, plan in zip(rows, plans, strict=True):
        exchanges = [_assemble(exchange, ids=later_ids, encoder=encoder) for exchange in plan[1:]]
        opening, *rest = plan[0]
        input_ids, labels = _assemble(rest, ids=later_ids, encoder=encoder)
        head = [encoder.bos_id, *first_ids[opening.text]]
        exchanges.insert(0, (head + input_ids, [IGNORE_INDEX] * len(head) + labels))
        num_answered = len(row.conversation.exchanges)
        tokenized.append(_keep_what_fits(exchanges, num_answered=num_answered, max_length=max_length))
    return tokenized


def smallest_exchange(encoder, *, prefix_after_marks: bool) -> int:
    """Tokens of a conversation of two empty messages with the template's own system text."""
    empty = read_conversation([Turn("human", ""), Turn("assistant", "")])
    row = SftRow(empty, NO_CATEGORY_SFT, "")
    (tokens,) = tokenize_sft([row], encoder=encoder, max_length=2**20, prefix_after_marks=prefix_after_marks)
    return tokens.tokens_in


def _exchange_segments(conversation: Conversation) -> List[List[Segment]]:
    """One list of segments per exchange; the unanswered messages, if any, make the last one."""
    groups = [*conversation.exchanges, *([conversation.unanswered] if conversation.unanswered else [])]
    openings = [opening_text(conversation), *[""] * (len(groups) - 1)]
    return [message_segments(group, opening=opening) for group, opening in zip(groups, openings, strict=True)]


def _assemble(segments: Sequence[Segment], *, ids: Dict[str, List[int]], encoder) -> Tuple[List[int], List[int]]:
    """Ids and labels of segments whose texts' ids are given; the mask follows `is_trained`, never the marks."""
    input_ids: List[int] = []
    labels: List[int] = []
    for segment in segments:
        spoken = ids[segment.text]
        if segment.is_marked:
            input_ids.append(encoder.bos_id)
            labels.append(IGNORE_INDEX)
            spoken = [*spoken, encoder.eos_id]
        input_ids += spoken
        labels += spoken if segment.is_trained else [IGNORE_INDEX] * len(spoken)
    return input_ids, labels


def _keep_what_fits(exchanges, *, num_answered: int, max_length: int) -> Tokenized:
    """Join leading exchanges up to `max_length`; those from index `num_answered` on have no answer."""
    lengths = [len(input_ids) for input_ids, _ in exchanges]
    kept = total = 0
    while kept < num_answered and total + lengths[kept] <= max_length:
        total += lengths[kept]
        kept += 1
    everything = sum(lengths)
    if kept == 0:
        reason = FIRST_EXCHANGE_TOO_LONG if num_answered else NO_ANSWER
        return Tokenized([], [], everything, (Drop(reason, everything),))
    left_out = {
        LATER_EXCHANGES_TOO_LONG: sum(lengths[kept:num_answered]),
        UNANSWERED: sum(lengths[num_answered:]),
    }
    input_ids = [token for ids, _ in exchanges[:kept] for token in ids]
    labels = [label for _, exchange_labels in exchanges[:kept] for label in exchange_labels]
    drops = tuple(Drop(reason, tokens) for reason, tokens in left_out.items() if tokens)
    return Tokenized(input_ids, labels, everything, drops)


def decode_marked(ids: Sequence[int], *, encoder) -> str:
    """The text of `ids` for a reader, with <s> and </s> shown where their ids stand."""
    parts: List[str] = []
    run: List[int] = []
    marks = {encoder.bos_id: "<s>", encoder.eos_id: "</s>"}
    for token in map(int, ids):
        if token in marks:
            parts += [encoder.decode(run), marks[token]]
            run = []
        else:
            run.append(token)
    return "".join([*parts, encoder.decode(run)])


def decode_trained(labels: Sequence[int], *, encoder) -> List[str]:
    """The text of each run of trained labels, with the marks shown: what the model learns to say, turn by turn."""
    runs = groupby(map(int, labels), key=lambda label: label != IGNORE_INDEX)
    return [decode_marked(list(run), encoder=encoder) for is_trained, run in runs if is_trained]


def _encode_each(texts: Iterable[str], *, encoder, dummy_prefix: bool) -> Dict[str, List[int]]:
    """Text to ids, each distinct text encoded once: names and system texts recur in every conversation."""
    distinct = [text for text in dict.fromkeys(texts) if text]
    ids = encoder.encode(distinct, dummy_prefix=dummy_prefix)
    return {"": [], **dict(zip(distinct, ids, strict=True))}
