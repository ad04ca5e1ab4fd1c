"""The loss of a run, on two ranks: documents of spliced samples kept apart, and the head in chunks."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import launching, layouts, reference, training_jobs
from tests.training_jobs import CLIP, GLOBAL_BATCH, LENGTH, LR, write_spliced_data

STEPS = 4
WITH_LOGITS = ["--chunked_loss", "off"]
FUSED = ["--use_flash_attn", "--use_grad_checkpoint"]


def flags_of(layout: str, *more, accumulation_steps: int = 1) -> list[str]:
    """A layout's flags; pipelines process a batch in parts of a quarter or a half."""
    parts = 4 if accumulation_steps == 1 else 2
    in_parts = ["--microbatch_size", GLOBAL_BATCH // accumulation_steps // parts] if "pp2" in layout else []
    return layouts.flags(layout, *in_parts, *more, batch=GLOBAL_BATCH, accumulation_steps=accumulation_steps)


ZERO2, TP2, PP2 = flags_of("fp32 zero2"), flags_of("fp32 3d tp2"), flags_of("fp32 3d pp2")
SP2, SPLIT_GATHER = flags_of("fp32 3d sp2 all_to_all"), flags_of("fp32 3d tp2 split_gather")
FLOAT32_RUNS = {
    "zero2": [*ZERO2, "--document_mask", "on", "--chunked_loss", "on"],
    "zero2_fused": [*ZERO2, *FUSED],
    "zero2_accumulating": flags_of("fp32 zero2", *WITH_LOGITS, accumulation_steps=4),
    "3d": flags_of("fp32 3d"),
    "3d_tp2": TP2,
    "3d_tp2_with_logits": [*TP2, *WITH_LOGITS],
    "3d_tp2_fused": [*TP2, *FUSED],
    "3d_pp2": PP2,
    "3d_pp2_with_logits": [*PP2, *WITH_LOGITS],
    "3d_pp2_fused": flags_of("fp32 3d pp2", *FUSED, accumulation_steps=4),
    "3d_sp2_all_to_all": SP2,
    "3d_sp2_all_to_all_with_logits": [*SP2, *WITH_LOGITS],
    "3d_sp2_all_to_all_fused": flags_of("fp32 3d sp2 all_to_all", *FUSED, accumulation_steps=4),
    "3d_tp2_split_gather": SPLIT_GATHER,
    "3d_tp2_ring_fused": flags_of("fp32 3d tp2 ring", *FUSED),
}
BFLOAT16_RUNS = {
    "gemini": flags_of("bf16 gemini"),
    "gemini_with_logits": flags_of("bf16 gemini", *WITH_LOGITS),
    "gemini_auto_fused": flags_of("bf16 gemini_auto", *FUSED),
    "gemini_accumulating": flags_of("bf16 gemini", accumulation_steps=2),
}


# One step each, with NEFTune.
NOISE_RUNS = {
    "noise_zero2": ZERO2,
    "noise_tp2": TP2,
    "noise_sp2": SP2,
    "noise_split_gather": SPLIT_GATHER,
    "noise_pp2": PP2,
}


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer_dir) -> str:
    return write_spliced_data(tmp_path_factory.mktemp("prepared") / "part-00000", tokenizer_dir, STEPS)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, part, model_dir) -> Path:
    """Run every command of this file on two ranks; returns the folder of their folders."""
    folder = tmp_path_factory.mktemp("jobs")
    plain = folder / "part-00000"
    datasets.load_from_disk(part).remove_columns("sequence_lengths").save_to_disk(plain)
    specs = []
    runs = {**FLOAT32_RUNS, **BFLOAT16_RUNS, "off": [*ZERO2, "--document_mask", "off"]}
    for name, flags in NOISE_RUNS.items():
        runs[name] = [*flags, "--use_neft", "--max_steps", 1]
    runs["refused"] = [*ZERO2, "--document_mask", "on", "--dataset", plain]
    for name, flags in runs.items():
        here = folder / name
        common = ["--pretrained", model_dir, "--dataset", part, "--max_length", LENGTH, "--lr", LR, "--grad_clip", CLIP]
        common += ["--save_dir", here / "ckpt", "--tensorboard_dir", here / "tb", "--config_file", here / "config.json"]
        specs.append({"name": name, "script": "train.py", "flags": [str(word) for word in [*common, *flags]]})
        if name in NOISE_RUNS:
            specs[-1].update(script="train_sft.py", noise=True)
    launching.launch(folder, specs)
    return folder


