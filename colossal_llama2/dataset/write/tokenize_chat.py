"""A checked conversation to `input_ids` and `labels` by a chat template that is rendered.

The mask is that of `chat_tokens`: what the template generates for an answer, without answers that are masked. A
conversation that is too long is rendered again with fewer exchanges, which is what a model sees of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import chain

from colossal_llama2.chat.chat_tokens import ChatTokenizer, Tokens
from colossal_llama2.chat.marks import Marks
from colossal_llama2.chat.templates import ChatTemplate
from colossal_llama2.corpus.conversation import ASSISTANT, SYSTEM_ROLE, Message
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.write.records import SftRow
from colossal_llama2.dataset.write.tokenization import (
    LATER_EXCHANGES_TOO_LONG,
    UNANSWERED,
    Drop,
    Tokenized,
    why_nothing_remains,
)
from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.storage.row_errors import RowError

# A note, by which manifests count conversations that are used.
JOINED = "conversations with an answer whose border transformers would tokenize otherwise"


@lru_cache(maxsize=1)
def chat_tokenizer(name: str, text: str, tokenizer_dir: str, *, prefix_after_marks: bool) -> ChatTokenizer:
    """The template of these settings with the tokenizer, which this process loads once."""
    template = ChatTemplate(name, text, f"--chat_template {name}")
    encoder = shared_encoder(tokenizer_dir)
    return ChatTokenizer(template, encoder, tokenizer_dir, prefix_after_marks=prefix_after_marks)


def chat_tokenizer_of(settings: Settings, tokenizer_dir: str) -> ChatTokenizer | None:
    """The same for the settings of a prepare command; None without a template that is rendered."""
    if not settings.template_text:
        return None
    return chat_tokenizer(
        settings.chat_template,
        settings.template_text,
        tokenizer_dir,
        prefix_after_marks=settings.prefix_after_marks,
    )


def tokenize_chat(row: SftRow, *, tokenizer: ChatTokenizer, max_length: int) -> tuple[Tokenized, tuple[str, ...]]:
    """One conversation as one sample of at most `max_length` tokens, and notes to count.

    Complete leading exchanges are kept while they fit, as in `tokenization.tokenize_sft`, and `drops` are the same.

    Raises:
        RowError: the template refuses the conversation, or its answers cannot be found in the text.
    """
    conversation = row.conversation
    is_trained = [exchange[-1].is_trained for exchange in conversation.exchanges]

    def tokens_of(count: int) -> Tokens:
        return tokenizer.tokens(messages_of(row, conversation.exchanges[:count]))

    answered = tokens_of(len(is_trained)) if is_trained else None
    everything = answered.num_tokens if answered else 0
    if conversation.unanswered:
        whole = tokenizer.tokens(messages_of(row, [*conversation.exchanges, conversation.unanswered]))
        # It may be shorter: some templates write the last message in another way.
        everything = max(whole.num_tokens, everything)
    kept, tokens = _most_that_fit(tokens_of, answered, len(is_trained), max_length)
    if tokens is None or not any(is_trained[:kept]):
        drop = Drop(why_nothing_remains(is_trained, kept), everything)
        return Tokenized([], [], everything, (drop,)), ()
    assert answered is not None
    left_out = {
        LATER_EXCHANGES_TOO_LONG: max(answered.num_tokens - tokens.num_tokens, 0),
        UNANSWERED: everything - max(answered.num_tokens, tokens.num_tokens),
    }
    drops = tuple(Drop(reason, count) for reason, count in left_out.items() if count)
    input_ids, labels = _ids_and_labels(tokens, is_trained)
    found = {part.answer for part in tokens.parts}
    lost = next((number for number, is_own in enumerate(is_trained[:kept]) if is_own and number not in found), None)
    if lost is not None:
        raise RowError(
            f"the chat template {tokenizer.template.origin} does not show where answer {lost + 1}, before the first "
            "question, is; mark answers in it with {% generation %}, or leave out --assistant_first train",
            reason="an opening answer that cannot be found in the chat template's text",
        )
    everything = len(input_ids) + sum(drop.tokens for drop in drops)
    return Tokenized(input_ids, labels, everything, drops, kept), (JOINED,) if tokens.is_joined else ()


def smallest_conversation(tokenizer: ChatTokenizer) -> int:
    """The number of tokens of two messages of one letter, which every template that can be used accepts."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    return tokenizer.tokens(messages).num_tokens


def _most_that_fit(
    tokens_of: Callable[[int], Tokens], answered: Tokens | None, count: int, max_length: int
) -> tuple[int, Tokens | None]:
    """How many leading exchanges have at most `max_length` tokens, and their tokens; None for none."""
    if answered is None:
        return 0, None
    if answered.num_tokens <= max_length:
        return count, answered
    low, high, found = 0, count, None
    while high - low > 1:
        middle = (low + high) // 2
        tokens = tokens_of(middle)
        if tokens.num_tokens <= max_length:
            low, found = middle, tokens
        else:
            high = middle
    return low, found


def messages_of(row: SftRow, exchanges: Sequence[Sequence[Message]]) -> list[dict[str, str]]:
    """These exchanges of a conversation as a template sees them, with its system texts."""
    conversation = row.conversation
    messages: list[dict[str, str]] = []
    if conversation.has_system:
        messages.append({"role": SYSTEM_ROLE, "content": conversation.system_text})
    for message in chain(*exchanges):
        if message.system_text:
            messages.append({"role": SYSTEM_ROLE, "content": message.system_text})
        role = "assistant" if message.speaker == ASSISTANT else "user"
        messages.append({"role": role, "content": message.text})
    return messages


def _ids_and_labels(tokens: Tokens, is_trained: Sequence[bool]) -> tuple[list[int], list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    for ids, answer in tokens.parts:
        input_ids += ids
        labels += ids if answer is not None and is_trained[answer] else [IGNORE_INDEX] * len(ids)
    return input_ids, labels


def names_of(settings: Settings, tokenizer_dir: str) -> Mapping[int, str]:
    """The texts of the marks that a template can spell out, by id; empty without a template that is rendered."""
    return _names(tokenizer_dir) if settings.template_text else {}


@lru_cache(maxsize=1)
def _names(tokenizer_dir: str) -> Mapping[int, str]:
    return Marks.of(tokenizer_dir, shared_encoder(tokenizer_dir)).names
