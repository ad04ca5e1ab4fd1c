"""One padded micro batch (`Batch`), and the class that makes it from rows of prepared data (`Collator`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS, IGNORE_INDEX, INPUT_IDS, LABELS
from colossal_llama2.dataset.read.loss_groups import Groups

if TYPE_CHECKING:
    import torch

# Matrix kernels are fastest on lengths that are multiples of this.
PAD_TO_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """One micro batch, on the CPU.

    Attributes:
        input_ids, labels: (batch, length) int64, padded on the right; labels are IGNORE_INDEX there.
        attention_mask: (batch, length) int64, 1 on tokens and 0 on padding; None if nothing is padded.
        lengths: (batch,) int64, tokens per sample.
        predicted: number of labels that count in the loss: not IGNORE_INDEX, and not the first of a document.
        documents: (batch, length) int64, the number of each token's document in its row, from 1, and 0 on padding; None
            if each row is one document, or documents attend to each other.
        groups: (batch, length) int64, the group (see `Groups`) of the token that each token predicts, 0 where there is
            none; None without groups.
        group_counts: (groups,) the number of predicted tokens in each group.
    """

    input_ids: "torch.Tensor"
    labels: "torch.Tensor"
    attention_mask: Optional["torch.Tensor"]
    lengths: "torch.Tensor"
    predicted: int
    documents: Optional["torch.Tensor"] = None
    groups: Optional["torch.Tensor"] = None
    group_counts: Optional["np.ndarray"] = None

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    def pinned(self) -> "Batch":
        """The same batch in page-locked memory, from which it is copied to a GPU asynchronously."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if hasattr(value, "pin_memory")}
        return replace(self, **tensors)


class Collator:
    """Turns rows of the dataset into a Batch.

    Pads to the longest sample, rounded up to a multiple of 8. The mask is made from the lengths, not from the token
    ids, so that a real token that is also the padding token (</s>) is not masked. If rows have document lengths,
    documents are kept apart, and the first token of a document is not predicted from the document before it.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        max_length: int,
        length_divisor: int = 1,
        groups: Groups | None = None,
        keeps_apart: bool = True,
    ):
        """
        Args:
            length_divisor: divides `max_length` and the length of every batch.
            groups: the groups to count, if any.
            keeps_apart: False lets the documents of a row attend to each other. Their first tokens are still not
                predicted, so the loss is over the same tokens.
        """
        self.groups, self._keeps_apart = groups, keeps_apart
        self._pad_token_id, self._max_length = pad_token_id, max_length
        self._multiple = math.lcm(PAD_TO_MULTIPLE, length_divisor)

    def __call__(self, rows: Any) -> Batch:
        """Collate an arrow table of `load_tokenized_dataset`, which `check_lengths` has accepted."""
        import torch

        ids = [np.asarray(row.values) for row in rows[INPUT_IDS]]
        labels = [np.asarray(row.values) for row in rows[LABELS]]
        lengths, width = self._lengths(ids)
        padded_ids = _padded(ids, width, self._pad_token_id)
        padded_labels = _padded(labels, width, IGNORE_INDEX)
        documents = None
        if DOCUMENT_LENGTHS in rows.column_names:
            documents = _document_numbers([np.asarray(row.values) for row in rows[DOCUMENT_LENGTHS]], width)
        if documents is not None:
            padded_labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
        mask = np.arange(width) < lengths[:, None]
        groups = counts = None
        if self.groups is not None:
            groups, counts = self.groups.of_predicted(rows, padded_labels)
        return Batch(
            input_ids=torch.from_numpy(padded_ids),
            labels=torch.from_numpy(padded_labels),
            attention_mask=None if mask.all() else torch.from_numpy(mask.astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            predicted=int((padded_labels[:, 1:] != IGNORE_INDEX).sum()),
            documents=torch.from_numpy(documents) if documents is not None and self._keeps_apart else None,
            groups=None if groups is None else torch.from_numpy(groups),
            group_counts=counts,
        )

    def of_prompts(self, rows: Sequence[Sequence[int]]) -> Batch:
        """A batch of token ids without labels, each row one document of at most `max_length` tokens."""
        import torch

        lengths, width = self._lengths(rows)
        mask = np.arange(width) < lengths[:, None]
        return Batch(
            input_ids=torch.from_numpy(_padded(rows, width, self._pad_token_id)),
            labels=torch.full((len(rows), width), IGNORE_INDEX),
            attention_mask=None if mask.all() else torch.from_numpy(mask.astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            predicted=0,
        )

    def _lengths(self, rows: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, int]:
        """The (rows,) lengths, and the width that they are padded to."""
        lengths = np.array([len(row) for row in rows])
        return lengths, min(-(-lengths.max() // self._multiple) * self._multiple, self._max_length)


def _padded(rows: Sequence[Sequence[int] | np.ndarray], width: int, value: int) -> np.ndarray:
    """(rows, width) int64, padded on the right."""
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _document_numbers(lengths: Sequence[np.ndarray], width: int) -> np.ndarray | None:
    """(rows, width) document numbers, as in `Batch`; None if each row is one document."""
    if all(len(row) == 1 for row in lengths):
        return None
    numbers = np.zeros((len(lengths), width), dtype=np.int64)
    for row, row_lengths in enumerate(lengths):
        numbers[row, : row_lengths.sum()] = np.repeat(np.arange(1, len(row_lengths) + 1), row_lengths)
    return numbers
