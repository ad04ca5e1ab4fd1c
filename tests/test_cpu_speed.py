"""The precision and the threads of inference on CPUs: what is tried, what is chosen, and --dtype."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import inference_example
from colossal_llama2.inference import cpu_speed
from colossal_llama2.inference.cpu_speed import Choice, choose_on_cpu
from colossal_llama2.inference.generation import generate
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.settings import GenerationSettings
from tests import tiny

GREEDY = GenerationSettings(6, False, 1.0, 50, 1.0, None)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory, tokenizer_dir):
    return tiny.make_model(tmp_path_factory.mktemp(request.param) / "m", tokenizer_dir, dtype=request.param)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def is_bf16(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.fixture
def measured(monkeypatch, threads):
    """Replaces the trial by given speeds; returns what was tried."""
    tried = []

    def measure(speeds: dict) -> list:
        def found(folder, choices, rows):
            tried.extend(choices)
            return {choice: speeds.get(choice, 1.0) for choice in choices}

        monkeypatch.setattr(cpu_speed, "SMALLEST", 0)
        monkeypatch.setattr(cpu_speed, "_measured", found)
        return tried

    return measure


def test_weights_are_never_rounded_by_the_choice(folder, measured, monkeypatch, threads):
    """bf16 is tried only for weights that are stored in it, and must be clearly faster."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slow, fast = Choice("fp32", threads), Choice("bf16", threads)
    tried = measured({fast: 2.0})
    assert choose_on_cpu(folder, rows=1) == ("bf16" if is_bf16(folder) else "fp32")
    assert tried == ([slow, fast] if is_bf16(folder) else [])
    measured({fast: 1.1})
    assert choose_on_cpu(folder, rows=1) == "fp32"
    assert torch.get_num_threads() == threads


def test_the_fastest_number_of_threads_is_set(folder, measured, monkeypatch, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3)))
    tried = measured({Choice("fp32", 3): 2.0})
    assert choose_on_cpu(folder, rows=1) == "fp32" and torch.get_num_threads() == 3
    assert Choice("fp32", threads) in tried and Choice("fp32", 3) in tried


def test_the_trial_runs_each_choice_and_restores_the_threads(folder, monkeypatch, threads):
    choices = [Choice("fp32", 1), Choice("bf16", 1), Choice("fp32", 2)]
    speeds = cpu_speed._measured(folder, choices, 3)
    assert speeds.keys() == set(choices) and min(speeds.values()) > 0
    assert torch.get_num_threads() == threads


def test_a_small_model_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(cpu_speed, "_measured", None)
    assert choose_on_cpu(folder, rows=1) == "fp32"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_each_precision_generates(folder, dtype):
    model, tokenizer = load_model(str(folder), "cpu", dtype=dtype)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {param.dtype for param in model.parameters()} == {expected}
    assert generate(model, tokenizer, "the", GREEDY)


def test_numbers_too_large_for_fp16_are_one_line(tmp_path, tokenizer_dir, capsys):
    folder = tiny.make_model(tmp_path / "m", tokenizer_dir)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        inference_example.main(["--model_path", str(folder), "--device", "cpu", "--dtype", "fp16"])
    lines = [line for line in capsys.readouterr().err.splitlines() if " | " not in line]
    assert end.value.code == 2 and len(lines) == 1
    assert "lm_head.weight" in lines[0] and "use --dtype bf16 or fp32" in lines[0]