def curve(folder: Path, name: str) -> list[float]:
    """A TensorBoard curve, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


def distance(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    """`launching.distance` of the saved weights."""
    weights = AutoModelForCausalLM.from_pretrained(folder / "ckpt" / "modeling").named_parameters()
    return launching.distance({name: weight.detach().float() for name, weight in weights}, expected)


def documents_alone(part, model_dir, precision: str) -> reference.Trace:
    return reference.train(
        model_dir, [part], precision=precision, global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP, unsplice=True
    )


@pytest.fixture(scope="module")
def float32(part, model_dir) -> reference.Trace:
    return documents_alone(part, model_dir, "fp32")


@pytest.fixture(scope="module")
def bfloat16(part, model_dir) -> reference.Trace:
    return documents_alone(part, model_dir, "bf16")


@pytest.mark.parametrize("name", FLOAT32_RUNS)
def test_spliced_documents_train_as_if_alone(jobs, float32, name):
    assert json.loads((jobs / f"{name}.json").read_text())["error"] is None
    assert curve(jobs / name, "Loss") == pytest.approx(float32.losses, rel=1e-5)
    assert curve(jobs / name, "Gradient Norm") == pytest.approx(float32.grad_norms, rel=1e-5)
    assert distance(jobs / name, float32.weights) < 1e-4


@pytest.mark.parametrize("name", BFLOAT16_RUNS)
def test_spliced_documents_train_as_if_alone_in_bfloat16(jobs, bfloat16, name):
    assert json.loads((jobs / f"{name}.json").read_text())["error"] is None
    assert curve(jobs / name, "Loss") == pytest.approx(bfloat16.losses, rel=1.5e-3)
    assert curve(jobs / name, "Gradient Norm") == pytest.approx(bfloat16.grad_norms, rel=0.03)
    assert distance(jobs / name, bfloat16.weights) < 0.01


def test_off_is_one_text_per_sample(jobs, part, model_dir, float32):
    trace = reference.train(model_dir, [part], precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)
    assert curve(jobs / "off", "Loss") == pytest.approx(trace.losses, rel=1e-5)
    assert trace.losses != pytest.approx(float32.losses, rel=1e-3)


def test_data_without_documents_is_refused(jobs):
    error = json.loads((jobs / "refused.json").read_text())["error"]
    assert "--document_mask on" in error and "sequence_lengths" in error and not (jobs / "refused").exists()


@pytest.mark.parametrize("name", NOISE_RUNS)
def test_noise_of_a_run_has_the_scale_of_each_document(jobs, name):
    """NEFTune's alpha is 5 and the model's width 64: at most 5 / sqrt(tokens * 64), and not much less."""
    result = json.loads((jobs / f"{name}.json").read_text())
    assert result["error"] is None
    tokens = [length for length, _ in result["noise"]]
    assert len(tokens) > 4 and len(set(tokens)) > 3
    for length, greatest in result["noise"]:
        assert 0.97 < greatest / (5 / (length * 64) ** 0.5) < 1.001


def test_ranks_of_a_model_copy_draw_the_same_noise(jobs):
    for name in ("noise_sp2", "noise_split_gather"):
        assert curve(jobs / name, "Loss") == pytest.approx(curve(jobs / "noise_tp2", "Loss"), rel=1e-5)


# Micro batch, micro batches of a step, ranks: eight samples of unequal numbers of tokens in each step.
SPLITS = ((4, 1, 2), (2, 2, 2), (1, 8, 1), (8, 1, 1))


def test_a_step_is_the_same_however_it_is_divided(tmp_path, part, model_dir):
    """Losses are weighted by tokens: over samples, micro batches and ranks alike."""
    curves = []
    for micro_batch, accumulation_steps, ranks in SPLITS:
        name = f"split-{micro_batch}-{accumulation_steps}-{ranks}"
        words = training_jobs.common_flags(tmp_path / name, model_dir, [part])
        words += ["--plugin", "zero2", "--mixed_precision", "fp32", "--max_steps", STEPS]
        words += ["--micro_batch_size", micro_batch, "--accumulation_steps", accumulation_steps]
        spec = {"name": name, "script": "train_sft.py", "flags": [str(word) for word in words]}
        launching.launch(tmp_path, [spec], ranks=ranks)
        assert json.loads((tmp_path / f"{name}.json").read_text())["error"] is None
        curves.append((curve(tmp_path / name, "Loss"), curve(tmp_path / name, "Gradient Norm")))
    for losses, norms in curves:
        assert len(losses) == STEPS
        assert losses == pytest.approx(curves[0][0], rel=1e-5) and norms == pytest.approx(curves[0][1], rel=1e-5)
