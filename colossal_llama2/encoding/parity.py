"""Compare the ids of SentencePiece and of the slow and fast tokenizers of transformers, before and after an extension.

`AutoTokenizer` loads the fast one, other servers read tokenizer.model. If they differ, a model is served with ids other
than those it was trained on. Some source tokenizers already differ (LLaMA-2's on leading spaces), so source and target
are measured alike, and only new differences count against the extension. Text without new pieces must also keep its
ids.

For a byte-level BPE, the reference is its tokenizer.json with nothing but pre-tokenizer and merges, which is what data
is prepared with. `AutoTokenizer` differs from it on special tokens that are spelled out in a text.
"""

import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from colossal_llama2.encoding.bpe_model import SPACE
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, spelled
from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE, MODEL_FILE
from colossal_llama2.encoding.folder_files import check_tokenizer_files, loader_of, loading_arguments
from colossal_llama2.encoding.library_panics import panics_as_errors
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.sentencepiece_file import sentencepiece_file
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

# At most this much of one group of texts is measured, evenly chosen: some seconds for either tokenizer. Whether pieces
# are reached is checked on all of them.
FAST_TEXTS, FAST_CHARACTERS = 100_000, 2**23
SLOW_TEXTS, SLOW_CHARACTERS = 40_000, 2_600_000
TEXTS_AT_A_TIME = 1000
SHOWN_CHARACTERS, SHOWN_IDS = 200, 50
PIECES_PER_TEXT = 8
MAX_OLD_TEXTS = 4000
EQUAL, OTHER_PREFIX, OTHER = range(3)


@dataclass
class Difference:
    """On how many of `documents` texts a tokenizer differs from SentencePiece, in the source and in the target.

    `added` counts the texts that differ more in the target than in the source; `first` shows the first of them.
    """

    documents: int = 0
    source_differs: int = 0
    target_differs: int = 0
    added: int = 0
    first: dict | None = None


@dataclass
class Measurement:
    """The result for a group of texts: parity, and how many of the texts `without_new_piece` have changed ids."""

    group: str
    documents: int
    fast: Difference = field(default_factory=Difference)
    slow: Difference | None = None
    without_new_piece: int = 0
    changed: int = 0
    first_changed: dict | None = None

    @property
    def failures(self) -> int:
        """Documents on which the extension adds a difference between tokenizers, or changes the ids of old text."""
        return self.fast.added + (self.slow.added if self.slow else 0) + self.changed

    def as_dict(self) -> dict:
        """For a report."""
        return asdict(self)


class Compared(Protocol):
    """The tokenizers of one folder: a reference, and those of transformers.

    Attributes:
        reference: the name of the reference in reports.
        added_from: the fast tokenizer's ids from here on are added tokens, which an extension moves behind its pieces.
        slow: None if transformers has none.
    """

    @property
    def reference(self) -> str: ...

    @property
    def added_from(self) -> int: ...

    @property
    def slow(self) -> "PreTrainedTokenizerBase | None": ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the reference."""

    def continued_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the reference for texts that continue another one."""

    def fast_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the fast tokenizer, without special tokens at the ends."""

    def slow_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the slow tokenizer, without special tokens at the ends."""

    def normalized(self, text: str) -> str:
        """The text, spelled as pieces are."""


class _FastTokenizer:
    """The fast tokenizer of one folder."""

    def __init__(self, folder: Path, *, is_byte_level: bool):
        self.fast = load_with_transformers(folder, is_byte_level=is_byte_level)
        # tokenizer.json may contain both. transformers sets them anew in each call.
        self.fast.backend_tokenizer.no_truncation()
        self.fast.backend_tokenizer.no_padding()

    def fast_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the fast tokenizer, without <s> and </s>."""
        return _ids_in_batches(self.fast.backend_tokenizer, texts)


def _ids_in_batches(backend: "Backend", texts: Sequence[str]) -> list[list[int]]:
    found = []
    for start in range(0, len(texts), TEXTS_AT_A_TIME):
        batch = list(texts[start : start + TEXTS_AT_A_TIME])
        found += [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
    return found


class Tokenizers(_FastTokenizer):
    """SentencePiece, the fast and the slow tokenizer of one folder. `slow` is None if transformers has none."""

    reference = "sentencepiece"

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor

        self.encoder = SentencePieceEncoder(folder)
        super().__init__(folder, is_byte_level=False)
        self.added_from = self.encoder.vocab_size
        slow = load_with_transformers(folder, use_fast=False)
        self.slow = None if slow.is_fast else slow
        self._processor = SentencePieceProcessor(model_file=str(sentencepiece_file(folder)))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of SentencePiece."""
        return self.encoder.encode(texts)

    def continued_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of SentencePiece without the leading "▁"."""
        return self.encoder.encode(texts, dummy_prefix=False)

    def slow_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the slow tokenizer, without <s> and </s>."""
        # The two steps of `encode`, without building masks, which takes longer.
        slow = self.slow
        if slow is None:
            raise ValueError("this tokenizer has no slow version")
        return [slow.convert_tokens_to_ids(slow.tokenize(text)) for text in texts]

    def normalized(self, text: str) -> str:
        """The text whose characters SentencePiece merges: with "▁" for spaces, and with a leading "▁"."""
        return self._processor.normalize(text)


