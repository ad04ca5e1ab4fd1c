"""Samples of which no token is trained: they are read like others, and nothing is learned from them."""

from typing import TYPE_CHECKING

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS, IGNORE_INDEX, LABELS, SCAN_ROWS
from colossal_llama2.errors import UserError

if TYPE_CHECKING:
    import datasets


def untrained_samples(dataset: "datasets.Dataset", *, share: int, shares: int) -> int:
    """How many samples have no label that counts in the loss, in one of `shares` equal shares of the data.

    What does not count: IGNORE_INDEX, the first token of a sample, and, where documents are kept apart, of each.

    Args:
        dataset: as `load_tokenized_dataset` gives it, with samples that `check_lengths` has accepted.
    """
    part = dataset.select(range(len(dataset) * share // shares, len(dataset) * (share + 1) // shares))
    return sum(_untrained(rows) for rows in part.iter(SCAN_ROWS)) if len(part) else 0


def _untrained(rows) -> int:
    import pyarrow.compute as compute

    labels = compute.list_flatten(rows[LABELS])
    lengths = np.asarray(compute.list_value_length(rows[LABELS]))
    has_documents = DOCUMENT_LENGTHS in rows.column_names
    if compute.min(labels).as_py() > IGNORE_INDEX:
        # All tokens but the first ones count: the usual case, at four times the speed.
        firsts_each = np.asarray(compute.list_value_length(rows[DOCUMENT_LENGTHS])) if has_documents else 1
        return int((lengths == firsts_each).sum())
    starts = _starts(lengths)
    firsts = _starts(compute.list_flatten(rows[DOCUMENT_LENGTHS])) if has_documents else starts
    is_predicted = np.asarray(labels) != IGNORE_INDEX
    is_predicted[firsts] = False
    return int((~np.logical_or.reduceat(is_predicted, starts)).sum())


def _starts(lengths) -> np.ndarray:
    """Where each stretch of these lengths begins, if one follows the other."""
    lengths = np.asarray(lengths).astype(np.int64)
    return np.cumsum(lengths) - lengths


def log_untrained(untrained: int, samples: int, *, flag: str = "--dataset") -> None:
    """Log how many of the samples have no trained token. Raises UserError if all have none."""
    if untrained == samples:
        raise UserError(
            f"{flag}: none of its {samples:,} samples has a trained token, all their labels are -100; give other data, "
            f"or prepare it again"
        )
    if untrained:
        logs.get_logger().warning(
            "%s: %s of %s samples have no trained token, all their labels are -100; they count in no loss",
            flag,
            f"{untrained:,}",
            f"{samples:,}",
        )
