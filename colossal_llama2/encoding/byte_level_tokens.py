"""Tokens of a byte-level BPE: the texts they stand for, and the merges that make them."""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
CONTINUATION_BYTES = range(0x80, 0xC0)


def text_of(token: str) -> str | None:
    """The text that a token spells, "Ġhi" -> " hi"; None for a token that is part of a character."""
    try:
        return bytes_of(token).decode()
    except UnicodeDecodeError:
        return None


def shown_token(token: str) -> str:
    """How a token is written in reports and files: its text, with "▁" for spaces, or its bytes: "bytes e4bd"."""
    text = text_of(token)
    return f"bytes {bytes_of(token).hex()}" if text is None else text.replace(" ", SPACE)


def is_within_character(token: str) -> bool:
    """Whether a token spells one character of several bytes, or part of one, so that no character begins inside it."""
    return all(byte in CONTINUATION_BYTES for byte in bytes_of(token[1:]))


def characters_in(content: bytes) -> int:
    """The number of characters of which bytes hold at least a part: 2 for b"\\xbd\\xa0a"."""
    begun = sum(byte not in CONTINUATION_BYTES for byte in content)
    return begun + (content[:1] != b"" and content[0] in CONTINUATION_BYTES)


def can_occur(content: bytes) -> bool:
    """Whether bytes occur in some valid UTF-8 text: b"\\xbd\\xa0a" does, b"a\\xbd" and b"\\xff" do not."""
    start = 0
    while start < min(3, len(content)) and content[start] in CONTINUATION_BYTES:
        start += 1
    # Bytes that continue a character before them, then whole characters, then the beginning of one.
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content[start:])
    except UnicodeDecodeError:
        return False
    return True


def merges_into(tokens: Iterable[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of each token into two tokens of `ids`, in the order of `tokens`.

    tiktoken merges two neighbours whenever their concatenation is a token, so transformers writes LLaMA-3's merges in
    the same way (`TikTokenConverter.extract_vocab_merges_from_model`):

        merges_into(["abc"], {"a": 0, "c": 1, "ab": 2, "bc": 3}) -> [("a", "bc"), ("ab", "c")]
    """
    found: list[tuple[str, str]] = []
    for token in tokens:
        splits = [(token[:index], token[index:]) for index in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def extended(model: ByteLevelModel, tokens: Sequence[str]) -> ByteLevelModel:
    """The model with `tokens` appended: their ids follow all others, and their merges rank behind all others."""
    vocabulary = {**model.vocabulary, **{token: index for index, token in enumerate(tokens, start=model.size)}}
    return replace(model, vocabulary=vocabulary, merges=model.merges + merges_into(tokens, vocabulary))


def merging(model: ByteLevelModel) -> ByteLevelModel:
    """The model with `ignore_merges` off: every token is the result of merges."""
    settings = {**model.settings, "model": {**model.settings["model"], "ignore_merges": False}}
    return replace(model, settings=settings, ignore_merges=False)


def symbols_of(tokenizer: "Tokenizer", tokens: Iterable[str]) -> list[list[str]]:
    """What the merges of a tokenizer turn the bytes of each token into; its pre-tokenizer is not applied."""
    merges = tokenizer.model
    return [[symbol.value for symbol in merges.tokenize(token)] for token in tokens]
