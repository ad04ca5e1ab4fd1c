"""Which tokens of a byte-level BPE occur in texts: those that its pre-tokenizer leaves whole, and its merges make.

A token that is a text is looked for in that text. A part of characters has no text; it is looked for in texts with the
rest of the characters (byte_level_parts.py). A pre-tokenizer divides texts between characters, so it may divide all of
these inside the part: LLaMA-3's does so for 0ae4, a line break and the first byte of a character. And better merges may
join a byte of the part to one outside in all of them: if every character that begins with c3 is a token, 61c3 is never
made. Where too many characters complete a part to try all, some of each general category stand for them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.byte_level_parts import texts_around
from colossal_llama2.encoding.byte_level_tokens import merging, symbols_of, text_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS_AT_A_TIME = 10_000
# What may stand before a piece in a text. A pre-tokenizer may divide "好，" or "3.14" in each of them, and "12" only
# after a digit.
CONTEXTS = ("", "a", ".", "\n", " ", "0")


def split_tokens(tokenizer: "Tokenizer", tokens: Sequence[str]) -> list[str]:
    """The `tokens` that the tokenizer's pre-tokenizer divides wherever they stand, so that no merge makes them.

    A token counts as whole if it is exactly one part of its text in one of CONTEXTS; a part of characters, if it is in
    one part of a text around it.
    """
    divide = tokenizer.pre_tokenizer.pre_tokenize_str
    split = set(
        _never(tokens, lambda texts: [[part for part, _ in divide(text)] for text in texts], lambda token: token)
    )
    split.update(token for token in _parts_of_characters(tokens) if not any(_undivided(tokenizer, token)))
    return [token for token in tokens if token in split]


def unreached_tokens(model: ByteLevelModel, tokens: Sequence[str]) -> list[str]:
    """The `tokens` of a model that its merges never make, or that no text in one of CONTEXTS is encoded to.

    Both are found by encoding. The first is without `ignore_merges`, which would hide that merges do not lead to a
    token; they must, because it hides it only where nothing else is in the same part of a text. Parts of characters
    must be made in a text around them; they may then be merged further.
    """
    merged = symbols_of(merging(model).plain_tokenizer(), tokens)
    stuck = {token for token, symbols in zip(tokens, merged, strict=True) if symbols != [token]}
    tokenizer = model.plain_tokenizer()

    def encoded(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    stuck.update(_never(tokens, encoded, model.vocabulary.__getitem__))
    # What is made on the way to a token that is stuck itself is not made thereby.
    made = [token for token in tokens if token not in stuck]
    stuck.update(never_made(model, _parts_of_characters(made), made))
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


# Parts of characters.


def never_made(model: ByteLevelModel, tokens: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """The `tokens`, parts of characters, that the merges of a model make in no text around them.

    Args:
        others: tokens that are made, unless they are returned; what is made on the way to one of them is made too.
    """
    if not tokens:
        return []
    # Of a repeated pair, `tokenizers` uses the last rank.
    ranks = {pair: rank for rank, pair in enumerate(model.merges)}
    tokenizer = model.plain_tokenizer()
    # A byte without a token is dropped, which makes neighbours of what is not.
    spelling = model.vocabulary.keys()
    left = []
    for token in tokens:
        parts = (part for part in _undivided(tokenizer, token) if spelling >= set(part))
        if not any(_is_made(token, part, ranks) for part in parts):
            left.append(token)
    made = set(others).difference(left)
    return [token for token in left if not any(_is_made(token, one, ranks) for one in made if token in one)]


def _parts_of_characters(tokens: Sequence[str]) -> list[str]:
    return [token for token in tokens if text_of(token) is None]


def _undivided(tokenizer: "Tokenizer", token: str) -> Iterator[str]:
    """The different parts, spelled as bytes, that texts around a token are divided into, and that hold it whole."""
    seen: set[str] = set()
    for context in CONTEXTS:
        for text in texts_around(token):
            for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(context + text):
                if token in part and part not in seen:
                    seen.add(part)
                    yield part


def _is_made(token: str, part: str, ranks: Mapping[tuple[str, str], int]) -> bool:
    """Whether merging the bytes of a part of a text makes the token at some point."""
    symbols = list(part)
    while token not in symbols:
        pairs = enumerate(zip(symbols, symbols[1:], strict=False))
        ranked = [(ranks[pair], place) for place, pair in pairs if pair in ranks]
        if not ranked:
            return False
        _, place = min(ranked)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return True
