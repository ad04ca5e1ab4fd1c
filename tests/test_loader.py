"""Which samples each rank reads, when, and how they become a batch."""

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.batch import Collator
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import (
    check_lengths,
    dataset_fingerprints,
    highest_token_id,
    load_tokenized_dataset,
)
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.errors import UserError


def order_of(num_samples, micro=1, ranks=1, accumulation=1, seed=7):
    return SampleOrder(
        num_samples=num_samples,
        micro_batch_size=micro,
        data_size=ranks,
        accumulation_steps=accumulation,
        seed=seed,
    )


def global_sequence(order, epoch, consumed=0):
    """Sample indices in the order in which all ranks together read them, one micro batch after the other."""
    by_rank = [list(order.steps(epoch, consumed, rank)) for rank in range(order.data_size)]
    sequence = []
    for steps in zip(*by_rank, strict=True):
        for micro in zip(*(indices for indices, _ in steps), strict=True):
            sequence += [int(index) for rank_indices in micro for index in rank_indices]
    return sequence


@settings(deadline=None, max_examples=100)
@given(
    num_samples=st.integers(1, 200), micro=st.integers(1, 5), ranks=st.integers(1, 4), accumulation=st.integers(1, 5)
)
def test_every_sample_once_and_the_rest_counted(num_samples, micro, ranks, accumulation):
    order = order_of(num_samples, micro, ranks, accumulation)
    sequence = global_sequence(order, epoch=0)
    assert len(sequence) == len(set(sequence)) == num_samples - order.dropped_after(0)
    assert len(list(order.steps(0, 0, 0))) == order.steps_after(0)
    assert sum(taken for _, taken in order.steps(0, 0, 0)) == len(sequence)


def test_order_is_the_same_for_any_split():
    expected = global_sequence(order_of(48), epoch=1)
    for micro, ranks, accumulation in ((2, 2, 3), (4, 1, 1), (1, 4, 2), (3, 2, 1)):
        assert global_sequence(order_of(48, micro, ranks, accumulation), epoch=1) == expected


def test_order_resumes_at_a_count_of_samples_on_other_ranks():
    straight = global_sequence(order_of(40, micro=2, ranks=2), epoch=0)
    resumed = global_sequence(order_of(40, micro=1, ranks=4), epoch=0, consumed=12)
    assert resumed == straight[12:]


def test_epochs_and_seeds_differ():
    first = global_sequence(order_of(30), epoch=0)
    assert first != global_sequence(order_of(30), epoch=1)
    assert first != global_sequence(order_of(30, seed=8), epoch=0)


def table(rows):
    kind = pyarrow.list_(pyarrow.int32())
    columns = {name: pyarrow.array([row[i] for row in rows], kind) for i, name in enumerate(("input_ids", "labels"))}
    return pyarrow.table(columns)


def collator(**changes):
    return Collator(**{"pad_token_id": 2, "max_length": 16, **changes})


def test_collator_pads_right_and_masks_by_length():
    # 2 is both </s> and the padding token; the real one must not be masked.
    batch = collator()(table([([1, 5, 2], [-100, 5, 2]), ([1, 7, 8, 9, 2], [1, 7, 8, 9, 2])]))
    assert batch.input_ids.tolist() == [[1, 5, 2, 2, 2, 2, 2, 2], [1, 7, 8, 9, 2, 2, 2, 2]]
    assert batch.labels.tolist()[0] == [-100, 5, 2] + [IGNORE_INDEX] * 5
    assert batch.attention_mask.tolist() == [[1] * 3 + [0] * 5, [1] * 5 + [0] * 3]
    assert batch.lengths.tolist() == [3, 5] and batch.tokens == 8
    # A sample's first label is never predicted, masked ones neither.
    assert batch.predicted == 2 + 4
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_collator_needs_no_mask_without_padding():
    row = list(range(1, 9))
    assert collator()(table([(row, row), (row, row)])).attention_mask is None


