"""Find samples without a trained token, which are read like others but contribute no loss."""

from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS, IGNORE_INDEX, LABELS, SCAN_ROWS
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import datasets


def untrained_samples(dataset: "datasets.Dataset", *, share: int, shares: int) -> int:
    """The number of samples without a label that counts in the loss, in one of `shares` equal shares of the data.

    Labels that do not count: IGNORE_INDEX, the first of a sample, and the first of each document if documents are kept
    apart.

    Args:
        dataset: from `load_parts`, with samples that `check_lengths` has accepted.
    """
    part = dataset.select(range(len(dataset) * share // shares, len(dataset) * (share + 1) // shares))
    return sum(_untrained(rows) for rows in part.iter(SCAN_ROWS)) if len(part) else 0


def _untrained(rows: Any) -> int:
    import pyarrow.compute as compute

    labels = compute.list_flatten(rows[LABELS])
    lengths = np.asarray(compute.list_value_length(rows[LABELS]))
    has_documents = DOCUMENT_LENGTHS in rows.column_names
    if compute.min(labels).as_py() > IGNORE_INDEX:
        # All labels count except the first ones: the usual case, four times as fast.
        firsts_each = np.asarray(compute.list_value_length(rows[DOCUMENT_LENGTHS])) if has_documents else 1
        return int((lengths == firsts_each).sum())
    starts = _starts(lengths)
    firsts = _starts(compute.list_flatten(rows[DOCUMENT_LENGTHS])) if has_documents else starts
    is_predicted = np.asarray(labels) != IGNORE_INDEX
    is_predicted[firsts] = False
    return int((~np.logical_or.reduceat(is_predicted, starts)).sum())


def _starts(lengths: Any) -> np.ndarray:
    """The start of each of consecutive stretches with these lengths."""
    lengths = np.asarray(lengths).astype(np.int64)
    return np.cumsum(lengths) - lengths


def log_untrained(untrained: int, samples: int, *, flag: str = "--dataset") -> None:
    """Log the number of samples without a trained token. Raises UserError if no sample has one."""
    if untrained == samples:
        raise UserError(
            f"{flag}: no trained token in {counted(samples, 'sample')}, all labels are -100; give other data, or "
            f"prepare the data again"
        )
    if untrained:
        logs.get_logger().warning(
            "%s: no trained token in %s of %s, all their labels are -100; they do not contribute to the loss",
            flag,
            f"{untrained:,}",
            counted(samples, "sample"),
        )
