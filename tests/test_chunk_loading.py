"""Weights read into Gemini's chunks: the same numbers as ColossalAI's, in less memory."""

import json
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import launching

# The embeddings are most of the model. Three ranks divide neither a row of a matrix nor a norm.
VOCABULARY, WIDTH = 20_002, 256


@dataclass(frozen=True)
class Case:
    """How a model is stored, and the flags of the run."""

    flags: str = "--plugin gemini --mixed_precision bf16"
    dtype: str = "bfloat16"
    max_shard_size: str = "5GB"
    is_tied: bool = False
    ranks: int = 3
    # Of a parameter that is not in a chunk, and of one rank, ColossalAI gathers nothing.
    saves_memory: bool = True


CASES = {
    "one file": Case(),
    "several files": Case(max_shard_size="3MB"),
    "float32": Case(dtype="float32"),
    "tied embeddings": Case(is_tied=True),
    "accumulated": Case("--plugin gemini --mixed_precision bf16 --accumulation_steps 2"),
    "fp16": Case("--plugin gemini --mixed_precision fp16"),
    "automatic placement": Case("--plugin gemini_auto --mixed_precision bf16"),
    "frozen layers": Case("--plugin gemini --mixed_precision bf16 --freeze_non_embeds_params"),
    "one rank": Case(ranks=1, saves_memory=False),
}


def make_model(folder, case: Case) -> None:
    """A model with other numbers in every row."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=case.is_tied,
    )
    LlamaForCausalLM(config).to(getattr(torch, case.dtype)).save_pretrained(folder, max_shard_size=case.max_shard_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_in_less_memory(name, tmp_path):
    case = CASES[name]
    make_model(tmp_path / "model", case)
    words = ["--benchmark", "--pretrained", str(tmp_path / "model"), "--max_length", "16", *case.flags.split()]
    job = {"name": "job", "flags": [*words, "--num_samples", "36"], "model": str(tmp_path / "model")}
    done = launching.attempt(tmp_path, job, worker="loading_worker.py", ranks=case.ranks, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "job.json").read_text())
    assert not any(found["differing"]) and not any(found["zeros"]) and found["tensors"] >= 4, found
    if case.saves_memory:
        assert found["ours"] < found["theirs"] / 2, found
