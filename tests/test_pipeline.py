"""What a pipeline is given: a step's micro batches as one batch, and how many tokens count in each part of it."""

import torch

from colossal_llama2.dataset.loader import Batch
from colossal_llama2.train.pipeline import join, predicted_counts


def batch(rows, width) -> Batch:
    """Rows of token ids, all of which are labels, padded with 9."""
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    return Batch(ids, labels, None if mask.all() else mask.long(), lengths, int((labels[:, 1:] != -100).sum()))


def test_micro_batches_of_unequal_lengths_become_one_batch():
    whole = join([batch([[1, 2, 3, 4]], 4), batch([[5, 6], [7, 8, 3]], 3)])
    assert whole.input_ids.shape == whole.labels.shape == (3, 4)
    assert whole.labels.tolist() == [[1, 2, 3, 4], [5, 6, -100, -100], [7, 8, 3, -100]]
    assert whole.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert whole.lengths.tolist() == [4, 2, 3] and whole.predicted == 3 + 1 + 2
    assert predicted_counts(whole.labels, 2) == [4, 2]


def test_nothing_padded_needs_no_mask():
    assert join([batch([[1, 2]], 2), batch([[3, 4]], 2)]).attention_mask is None
