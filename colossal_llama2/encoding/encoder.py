"""The interface of a tokenizer of any kind, for data preparation, checks and exports.

To add a kind of tokenizer: write one class with the members of `Encoder`, and register it in `registry`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    TokenIds = Sequence[int] | np.ndarray


class Encoder(Protocol):
    """Text to token ids and back, loaded from a tokenizer's folder. It pickles as that path.

    Attributes:
        name: the kind of tokenizer, for messages.
        bos_id, eos_id: the marks at the beginning and the end of a document. They may be the same; bos_id is negative
            if documents begin without a mark.
        unk_id: the token for text that the tokenizer cannot encode; negative if there is none.
        vocab_size: the number of tokens.
        bos_text, eos_text: how the marks are shown to a reader.
        has_dummy_prefix: whether this kind puts a space before a text that begins a document.
        other_texts: for which texts transformers gives other ids, as a clause of a warning.
        files: the names of the tokenizer's files and folders, which are copied with a model.
    """

    name: str
    bos_id: int
    eos_id: int
    unk_id: int
    vocab_size: int
    bos_text: str
    eos_text: str
    has_dummy_prefix: bool
    other_texts: str
    files: tuple[str, ...]

    def __init__(self, tokenizer_dir: str | Path, part_characters: int = ...):
        """Load the tokenizer of a folder; texts over `part_characters` are encoded in parts, to bound memory.

        Raises:
            UserError: there is none, or it is damaged or lacks a mark.
        """

    @classmethod
    def is_in(cls, folder: str | Path) -> bool:
        """Whether a folder holds a tokenizer of this kind."""

    @classmethod
    def fingerprint_of(cls, folder: str | Path) -> str:
        """A hash of the files that decide the ids, equal for folders that give equal ids. Loads no tokenizer.

        Raises:
            UserError: the files are missing.
        """

    @classmethod
    def puts_prefix_after_marks(cls, folder: str | Path) -> bool:
        """Whether transformers encodes a text that follows a mark like one at the beginning of a document.

        If so, each text of a conversation is encoded with its own prefix, otherwise only the first one.
        """

    @property
    def fingerprint(self) -> str:
        """That of its folder."""

    def is_long(self, text: str) -> bool:
        """Whether a text is so long that `encode_long` should encode it."""

    def problem_of(self, text: str) -> str | None:
        """Why `encode` would raise a ValueError for a text, as a message for its row; None if it would not.

        Raises:
            UnicodeEncodeError: the text has a lone surrogate.
        """

    def encode(self, texts: Sequence[str], *, dummy_prefix: bool = True) -> list[list[int]]:
        """Token ids of each text, without marks, on one thread. A mark that is spelled out in a text stays text.

        Args:
            dummy_prefix: False encodes each text as the continuation of an earlier one. It matters to tokenizers that
                put a space before a text.
        """

    def encode_long(self, text: str, *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: the ids that `encode` gives for the text, in a tenth of the memory of a list."""

    def decode(self, ids: Iterable[int], *, dummy_prefix: bool = True) -> str:
        """The text of token ids, without marks and, with `dummy_prefix`, without the space that `encode` adds."""

    def bytes_of_tokens(self, text: str, ids: "TokenIds", *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: how many UTF-8 bytes of `text` each of its tokens stands for; they sum to all of them.

        Args:
            ids: what `encode` returns for the text and the same `dummy_prefix`.
        """
