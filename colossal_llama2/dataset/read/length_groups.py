"""Samples of similar length one after the other, so that a batch has little padding (--group_by_length).

An order is divided into windows. Each window is sorted by length and cut into chunks, and its chunks are shuffled. So a
batch has samples from everywhere in a window, and long and short batches alternate. As everywhere, the order depends on
lengths, seed and epoch alone: not on the size of a batch or the number of ranks, so a run can continue on other ranks.
transformers' LengthGroupedSampler, with the same idea, depends on the batch.
"""

import numpy as np

# A window is at most a quarter of the data, unless there is very little, so that epochs differ.
LEAST_WINDOWS = 4
CHUNKS = 8
# Powers of two, into which most sizes of a batch divide.
LEAST_CHUNK, LARGEST_CHUNK = 8, 512
# Makes this choice independent of the order that it regroups, under one seed.
GROUPING = 3


def grouped_by_length(rows: np.ndarray, lengths: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, or of one of its buckets, regrouped.

    Args:
        rows: (samples,) numbers of rows in their random order.
        lengths: (all rows,) tokens of each row.
    """
    chunk = LEAST_CHUNK
    while chunk < LARGEST_CHUNK and 2 * chunk * CHUNKS * LEAST_WINDOWS <= len(rows):
        chunk *= 2
    window = chunk * CHUNKS
    random = np.random.default_rng([seed, epoch, len(rows), GROUPING])
    regrouped = []
    for start in range(0, len(rows), window):
        inside = rows[start : start + window]
        # Samples of one length stay in their random order.
        inside = inside[np.argsort(lengths[inside], kind="stable")]
        chunks = [inside[first : first + chunk] for first in range(0, len(inside), chunk)]
        regrouped += [chunks[number] for number in random.permutation(len(chunks))]
    return np.concatenate(regrouped) if regrouped else rows
