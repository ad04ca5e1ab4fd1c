"""Optimizer states of several ranks in the files of a checkpoint: the same bytes as ColossalAI's, in less memory."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import launching

# The moments of the embeddings are most of the model's. Three ranks do not divide a norm, nor two the vocabulary.
VOCABULARY, WIDTH = 20_001, 256
# Flags and ranks.
JOBS = {
    "zero2": ("--plugin zero2", 3),
    "gemini": ("--plugin gemini", 3),
    "3d": ("--plugin 3d --zero 1", 3),
    "3d tp2 dp2": ("--plugin 3d --tp 2 --zero 1", 4),
}
# The most that a save may take besides what a rank holds, relative to the largest file.
ALLOWED = 1.35


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_the_same_files_in_the_memory_of_one(model, tmp_path, name):
    flags, ranks = JOBS[name]
    words = ["--benchmark", "--pretrained", str(model), "--max_length", "16", "--mixed_precision", "bf16"]
    words += [*flags.split(), "--num_samples", str(12 * ranks)]
    done = launching.attempt(
        tmp_path, {"name": "job", "flags": words}, worker="saving_worker.py", ranks=ranks, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "job.json").read_text())
    assert not found["differing"] and len(found["files"]) >= 4, found
    assert found["ours"] < ALLOWED * found["largest"] < found["theirs"], found
