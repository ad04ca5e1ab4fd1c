"""Messages to token ids, by the chat template of a model's folder."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.file_names import CONFIG_FILE, TEMPLATE_FILE
from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import is_regular, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode's private use area: each stands for one special token that a message spells out.
STAND_INS = range(0xE000, 0xF900)


def has_chat_template(folder: Path) -> bool:
    """Whether transformers finds a chat template in a folder: chat_template.jinja, or tokenizer_config.json's."""
    if is_regular(folder / TEMPLATE_FILE):
        return True
    path = folder / CONFIG_FILE
    return is_regular(path) and bool(read_settings(path).get("chat_template"))


def message_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation, up to where the assistant's next message begins.

    A special token that is spelled out in a message, such as "<|im_end|>", stays text.

    Args:
        messages: {"role": "system", "user" or "assistant", "content": ...}, of which the last is the user's.

    Raises:
        UserError: the template refuses the messages, or is broken.
    """
    spelled = _special_tokens_in(tokenizer, messages)
    if not spelled:
        return list(tokenizer(_rendered(tokenizer, messages), add_special_tokens=False)["input_ids"])
    used = {character for message in messages for character in message["content"]}
    free = (chr(code) for code in STAND_INS if chr(code) not in used)
    stand_ins = dict(zip(spelled, free, strict=False))
    pattern = _any_of(spelled)
    replaced = [
        {**message, "content": pattern.sub(lambda found: stand_ins[found[0]], message["content"])}
        for message in messages
    ]
    texts = {stand_in: text for text, stand_in in stand_ins.items()}
    return _encoded_with_text(tokenizer, _rendered(tokenizer, replaced), texts)


def _special_tokens_in(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[str]:
    return [token for token in _special_tokens(tokenizer) if any(token in message["content"] for message in messages)]


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts that become special tokens, the longest first. Other added tokens are words, which stay words."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*tokenizer.all_special_tokens, *added} - {""}, key=len, reverse=True)


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)))


def _rendered(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} cannot be used for these messages: {reason}; change them, "
            f"or use --prompt_style plain"
        )


def _encoded_with_text(tokenizer: "PreTrainedTokenizerBase", rendered: str, texts: Mapping[str, str]) -> list[int]:
    """The ids of a rendered template, whose own special tokens become ids, and stand-ins the text that they are for."""
    tokens = _special_tokens(tokenizer)
    ids: list[int] = []
    for part in re.split(f"({_any_of(tokens).pattern})", rendered):
        if part in tokens:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            text = "".join(texts.get(character, character) for character in part)
            ids += _plain_ids(tokenizer, text, is_first=not ids)
    return ids


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str, *, is_first: bool) -> list[int]:
    """The ids of a text without special tokens. Unless `is_first`, SentencePiece puts no space before it."""
    try:
        return shared_encoder(tokenizer.name_or_path).encode([text], dummy_prefix=is_first)[0]
    except UserError:  # a kind of tokenizer that only transformers reads
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
