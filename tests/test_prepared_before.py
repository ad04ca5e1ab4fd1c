"""Data that earlier commits prepared is still read, with the same batches as in those commits.

tests/data/prepared_COMMIT holds the output of both prepare commands of that commit, and in expected.json the hashes of
the batches that its own loader made: of two ranks, in the order of one seed.

    {"pretrain": {"num_samples": 6, "pairs": [["en", "k0"]], "batches": [{"rank": 0, "sha256": "c0e0...", ...}]}}
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from colossal_llama2.dataset.layout.manifest import read_manifest_of
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.dataset.read.eval_sets import resolve_eval_sets, target_bytes
from colossal_llama2.dataset.read.loss_groups import Groups
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import check_lengths, load_tokenized_dataset
from colossal_llama2.dataset.read.sources import resolve_data
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.dataset.read.token_counts import category_tokens, measure_parts

DATA = Path(__file__).parent / "data"
# The version that each commit wrote into its manifests.
VERSIONS = {"6778aa0": 1, "7761401": 3}
# Name in expected.json: folder, --document_mask, --max_length.
READINGS = {
    "pretrain": ("pretrain", "auto", 96),
    "pretrain mask off": ("pretrain", "off", 96),
    "sft": ("sft", "auto", 256),
}


def digest(batch: Batch) -> str:
    """The hash of everything in a batch."""
    tensors = (batch.input_ids, batch.labels, batch.attention_mask, batch.documents, batch.groups, batch.group_counts)
    values = [None if tensor is None else tensor.tolist() for tensor in tensors]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("commit", VERSIONS)
def test_batches_are_those_of_the_commit_that_prepared_the_data(commit, reading):
    folder, mask, max_length = READINGS[reading]
    home = DATA / f"prepared_{commit}"
    expected = json.loads((home / "expected.json").read_text())[reading]
    dataset = load_tokenized_dataset([str(home / folder)], mask)
    check_lengths(dataset, max_length)
    assert len(dataset) == expected["num_samples"] > 0
    pairs = expected["pairs"]
    groups = Groups([tuple(pair) for pair in pairs]) if pairs else None
    order = SampleOrder(num_samples=len(dataset), micro_batch_size=1, data_size=2, accumulation_steps=2, seed=42)
    collator = Collator(pad_token_id=0, max_length=max_length, groups=groups)
    found = [
        {
            "rank": rank,
            "epoch": 0,
            "taken": taken,
            "lengths": batch.lengths.tolist(),
            "predicted": batch.predicted,
            "sha256": digest(batch),
        }
        for rank in range(2)
        for batches, taken in StepLoader(dataset, order, collator, rank).steps(0, 0)
        for batch in batches
    ]
    assert found == expected["batches"] and found


@pytest.mark.parametrize("commit", VERSIONS)
def test_manifests_and_counts_of_the_commit_are_read(commit):
    data = resolve_data([str(DATA / f"prepared_{commit}" / "pretrain")], bucketed=True)
    manifest = read_manifest_of(data.paths[0])
    assert manifest["version"] == VERSIONS[commit]
    measured = measure_parts(data.parts)
    tokens = [int(lengths.sum()) for _, lengths in measured]
    assert tokens == [entry["tokens"] for entry in manifest["bins"]]
    counted = Counter()
    for part, lengths in measured:
        counted += category_tokens(part.path, np.ones(len(lengths), int))
    assert sum(counted.values()) == sum(tokens) and set(counted) <= set(manifest["categories"])


@pytest.mark.parametrize("commit, exact", [("6778aa0", False), ("7761401", True)])
def test_bytes_of_text_are_reported_only_where_the_commit_counted_them_exactly(commit, exact, caplog):
    (held_out,) = resolve_eval_sets([f"held={DATA / f'prepared_{commit}' / 'pretrain'}"])
    assert (target_bytes(held_out.path) is not None) is exact
    assert ("no bits per byte" in caplog.text) is not exact
