"""Which implementation of `Encoder` a tokenizer's folder needs."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.fast_encoder import fastest_class
from colossal_llama2.encoding.safe_cuts import PART_CHARACTERS
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder


class Kind(NamedTuple):
    """A kind of tokenizer.

    Attributes:
        encoder: the reference implementation.
        fastest: returns the fastest class that gives the same ids for a folder.
    """

    encoder: type[Encoder]
    fastest: Callable[[str | Path], type[Encoder]]


# A folder is of the first kind that it holds; if it holds none, errors are those of the last kind.
KINDS = (Kind(SentencePieceEncoder, fastest_class), Kind(ByteLevelEncoder, lambda folder: ByteLevelEncoder))


def kind_of(folder: str | Path) -> Kind:
    """The kind of tokenizer that a folder holds."""
    return next((kind for kind in KINDS if kind.encoder.is_in(folder)), KINDS[-1])


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(kind.encoder.is_in(folder) for kind in KINDS)


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder of a folder. Raises UserError if there is no tokenizer, or it is damaged or lacks a mark."""
    return kind_of(folder).encoder(folder)


def shared_encoder(
    folder: str, encoder_class: type[Encoder] | None = None, part_characters: int = PART_CHARACTERS
) -> Encoder:
    """An encoder that this process loads once; of the reference class unless another one is given."""
    return _loaded(folder, encoder_class or kind_of(folder).encoder, part_characters)


@lru_cache(maxsize=2)
def _loaded(folder: str, encoder_class: type[Encoder], part_characters: int) -> Encoder:
    return encoder_class(folder, part_characters)


def fingerprint(folder: str | Path) -> str:
    """The fingerprint of a folder's tokenizer, without loading it. Raises UserError if there is none."""
    return kind_of(folder).encoder.fingerprint_of(folder)


def puts_prefix_after_marks(folder: str | Path) -> bool:
    """Whether transformers encodes a text after a mark like one at the beginning; see `Encoder`."""
    return kind_of(folder).encoder.puts_prefix_after_marks(folder)