class ByteLevelTokenizers(_FastTokenizer):
    """The merges of a byte-level BPE, and the fast tokenizer that transformers makes of the same tokenizer.json."""

    reference = "tokenizer.json"
    # No token moves: new ones get the ids behind all others.
    added_from = sys.maxsize
    slow = None

    def __init__(self, folder: Path, model: ByteLevelModel):
        """`model` is that of the folder."""
        self._plain = model.plain_tokenizer()
        super().__init__(folder, is_byte_level=True)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of pre-tokenizer and merges alone."""
        return _ids_in_batches(self._plain, texts)

    def continued_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The same: nothing is put before a text."""
        return self.ids(texts)

    def slow_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Not available."""
        raise ValueError("a byte-level tokenizer.json has no slow version")

    def normalized(self, text: str) -> str:
        """The characters that spell the text's bytes."""
        return spelled(text)


def load_with_transformers(
    folder: Path, *, use_fast: bool = True, is_byte_level: bool = False
) -> "PreTrainedTokenizerBase":
    """AutoTokenizer on a folder. Raises UserError if its settings name a class that does not fit its vocabulary."""
    from transformers import AutoTokenizer, LlamaTokenizer, LlamaTokenizerFast, PreTrainedTokenizerFast

    # Older LLaMA derivatives do not name a class; AutoTokenizer would look for it in the model's config.json.
    names_class = read_json(folder / CONFIG_FILE).get("tokenizer_class")
    # The two LLaMA classes are one in transformers 5.
    of_pieces = LlamaTokenizerFast if use_fast else LlamaTokenizer
    check_tokenizer_files(folder)
    loader = loader_of(folder) if names_class else PreTrainedTokenizerFast if is_byte_level else of_pieces
    try:
        with unpickling_refused(), panics_as_errors():
            return loader.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                **({"use_fast": use_fast} if loader is AutoTokenizer else {}),
                **loading_arguments(folder),
            )
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        file, cure = (FAST_FILE, "PreTrainedTokenizerFast") if is_byte_level else (MODEL_FILE, "LlamaTokenizer")
        raise UserError(
            f"transformers cannot load the source's {CONFIG_FILE} with its {file} "
            f"({type(error).__name__}: {str(error)[:200]}); give a tokenizer whose tokenizer_class is {cure}"
        )


class PieceFinder:
    """Finds out whether a text contains any of many pieces, in time linear in the text."""

    def __init__(self, pieces: Iterable[str]):
        self._pieces = frozenset(pieces)
        lengths: dict[str, set[int]] = defaultdict(set)
        for piece in self._pieces:
            lengths[piece[0]].add(len(piece))
        self._lengths = dict(lengths)

    def found_in(self, text: str) -> bool:
        """Whether the text contains one of the pieces."""
        firsts = self._lengths.keys() & set(text)
        return bool(firsts) and any(
            text[index : index + length] in self._pieces
            for index, character in enumerate(text)
            if character in firsts
            for length in self._lengths[character]
        )


# Texts to compare on.


def texts_alone(pieces: Sequence[str]) -> list[str]:
    """Each piece as a separate text; "▁" is a space."""
    return [piece.replace(SPACE, " ") for piece in pieces]


def texts_in_context(alone: Sequence[str]) -> list[str]:
    """Each of the texts once, in a fixed random order, three per text: two side by side and one between spaces."""
    shuffled = list(alone)
    random.Random(0).shuffle(shuffled)
    triples = (shuffled[start : start + 3] + ["", ""] for start in range(0, len(shuffled), 3))
    return [f"The {a}{b} and {c}." for a, b, c, *_ in triples]