def test_collator_never_pads_beyond_max_length():
    row = list(range(1, 11))
    assert collator(max_length=10)(table([(row, row)])).input_ids.shape == (1, 10)


def save(folder, rows):
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows, "extra": [0] * len(rows)}).save_to_disk(folder)
    return str(folder)


def test_lengths_are_checked_before_the_run(tmp_path):
    dataset = load_tokenized_dataset([save(tmp_path / "part-00000", [[1] * 17, [1] * 3])])
    check_lengths(dataset, max_length=17)
    with pytest.raises(UserError, match="17 tokens, --max_length 16"):
        check_lengths(dataset, max_length=16)
    with pytest.raises(UserError, match="empty"):
        check_lengths(load_tokenized_dataset([save(tmp_path / "part-00001", [[1], []])]), max_length=16)


def test_more_labels_than_tokens_are_refused(tmp_path):
    datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2, 3]]}).save_to_disk(tmp_path / "part-00000")
    with pytest.raises(UserError, match="labels"):
        check_lengths(load_tokenized_dataset([str(tmp_path / "part-00000")]), max_length=16)


@pytest.mark.parametrize("sources", [["zh"], ["zh", "en", "en"], None])
def test_a_source_for_each_document_is_needed(tmp_path, sources):
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "sequence_lengths": [2, 1], "document_categories": ["a", "b"]}
    rows = [{**row, "document_sources": names} for names in (["zh", "en"], sources)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "part-00000")
    dataset = load_tokenized_dataset([str(tmp_path)], "auto")
    with pytest.raises(UserError, match="document_sources and sequence_lengths of a sample differ in length"):
        check_lengths(dataset, max_length=16)
    check_lengths(dataset.select([0]), max_length=16)


def test_ranks_divide_the_search_for_the_highest_id(tmp_path):
    dataset = load_tokenized_dataset([save(tmp_path / "part-00000", [[1, 5], [2, 90], [7], [3, 4], [8]])])
    assert [highest_token_id(dataset, share=rank, shares=2) for rank in range(2)] == [90, 8]
    assert max(highest_token_id(dataset, share=rank, shares=7) for rank in range(7)) == 90


def test_different_folders_have_different_fingerprints(tmp_path):
    parts = [save(tmp_path / f"part-0000{k}", [[k]]) for k in range(2)]
    first, second = dataset_fingerprints(parts)
    assert first != second and dataset_fingerprints(parts[:1]) == [first]


def test_step_loader_reads_parts_in_order(tmp_path):
    parts = [save(tmp_path / f"part-0000{k}", [[10 * k + i] * 3 for i in range(4)]) for k in range(2)]
    dataset = load_tokenized_dataset(parts)
    for same in (dataset, load_tokenized_dataset([str(tmp_path)])):
        assert same[np.array([0, 4, 7])]["input_ids"].to_pylist() == [[0] * 3, [10] * 3, [13] * 3]
    order = order_of(8, micro=1, ranks=2, accumulation=2)
    loader = StepLoader(dataset, order, collator(), data_rank=1)
    steps = list(loader.steps(0, 4))
    assert [(len(batches), taken) for batches, taken in steps] == [(2, 4)]
    expected = [indices[0] for indices, _ in order.steps(0, 4, 1)][0]
    value = 10 * (int(expected[0]) // 4) + int(expected[0]) % 4
    assert steps[0][0][0].input_ids[0, 0] == value


@pytest.mark.parametrize("case", ["missing", "no dataset", "no samples", "no labels"])
def test_loading_refuses(tmp_path, case):
    if case == "missing":
        path, word = tmp_path / "nowhere", "no such folder"
    elif case == "no dataset":
        path, word = tmp_path, "not a prepared"
    elif case == "no samples":
        path, word = save(tmp_path / "part-00000", []), "cannot be loaded"
    else:
        datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(tmp_path / "part-00000")
        path, word = tmp_path / "part-00000", "labels"
    with pytest.raises(UserError, match=word):
        load_tokenized_dataset([str(path)])
