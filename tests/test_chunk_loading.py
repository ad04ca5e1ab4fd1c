"""Weights read into Gemini's chunks: the same numbers as ColossalAI's, in less memory."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import launching

# The embeddings are most of the model. Three ranks divide neither a row of a matrix nor a norm.
VOCABULARY, WIDTH = 20_002, 256
CASES = {
    "one file": ({}, "", "bfloat16"),
    "several files": ({"max_shard_size": "3MB"}, "", "bfloat16"),
    "float32": ({}, "", "float32"),
    "tied embeddings": ({}, "tied", "bfloat16"),
    "accumulated": ({}, "--accumulation_steps 2", "bfloat16"),
}


def make_model(folder, saving: dict, *, is_tied: bool, dtype: str) -> None:
    """A model with other numbers in every row."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=is_tied,
    )
    import torch

    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder, **saving)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_in_less_memory(name, tmp_path):
    saving, more, dtype = CASES[name]
    make_model(tmp_path / "model", saving, is_tied=more == "tied", dtype=dtype)
    words = ["--benchmark", "--pretrained", str(tmp_path / "model"), "--max_length", "16", "--mixed_precision", "bf16"]
    words += ["--plugin", "gemini", "--num_samples", "36", *(more.split() if more != "tied" else [])]
    job = {"name": "job", "flags": words, "model": str(tmp_path / "model")}
    done = launching.attempt(tmp_path, job, worker="loading_worker.py", ranks=3, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "job.json").read_text())
    assert not any(found["differing"]) and found["chunks"] >= 4, found
    assert not any(found["zeros"]), found
    assert found["ours"] < found["theirs"] / 2, found
