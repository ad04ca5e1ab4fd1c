"""Count the records of one unit of work: documents, bytes, tokens and pieces, by file and category."""

from collections.abc import Sequence

import numpy as np

from colossal_llama2.dataset.layout.token_ledger import TokenLedger
from colossal_llama2.dataset.write.document_pieces import Document
from colossal_llama2.dataset.write.records import Row
from colossal_llama2.dataset.write.tokenization import Tokenized

MASKED_PIECES = "pieces of long sources without a trained token"


class UnitCounts:
    """The token ledger of one unit. `slots` numbers (file, category) in the order of appearance."""

    def __init__(self) -> None:
        self.ledger = TokenLedger()
        self.slots: dict[tuple[int, str], int] = {}

    @property
    def categories(self) -> list[str]:
        """The category of each slot."""
        return [category for _, category in self.slots]

    def add_record(self, file: int, row: Row, tokens: Tokenized, texts: Sequence[str], sizes: Sequence[int]) -> int:
        """Count a checked record, and return its slot. `sizes` are the UTF-8 bytes of its `texts`."""
        slot = self.slots.setdefault((file, row.category), len(self.slots))
        tally = self.ledger.tally(file, row.category)
        tally.documents += 1
        tally.characters += sum(map(len, texts))
        tally.bytes += sum(sizes)
        tally.tokens_in += tokens.tokens_in
        for drop in tokens.drops:
            tally.drop(drop.reason, documents=1, tokens=drop.tokens)
        for note in row.notes:
            self.ledger.count_note(note)
        if row.format is not None:
            self.ledger.formats[row.format] = self.ledger.formats.get(row.format, 0) + 1
        return slot

    def add_cuts(self, documents: Sequence[Document], *, max_length: int, overlong: str) -> None:
        """Count the documents over `max_length`, and the tokens that "truncate" leaves out of them."""
        slots = list(self.slots)
        for document in documents:
            length = len(document.tokens.input_ids)
            if length > max_length:
                tally = self.ledger.tally(*slots[document.slot])
                tally.cut_documents += 1
                if overlong != "split":
                    tally.truncated += length - max_length

    def add_pieces(self, pieces: np.ndarray, has_loss: np.ndarray) -> None:
        """Count the pieces of a batch, an array of PIECE; those without `has_loss` are dropped.

        All categories at once, because each piece may have its own.
        """
        present, category = np.unique(pieces["category"], return_inverse=True)
        is_held_out = has_loss & (pieces["held_out"] > 0)
        # The pieces of a document follow each other.
        held_out = np.flatnonzero(is_held_out)
        documents = pieces["document"][held_out]
        begins = held_out[np.append(True, documents[1:] != documents[:-1])[: len(held_out)]]

        def sums(which: np.ndarray, name: str | None = None) -> list[int]:
            weights = None if name is None else pieces[name][which]
            # Sums of floats are exact up to 2^53.
            return np.bincount(category[which], weights, minlength=len(present)).astype(np.int64).tolist()

        columns = (
            sums(has_loss, "trained"),
            sums(has_loss, "length"),
            sums(has_loss, "predicted"),
            sums(has_loss),
            sums(is_held_out),
            sums(begins),
            sums(~has_loss),
            sums(~has_loss, "length"),
        )
        slots = list(self.slots)
        for slot, *counts in zip(present.tolist(), *columns, strict=True):
            trained, length, predicted, kept, held_out_pieces, held_out_documents, dropped, dropped_tokens = counts
            tally = self.ledger.tally(*slots[slot])
            tally.trained += trained
            tally.masked += length - trained
            tally.predicted += predicted
            tally.pieces += kept
            tally.held_out_pieces += held_out_pieces
            # Documents that lost every piece are not in eval/.
            tally.held_out_documents += held_out_documents
            if dropped:
                tally.drop(MASKED_PIECES, documents=dropped, tokens=dropped_tokens)
