"""Cut tokenized documents into pieces of at most max_length tokens. Works on one batch of documents at a time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write.splicing import piece_lengths
from colossal_llama2.dataset.write.tokenization import Tokenized, packed, token_array
from colossal_llama2.dataset.write.unit_files import PIECE

if TYPE_CHECKING:
    from colossal_llama2.encoding.encoder import TokenIds

# A longer document is not copied to join it with others.
TOKENS_TO_COPY = 1 << 16


class Document(NamedTuple):
    """A tokenized record on its way into pieces.

    Attributes:
        slot: the number of its file and category in the unit.
        file: the number of its file.
        target_bytes: UTF-8 bytes of the text that carries its loss.
        held_out: whether it goes to eval/.
        token_bytes: how many of the `target_bytes` each token stands for; None if the document is a single piece that
            begins with a mark.
    """

    slot: int
    file: int
    target_bytes: int
    held_out: bool
    tokens: Tokenized
    token_bytes: np.ndarray | None


def document_groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """The documents in their order, in groups: each long one is alone, so that its tokens need not be copied."""
    group: list[Document] = []
    for document in documents:
        if _is_alone(document):
            yield from filter(None, (group, [document]))
            group = []
        else:
            group.append(document)
    if group:
        yield group


def _is_alone(document: Document) -> bool:
    ids = document.tokens.input_ids
    return isinstance(ids, np.ndarray) and len(ids) > TOKENS_TO_COPY


def coded_tokens(documents: Sequence[Document]) -> np.ndarray:
    """(tokens,) int32: the tokens of a group of documents one after the other, with ~id for those without loss.

    For a long document, which is alone in its group, this is its own array.
    """
    if _is_alone(documents[0]):
        (document,) = documents
        coded = np.asarray(document.tokens.input_ids)
    else:
        coded = np.frombuffer(
            bytearray().join([_bytes_of(document.tokens.input_ids) for document in documents]), np.int32
        )
    count = 0
    for document in documents:
        tokens, start = document.tokens, count
        count += len(tokens.input_ids)
        # Without a mask, labels and ids are the same object.
        if tokens.labels is not tokens.input_ids:
            stretch = coded[start:count]
            np.invert(stretch, out=stretch, where=token_array(tokens.labels) == IGNORE_INDEX)
    return coded


def _bytes_of(ids: "TokenIds") -> "bytes | memoryview":
    return ids.data if isinstance(ids, np.ndarray) else packed(ids)


def cut_documents(
    documents: Sequence[Document], coded: np.ndarray, *, first_number: int, max_length: int, overlong: str
) -> np.ndarray:
    """The pieces of a group of documents, as an array of PIECE whose `offset` counts from the group's first token.

    Args:
        coded: what `coded_tokens` returns for them.
        first_number: the number of the first document in the unit.
        overlong: "split" cuts a document over `max_length` into several pieces, "truncate" keeps its first one.
    """
    rows, offset = [], 0
    for number, document in enumerate(documents, start=first_number):
        length = len(document.tokens.input_ids)
        lengths: list[int] = [length]
        if length > max_length:
            lengths = piece_lengths(length, max_length=max_length) if overlong == "split" else [max_length]
        start = 0
        for piece in lengths:
            size = _predicted_bytes(document, start, start + piece)
            rows.append((offset + start, size, piece, number, document.slot, document.file, document.held_out, 0, 0))
            start += piece
        offset += length
    pieces = np.array(rows, dtype=PIECE)
    _count_losses(pieces, coded)
    return pieces


def _count_losses(pieces: np.ndarray, coded: np.ndarray) -> None:
    """Set how many tokens of each piece carry a loss (`trained`), and how many of these are predicted in it.

    reduceat sums the stretches between the bounds, which are each piece's start and stop. Every other stretch is a
    piece; the ones between are what a truncated document leaves out, or nothing:

        tokens   0 1 2 3 4 | 5 6 7 8 9 | 10 11 12          a truncated document of 10, and a complete one of 3
        bounds   0         5           10        13
        sums     [piece 0) [ left out )[ piece 1 )
    """
    starts = pieces["offset"]
    bounds = np.stack([starts, starts + pieces["length"]], axis=1).ravel()
    # One more entry, because the last bound is the number of tokens.
    is_trained = np.append(coded >= 0, False)
    trained = np.add.reduceat(is_trained, bounds, dtype=np.int32)[::2]
    pieces["trained"] = trained
    # Nothing in a piece predicts its first token.
    pieces["predicted"] = trained - is_trained[starts]


def _predicted_bytes(document: Document, start: int, stop: int) -> int:
    """UTF-8 bytes of the text that is predicted in the piece [start, stop); its first token is not predicted."""
    if document.token_bytes is None:
        return document.target_bytes
    return int(document.token_bytes[start + 1 : stop].sum())
