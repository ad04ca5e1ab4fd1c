"""The input of a pipeline: a step's micro batches as one batch, in parts that the stages pass on."""

import torch

from colossal_llama2.dataset.read.batch import Batch
from colossal_llama2.train.stepping.pipeline import regroup


def batch(rows, width, documents=None) -> Batch:
    """Rows of token ids, all of which are labels, padded with 9."""
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    predicted = int((labels[:, 1:] != -100).sum())
    return Batch(ids, labels, None if mask.all() else mask.long(), lengths, predicted, documents)


def test_micro_batches_of_unequal_lengths_are_regrouped():
    first, second = regroup([batch([[1, 2, 3, 4]], 4), batch([[5, 6], [7, 8, 3]], 3)], 2)
    assert first.labels.tolist() == [[1, 2, 3, 4], [5, 6, -100, -100]] and first.input_ids[0].tolist() == [1, 2, 3, 4]
    assert second.labels.tolist() == [[7, 8, 3, -100]] and second.input_ids.shape == (1, 4)
    assert first.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert first.lengths.tolist() == [4, 2] and (first.predicted, second.predicted) == (3 + 1, 2)
    assert first.documents is second.documents is None


def test_documents_stay_apart_next_to_rows_of_one():
    spliced = batch([[1, 2, 1, 4]], 4, torch.tensor([[1, 1, 2, 2]]))
    parts = regroup([spliced, batch([[5, 6]], 2)], 1)
    assert [part.documents.tolist() for part in parts] == [[[1, 1, 2, 2]], [[1, 1, 0, 0]]]


def test_nothing_padded_needs_no_mask():
    assert regroup([batch([[1, 2]], 2), batch([[3, 4]], 2)], 2)[0].attention_mask is None
