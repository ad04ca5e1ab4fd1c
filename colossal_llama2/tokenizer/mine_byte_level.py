"""Mine new tokens for a byte-level BPE: continue the training of its merges on new text.

The text is divided by the base's pre-tokenizer and encoded with the base. Then the two neighbouring tokens that occur
together most often are merged, again and again, as in the training of a BPE (Sennrich et al., 2016, Neural Machine
Translation of Rare Words with Subword Units), but starting from the base's tokens instead of bytes. So merges lead to
every new token, after the base's own merges, and every prefix of the list is complete. Some tokens are parts of
characters.

The trainer of `tokenizers` does this: each token of the base is given to it as one character.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of
from colossal_llama2.encoding.byte_level_reach import unreached_tokens
from colossal_llama2.encoding.byte_level_tokens import (
    SPACE,
    characters_in,
    extended,
    shown_token,
    text_of,
)
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer.new_pieces import SpecialTokens

# Tokens are written as the characters from here on, none of which is whitespace.
FIRST_CHARACTER = 0x20000
MOST_IDS = sys.maxunicode + 1 - FIRST_CHARACTER
# Share of extra merges to train, because some tokens are too long. More is tried if too few are left.
SPARES = (0.1, 0.5, 2.0)
BATCH_TEXTS = 1 << 14
BATCH_REPEATS = 1 << 10


class Found(NamedTuple):
    """New pieces in order of usefulness, and what limits their number.

    Attributes:
        unreachable: the number of pieces that were left out because they are not reached.
        some_are_rare: whether more pieces would be found if they could be rarer.
        some_are_long: whether more pieces would be found if they could be longer.
    """

    pieces: list[str]
    unreachable: int
    some_are_rare: bool
    some_are_long: bool


def mine_byte_level(
    model: ByteLevelModel, lines: Sequence[str], *, limit: int, min_count: int, max_characters: int
) -> Found:
    """At most `limit` new tokens in the order of training.

    Args:
        lines: text to train on.
        min_count: how often two tokens must at least be neighbours to be merged.
        max_characters: a token may have at most this many characters; a part of a character counts as one.

    Raises:
        UserError: the ids of the base are too large to be written as characters.
    """
    if model.size > MOST_IDS:
        raise UserError(f"{model.path} has ids up to {model.size - 1:,}; mining is for vocabularies up to {MOST_IDS:,}")
    words = _words(model, lines)
    special = SpecialTokens(model.added)
    for spare in SPARES:
        trained = _train(words, int(limit * (1 + spare)), min_count)
        tokens = ["".join(model.tokens[ord(character) - FIRST_CHARACTER] for character in one) for one in trained]
        new = [token for token in dict.fromkeys(tokens) if _is_wanted(token, model, special)]
        fitting = [token for token in new if characters_in(bytes_of(token)) <= max_characters]
        is_last = len(trained) < int(limit * (1 + spare))
        if len(fitting) >= limit or is_last:
            break
    pieces, unreached = _reached(model, fitting, limit)
    return Found(pieces, unreached, is_last and min_count > 1, len(fitting) < len(new))


def record_of(token: str) -> dict[str, str]:
    """The line of a file of new pieces for a token."""
    return {"bytes": bytes_of(token).hex()} if text_of(token) is None else {"piece": shown_token(token)}


def tokens_per_character(model: ByteLevelModel, tokens: Sequence[str], texts: Sequence[str]) -> float:
    """Tokens per character of the texts under `model` extended by `tokens`."""
    tokenizer = extended(model, tokens).plain_tokenizer()
    batches = (list(texts[start : start + BATCH_TEXTS]) for start in range(0, len(texts), BATCH_TEXTS))
    count = sum(len(one.ids) for batch in batches for one in tokenizer.encode_batch_fast(batch))
    return count / sum(map(len, texts))


def _words(model: ByteLevelModel, lines: Sequence[str]) -> Counter[str]:
    """The parts of the lines, each written as one character per token of the base, and how often they occur."""
    from tokenizers import pre_tokenizers

    tokenizer = model.plain_tokenizer()
    divide = tokenizer.pre_tokenizer.pre_tokenize_str
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(part for part, _ in divide(line))
    # Bytes without a token would be dropped, which makes neighbours of what is not.
    spelling = frozenset(token for token in model.vocabulary if len(token) == 1)
    parts = [part for part in counts if spelling.issuperset(part)]
    # A part by itself might be divided otherwise than in its line.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: Counter[str] = Counter()
    for start in range(0, len(parts), BATCH_TEXTS):
        some = parts[start : start + BATCH_TEXTS]
        texts = [bytes_of(part).decode() for part in some]
        for part, encoding in zip(some, tokenizer.encode_batch_fast(texts), strict=True):
            if len(encoding.ids) > 1:
                words["".join(chr(FIRST_CHARACTER + index) for index in encoding.ids)] += counts[part]
    return words


def _train(words: Counter[str], num_merges: int, min_count: int) -> list[str]:
    """The first merges of the words, best first, as strings of the characters that are merged."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = len(set("".join(words)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=alphabet + num_merges, min_frequency=min_count, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def _repeated(words: Counter[str]) -> Iterator[str]:
    for word, count in words.items():
        for _ in range(count // BATCH_REPEATS):
            yield f"{word} " * BATCH_REPEATS
        yield f"{word} " * (count % BATCH_REPEATS)


def _is_wanted(token: str, model: ByteLevelModel, special: SpecialTokens) -> bool:
    """Whether a token is new, and init_tokenizer.py accepts it: "▁" is a space there."""
    text = bytes_of(token).decode(errors="ignore")
    return token not in model.vocabulary and SPACE not in text and special.found_in(text) is None


def _reached(model: ByteLevelModel, candidates: list[str], limit: int) -> tuple[list[str], int]:
    """The first `limit` candidates that are all reached together, and the number of those left out before that."""
    left = candidates
    while True:
        chosen = left[:limit]
        lost = set(unreached_tokens(extended(model, chosen), chosen))
        if not lost:
            return chosen, len(candidates) - len(left)
        left = [token for token in left if token not in lost]