def texts_of_old_pieces(alone: Sequence[str]) -> list[str]:
    """The source's own pieces in a fixed random order, several per text: text of its language without a corpus."""
    pieces = list(alone)
    random.Random(0).shuffle(pieces)
    starts = range(0, len(pieces), PIECES_PER_TEXT)
    return ["".join(pieces[start : start + PIECES_PER_TEXT]) for start in starts[:MAX_OLD_TEXTS]]


# Measuring.


def measure(source: Compared, target: Compared, group: str, texts: Sequence[str], new: PieceFinder) -> Measurement:
    """Compare the reference with the fast and the slow tokenizer, and source with target, on `texts`.

    A text has a new difference if the target's two tokenizers differ more than the source's, in the order EQUAL <
    OTHER_PREFIX < OTHER. OTHER_PREFIX means that only one of them puts a "▁" before the text.
    """
    texts = evenly(texts, FAST_TEXTS, FAST_CHARACTERS)
    result = Measurement(group, len(texts))
    ids = source.ids(texts), target.ids(texts)
    fast = source.fast_ids(texts), target.fast_ids(texts)
    levels = _levels(source, texts, ids[0], fast[0]), _levels(target, texts, ids[1], fast[1])
    _compare(result.fast, texts, *levels)
    _show(result.fast, target, "fast", target.fast_ids)
    if source.slow and target.slow:
        result.slow = Difference()
        some = evenly(texts, SLOW_TEXTS, SLOW_CHARACTERS)
        slow_levels = [_levels(one, some, one.ids(some), one.slow_ids(some)) for one in (source, target)]
        _compare(result.slow, some, *slow_levels)
        _show(result.slow, target, "slow", target.slow_ids)

    old_size, new_size = source.added_from, target.added_from
    for index, text in enumerate(texts):
        if not new.found_in(target.normalized(text)):
            result.without_new_piece += 1
            old_fast = [token if token < old_size else token - old_size + new_size for token in fast[0][index]]
            # Where the source's fast tokenizer contradicts the reference, the target's follows the reference.
            has_other_fast = levels[0][index] < OTHER and old_fast != fast[1][index]
            if ids[0][index] != ids[1][index] or has_other_fast:
                result.changed += 1
                shown = {"text": text[:SHOWN_CHARACTERS], "source": ids[0][index], "target": ids[1][index]}
                result.first_changed = result.first_changed or shown
    return result


def evenly(texts: Sequence[str], most_texts: int, most_characters: int) -> Sequence[str]:
    """All texts, or every n-th of them, as the limits allow."""
    ratio = max(len(texts) / most_texts, sum(map(len, texts)) / most_characters)
    return texts[:: math.ceil(ratio)] if ratio > 1 else texts


def _levels(tokenizers: Compared, texts: Sequence[str], ids: list[list[int]], others: list[list[int]]) -> list[int]:
    differing = [index for index, (one, other) in enumerate(zip(ids, others, strict=True)) if one != other]
    without = tokenizers.continued_ids([texts[index] for index in differing])
    levels = [EQUAL] * len(texts)
    for index, one in zip(differing, without, strict=True):
        levels[index] = OTHER_PREFIX if one == others[index] else OTHER
    return levels


def _compare(result: Difference, texts: Sequence[str], old: list[int], new: list[int]) -> None:
    result.documents = len(texts)
    result.source_differs = sum(level > EQUAL for level in old)
    result.target_differs = sum(level > EQUAL for level in new)
    added = [text for text, before, after in zip(texts, old, new, strict=True) if after > before]
    result.added = len(added)
    result.first = {"text": added[0]} if added else None


def _show(result: Difference, target: Compared, name: str, ids_of: Callable[[Sequence[str]], list[list[int]]]) -> None:
    """Add the ids of both tokenizers to the first text that differs, and shorten it."""
    if result.first:
        text = result.first["text"]
        (ids,), (others,) = target.ids([text]), ids_of([text])
        start = next((index for index, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), 0)
        result.first = {
            "text": text[:SHOWN_CHARACTERS],
            "first_differing_token": start,
            target.reference: ids[start : start + SHOWN_IDS],
            name: others[start : start + SHOWN_IDS],
        }
