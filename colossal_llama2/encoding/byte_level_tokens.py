"""Tokens of a byte-level BPE: the texts they stand for, the merges that make them, and which of them occur in texts."""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "▁"
TEXTS_AT_A_TIME = 10_000
CONTINUATION_BYTES = range(0x80, 0xC0)
# What may stand before a piece in a text. A pre-tokenizer may divide "好，" or "3.14" in each of them, and "12" only
# after a digit.
CONTEXTS = ("", "a", ".", "\n", " ", "0")


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


# The pre-tokenizer.


def split_tokens(tokenizer: "Tokenizer", tokens: Sequence[str]) -> list[str]:
    """The `tokens` whose text the tokenizer's pre-tokenizer divides wherever it stands, so that no merge makes them.

    A token counts as whole if it is exactly one part of a text in one of CONTEXTS. A part of a character always is:
    pre-tokenizers divide texts between characters.
    """
    divide = tokenizer.pre_tokenizer.pre_tokenize_str
    return _never(tokens, lambda texts: [[part for part, _ in divide(text)] for text in texts], lambda token: token)


def unreached_tokens(model: ByteLevelModel, tokens: Sequence[str]) -> list[str]:
    """The `tokens` of a model that its merges never make, or that no text in one of CONTEXTS is encoded to.

    Both are found by encoding. The first is without `ignore_merges`, which would hide that merges do not lead to a
    token; they must, because it hides it only where nothing else is in the same part of a text.
    """
    merged = symbols_of(merging(model).plain_tokenizer(), tokens)
    stuck = {token for token, symbols in zip(tokens, merged, strict=True) if symbols != [token]}
    tokenizer = model.plain_tokenizer()

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    stuck.update(_never(tokens, encoded, model.vocabulary.__getitem__))
    return [token for token in tokens if token in stuck]


def _never(tokens: Sequence[str], parts_of: Callable, part_of: Callable) -> list[str]:
    """The tokens with a text whose part is in no context among the parts of the text."""
    texts = {token: text for token in tokens if (text := text_of(token)) is not None}
    left = list(texts)
    for context in CONTEXTS:
        found: set[str] = set()
        for start in range(0, len(left), TEXTS_AT_A_TIME):
            some = left[start : start + TEXTS_AT_A_TIME]
            parts = parts_of([context + texts[token] for token in some])
            found.update(token for token, own in zip(some, parts, strict=True) if part_of(token) in own)
        left = [token for token in left if token not in found]
    return left
