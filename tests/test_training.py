"""Training on two ranks, by the real ColossalAI, against a plain PyTorch loop: every plugin, resume, and what is saved.

train_worker.py runs the commands.
"""

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import load_tokenized_dataset
from colossal_llama2.train.run_folder import file_names
from tests import far_copies, layouts, reference, tiny
from tests.launching import distance, launch
from tests.training_jobs import (
    CLIP,
    GLOBAL_BATCH,
    LR,
    Job,
    common_flags,
    finished,
    weights_of,
    with_vocabulary,
    write_data,
)

STEPS, MIDDLE = 4, 2
# What a run leaves beside its checkpoints.
REPORTS = ["plan.json", file_names.LOG_NAME, *file_names.REPORT_NAMES]


def flags_of(layout: str, *more, accumulation_steps: int = 1) -> list[str]:
    """A layout's flags; pipelines process a batch in parts of a quarter."""
    in_parts = ["--microbatch_size", GLOBAL_BATCH // accumulation_steps // 4] if "pp2" in layout else []
    return layouts.flags(layout, *in_parts, *more, batch=GLOBAL_BATCH, accumulation_steps=accumulation_steps)


# name -> flags; the rest of the flags is the same for all. test_loss.py has recomputation, fused attention, and each
# layout with documents; tests/equality.py has each layout with each option.
FLOAT32_RUNS = {
    "ddp_accumulating": flags_of("fp32 ddp", accumulation_steps=4),
    "zero2": flags_of("fp32 zero2"),
    "zero2_accumulating": flags_of("fp32 zero2", accumulation_steps=4),
    "zero2_cpu": flags_of("fp32 zero2_cpu"),
    "3d_zero0_accumulating": flags_of("fp32 3d", accumulation_steps=4),
    "3d_tp2": flags_of("fp32 3d tp2"),
    "3d_pp2": flags_of("fp32 3d pp2"),
    "3d_pp2_accumulating": flags_of("fp32 3d pp2", accumulation_steps=4),
    "3d_sp2_all_to_all": flags_of("fp32 3d sp2 all_to_all"),
    "3d_tp2_ring": flags_of("fp32 3d tp2 ring"),
    # Ranks that share a sample would sum the gradients of its norms once per micro batch.
    "3d_tp2_split_gather_accumulating": flags_of("fp32 3d tp2 split_gather", accumulation_steps=4),
}
BFLOAT16_RUNS = {
    "ddp_fp16": flags_of("fp16 ddp", accumulation_steps=2),
    "ddp_bf16": flags_of("bf16 ddp"),
    "gemini_bf16": flags_of("bf16 gemini"),
    "gemini_bf16_accumulating": flags_of("bf16 gemini", accumulation_steps=2),
    "gemini_auto_bf16": flags_of("bf16 gemini_auto"),
    "zero2_bf16": flags_of("bf16 zero2"),
    "zero2_cpu_bf16": flags_of("bf16 zero2_cpu"),
    "3d_zero1_bf16_accumulating": flags_of("bf16 3d zero1", accumulation_steps=2),
    "3d_tp2_zero1_bf16": flags_of("bf16 3d tp2 zero1"),
    "3d_tp2_zero2_bf16_accumulating": flags_of("bf16 3d tp2 zero2", accumulation_steps=4),
    "3d_pp2_zero1_bf16": flags_of("bf16 3d pp2 zero1", "--chunked_loss", "off"),
}
FLOAT16_RUNS = {
    "gemini_fp16": flags_of("fp16 gemini"),
    "gemini_fp16_accumulating": flags_of("fp16 gemini", accumulation_steps=2),
    "zero2_fp16": flags_of("fp16 zero2"),
    "3d_zero0_fp16": flags_of("fp16 3d zero0", accumulation_steps=2),
    "3d_pp2_fp16": flags_of("fp16 3d pp2 zero1"),
    "3d_sp2_fp16": flags_of("fp16 3d sp2 all_to_all zero1"),
}
# High enough that several passes of the first step overflow.
INITIAL_SCALE = 2**23

UNPADDED_RUNS = {
    "full_sp2_all_to_all": flags_of("fp32 3d sp2 all_to_all"),
    "full_sp2_all_to_all_fused": flags_of("fp32 3d sp2 all_to_all", "--use_flash_attn"),
    "full_tp2_split_gather": flags_of("fp32 3d tp2 split_gather"),
}

ROWS_RUNS = {
    "rows_zero2": flags_of("fp32 zero2"),
    "rows_tp2": flags_of("fp32 3d tp2 flash"),
    "rows_pp2": flags_of("fp32 3d pp2"),
    "rows_tp2_split_gather": flags_of("fp32 3d tp2 split_gather"),
    "rows_sp2": flags_of("fp32 3d sp2 all_to_all"),
    "rows_ddp_bf16": flags_of("bf16 ddp", accumulation_steps=2),
    "rows_zero2_bf16": flags_of("bf16 zero2"),
    "rows_gemini_bf16": flags_of("bf16 gemini"),
    "rows_gemini_auto_bf16": flags_of("bf16 gemini_auto", accumulation_steps=2),
    "rows_tp2_bf16": flags_of("bf16 3d tp2 zero1"),
}
TIED_ROWS_RUNS = {
    "rows_tied_ddp": flags_of("fp32 ddp"),
    "rows_tied": flags_of("fp32 zero2"),
    "rows_tied_gemini": flags_of("bf16 gemini"),
    "rows_tied_tp2": flags_of("fp32 3d tp2"),
    "rows_tied_pp2": flags_of("fp32 3d pp2"),
}
OLD_MIRROR_RUNS = {
    "mirror_zero2": flags_of("bf16 zero2"),
    "mirror_gemini": flags_of("bf16 gemini"),
    "mirror_tp2": flags_of("bf16 3d tp2 zero1"),
    "mirror_pp2": flags_of("bf16 3d pp2 zero1"),
}
BIASED_RUNS = ["biased_3d_tp2_ring", "biased_3d_tp2_split_gather_accumulating", "biased_3d_tp2_ring_unrepaired"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer_dir) -> list[str]:
    return write_data(tmp_path_factory.mktemp("prepared"), tokenizer_dir, STEPS)


@pytest.fixture(scope="module")
def full_parts(tmp_path_factory, tokenizer_dir) -> list[str]:
    """Data whose batches are not padded, like spliced data."""
    return write_data(tmp_path_factory.mktemp("full"), tokenizer_dir, 3, full=True)


@pytest.fixture(scope="module")
def tied_model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A model whose input and output embeddings are one matrix."""
    return tiny.make_model(tmp_path_factory.mktemp("tied") / "model", tokenizer_dir, tie=True)


@pytest.fixture(scope="module")
def biased_model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A model with attention_bias and mlp_bias."""
    return tiny.make_model(tmp_path_factory.mktemp("biased") / "model", tokenizer_dir, biases=True)


@pytest.fixture(scope="module")
def old_mirror_dir(tmp_path_factory, tied_model_dir) -> Path:
    """A model as some mirrors ship it: tied embeddings under both names, and configurations that cannot be saved."""
    folder = tmp_path_factory.mktemp("old") / "model"
    shutil.copytree(tied_model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": -1, "max_length": 99}))
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def small_model_dir(tmp_path_factory, model_dir) -> Path:
    """A model with fewer tokens than the data has."""
    return with_vocabulary(model_dir, tmp_path_factory.mktemp("small") / "model", 300)


@pytest.fixture(scope="module")
def three_headed_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A model whose attention heads cannot be divided between two ranks."""
    return tiny.make_model(tmp_path_factory.mktemp("heads") / "model", tokenizer_dir, heads=3)


@pytest.fixture(scope="module")
def odd_model_dir(tmp_path_factory, model_dir) -> Path:
    """A model whose vocabulary of 601 cannot be halved."""
    return with_vocabulary(model_dir, tmp_path_factory.mktemp("odd") / "model", 601)


@pytest.fixture(scope="module")
def far_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A model that attends 1,500 tokens back, and data that repeats after as many."""
    folder = tmp_path_factory.mktemp("far")
    far_copies.make_model(folder / "model", tokenizer_dir, distance=1500)
    far_copies.write_data(folder, samples=2, length=2048, distance=1500)
    return folder


NEW_ROWS = [[400, 560], [570, 601]]
NAN_WEIGHT = "model.layers.1.mlp.up_proj.weight"


def spoilt_copy(model_dir: Path, folder: Path) -> Path:
    """A copy of a model with a NaN in the second half of one weight, which the second rank reads."""
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights[NAN_WEIGHT][-1, -1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def grown(model_dir: Path, folder: Path, rows: list) -> Path:
    """A copy of a model that lists its new rows."""
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "initialized_rows": rows}))
    return folder


@pytest.fixture(scope="module")
def grown_model_dir(tmp_path_factory, odd_model_dir) -> Path:
    """That model, with new rows in each half."""
    return grown(odd_model_dir, tmp_path_factory.mktemp("grown") / "model", NEW_ROWS)


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory,
    parts,
    full_parts,
    model_dir,
    odd_model_dir,
    grown_model_dir,
    tied_model_dir,
    small_model_dir,
    three_headed_dir,
    biased_model_dir,
    old_mirror_dir,
    far_dir,
) -> dict[str, Job]:
    """Run every command of this file on two ranks and return them by name."""
    folder = tmp_path_factory.mktemp("jobs")
    specs = []

    def add(name: str, *flags, script="train.py", model=model_dir, run="tb", home=None, **options) -> None:
        here = folder / (home or name)
        common = common_flags(here, model, parts, run=run)
        specs.append({"name": name, "script": script, "flags": [str(x) for x in [*common, *flags]], **options})

    zero2, gemini, tp2 = flags_of("fp32 zero2"), flags_of("bf16 gemini"), flags_of("fp32 3d tp2")
    pp2, tp2_bf16 = flags_of("fp32 3d pp2"), flags_of("bf16 3d tp2 zero1")
    for name, flags in {**FLOAT32_RUNS, **BFLOAT16_RUNS}.items():
        add(name, *flags, "--save_interval", MIDDLE if name == "gemini_bf16" else 1000, moments=True)
    add("unclipped", *zero2, "--gradient_clipping", "0", moments=True)
    for name, flags in (("frozen", zero2), ("frozen_gemini", gemini), ("frozen_pp2", pp2)):
        add(name, *flags, "--freeze_non_embeds_params")
    for name, flags in ROWS_RUNS.items():
        add(name, *flags, "--train_new_rows_only", model=grown_model_dir)
    grown_and_tied = grown(tied_model_dir, folder / "grown_and_tied", NEW_ROWS[:1])
    for name, flags in FLOAT16_RUNS.items():
        add(name, *flags, initial_scale=INITIAL_SCALE)
    accumulating = FLOAT16_RUNS["gemini_fp16_accumulating"]
    add("overflow_unrepaired", *accumulating, initial_scale=INITIAL_SCALE, unrepaired=["forget_skipped"])
    for name, flags in TIED_ROWS_RUNS.items():
        add(name, *flags, "--train_new_rows_only", "--max_steps", "3", model=grown_and_tied)
    for name, flags in OLD_MIRROR_RUNS.items():
        add(name, *flags, "--max_steps", "1", model=old_mirror_dir)
    for name in BIASED_RUNS:
        flags = FLOAT32_RUNS[name.removeprefix("biased_").removesuffix("_unrepaired")]
        repairs = ["sum_split_biases"] if name.endswith("_unrepaired") else []
        add(name, *flags, model=biased_model_dir, unrepaired=repairs)
    spoilt = spoilt_copy(model_dir, folder / "spoilt")
    for name, flags in (("nan_zero2", flags_of("bf16 zero2")), ("nan_gemini", gemini), ("nan_tp2", tp2_bf16)):
        add(name, *flags, model=spoilt)
    for name, flags in (("tied", zero2), ("tied_gemini", gemini), ("tied_tp2", tp2), ("tied_pp2", pp2)):
        add(name, *flags, model=tied_model_dir)
    for name, flags in (("odd_vocabulary", tp2_bf16), ("odd_vocabulary_pp2", pp2)):
        add(name, *flags, model=odd_model_dir)
    add("weights_only", *zero2, "--load_checkpoint", folder / "zero2" / "ckpt" / "modeling")
    add("two_epochs", *zero2, "--num_epochs", "2", "--accumulation_steps", "3")
    # test_loss.py has the noise of other layouts.
    for name, flags in {"noise": zero2, "noise_again": zero2, "noise_gemini": gemini}.items():
        add(name, *flags, "--use_neft", "--max_steps", "2", script="train_sft.py")
    for name, flags in UNPADDED_RUNS.items():
        add(name, *flags, "--dataset", *full_parts)
    add("ring_unrepaired", *FLOAT32_RUNS["3d_tp2_ring"], "--max_steps", "1", unrepaired=["ring_weight_gradients"])
    add("loss_unrepaired", *BFLOAT16_RUNS["3d_pp2_zero1_bf16"], unrepaired=["loss_in_float32"])
    # Others read what the run "zero2" has left.
    add("first", *zero2, "--save_interval", MIDDLE)
    middle = ("--load_checkpoint", folder / "first" / "ckpt" / f"epoch-0_step-{MIDDLE}")
    end = ("--load_checkpoint", folder / "first" / "ckpt" / f"epoch-0_step-{STEPS}")
    add("on_tp2", *tp2, *middle, run="tb_tp2", home="first")
    add("second_epoch", *zero2, *end, "--num_epochs", "2", run="tb_second", home="first")
    add("nothing_left", *zero2, *end, home="first")
    add("other_seed", *zero2, *middle, "--seed", "1", home="first")
    add("other_data", *zero2, *middle, "--dataset", *reversed(parts), home="first")
    add("now_frozen", *zero2, *middle, "--freeze_non_embeds_params", home="first")
    add("foreign_ids", *zero2, model=small_model_dir)
    far = ["--dataset", far_dir / "part-00000", "--max_length", 2048, "--micro_batch_size", 1]
    for name, repairs in (("far", []), ("far_unrepaired", ["unrounded_buffers"])):
        add(name, *flags_of("bf16 zero2"), *far, model=far_dir / "model", unrepaired=repairs, moments=True)
    add("too_many_ranks", *tp2, model=three_headed_dir)
    launch(folder, specs)
    return {spec["name"]: finished(folder, spec) for spec in specs}


@pytest.fixture(scope="module")
def float32(parts, model_dir) -> reference.Trace:
    return reference.train(model_dir, parts, precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)


@pytest.fixture(scope="module")
def bfloat16(parts, model_dir) -> reference.Trace:
    return reference.train(model_dir, parts, precision="bf16", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)


@pytest.mark.parametrize("name", FLOAT32_RUNS)
def test_float32_equals_plain_torch(jobs, float32, name):
    job = jobs[name]
    assert job.error is None
    assert job.scalars("Loss") == pytest.approx(float32.losses, rel=1e-5)
    assert job.scalars("Gradient Norm") == pytest.approx(float32.grad_norms, rel=1e-5)
    assert distance(weights_of(job), float32.weights) < 1e-4


def test_batches_without_padding_equal_plain_torch(jobs, full_parts, model_dir):
    trace = reference.train(model_dir, full_parts, precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)
    for name in UNPADDED_RUNS:
        assert jobs[name].error is None
        assert jobs[name].scalars("Loss") == pytest.approx(trace.losses, rel=1e-5)
        assert jobs[name].scalars("Gradient Norm") == pytest.approx(trace.grad_norms, rel=1e-5)


@pytest.mark.parametrize("name", BFLOAT16_RUNS)
def test_bfloat16_equals_plain_torch(jobs, bfloat16, name):
    job = jobs[name]
    assert job.error is None
    assert job.scalars("Loss") == pytest.approx(bfloat16.losses, rel=1.5e-3)
    assert job.scalars("Gradient Norm") == pytest.approx(bfloat16.grad_norms, rel=0.03)
    assert distance(weights_of(job), bfloat16.weights) < 0.01


@pytest.mark.parametrize("name", [*FLOAT32_RUNS, *BFLOAT16_RUNS])
def test_clipping_reaches_adam(jobs, float32, name):
    assert float32.grad_norms[0] > CLIP
    assert jobs[name].first_moment_norm == pytest.approx(CLIP, rel=0.02)


@pytest.mark.parametrize("name", ["gemini_bf16", "gemini_bf16_accumulating", "gemini_auto_bf16"])
def test_gemini_shards_every_chunk(jobs, name):
    assert len(jobs[name].chunks) > 1 and not any(jobs[name].chunks)


def test_without_clipping_adam_gets_the_full_gradient(jobs, float32):
    assert jobs["unclipped"].first_moment_norm == pytest.approx(float32.grad_norms[0], rel=1e-3)


def test_checkpoint_layout(jobs):
    folder = jobs["gemini_bf16"].folder / "ckpt"
    names = sorted([*REPORTS, f"epoch-0_step-{STEPS}", f"epoch-0_step-{MIDDLE}", "latest", "modeling"])
    assert sorted(path.name for path in folder.iterdir()) == names
    checkpoint = folder / f"epoch-0_step-{MIDDLE}"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "lr_scheduler",
        "manifest.json",
        "master_weights",
        "modeling",
        "optimizer",
        "running_states.json",
    ]
    states = json.loads((checkpoint / "running_states.json").read_text())
    assert (states["epoch"], states["step"], states["sample_start_index"]) == (0, MIDDLE, MIDDLE * GLOBAL_BATCH)
    assert json.loads((checkpoint / "lr_scheduler").read_text())["total_steps"] == STEPS
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith((".bin", ".pt", ".tmp"))]
    for path in folder.rglob("*.safetensors"):
        # A pickle would start with a zip header or a protocol byte; safetensors start with the length of a JSON header.
        head = path.read_bytes()[:9]
        assert head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


SAVED = ["zero2", "gemini_bf16", "gemini_auto_bf16", "3d_tp2", "3d_pp2", "odd_vocabulary", "odd_vocabulary_pp2"]


@pytest.mark.parametrize("name", SAVED)
def test_saved_model_loads_in_transformers(jobs, parts, name):
    assert jobs[name].error is None
    folder = jobs[name].model
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # Each stage of a pipeline writes its own file.
    files = 2 if "pp2" in name else 1
    assert len(list(folder.glob(f"model-0000?-of-{files:05d}.safetensors"))) == files
    assert len(AutoTokenizer.from_pretrained(folder)) <= model.config.vocab_size == len(model.lm_head.weight)


def test_odd_vocabulary_is_saved_unpadded(jobs):
    assert AutoModelForCausalLM.from_pretrained(jobs["odd_vocabulary"].model).config.vocab_size == 601


@pytest.mark.parametrize("name", ["frozen", "frozen_gemini"])
def test_frozen_run_changes_only_embeddings(jobs, model_dir, name):
    assert jobs[name].error is None
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    for key, after in weights_of(jobs[name]).items():
        is_embedding = "embed_tokens" in key or "lm_head" in key
        start = before[key] if name == "frozen" else before[key].bfloat16().float()
        assert torch.equal(after, start) != is_embedding, key


def test_frozen_run_equals_plain_torch(jobs, parts, model_dir):
    trace = reference.train(
        model_dir, parts, precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP, freeze=True
    )
    for name in ("frozen", "frozen_pp2"):
        assert jobs[name].scalars("Loss") == pytest.approx(trace.losses, rel=1e-5)


@pytest.fixture(scope="module")
def new_rows(parts, grown_model_dir) -> reference.Trace:
    return reference.train(
        grown_model_dir,
        parts,
        precision="fp32",
        global_batch=GLOBAL_BATCH,
        lr=LR,
        clip=CLIP,
        decay=0.0,
        freeze=True,
        trained_rows=NEW_ROWS,
    )


@pytest.mark.parametrize("name", ROWS_RUNS)
def test_only_new_rows_are_trained(jobs, new_rows, grown_model_dir, name):
    assert jobs[name].error is None
    start = AutoModelForCausalLM.from_pretrained(grown_model_dir).state_dict()
    is_new = torch.zeros(601, dtype=torch.bool)
    for begin, end in NEW_ROWS:
        is_new[begin:end] = True
    for key, after in weights_of(jobs[name]).items():
        before = start[key].bfloat16().float() if name.endswith("bf16") else start[key]
        if "embed_tokens" in key or "lm_head" in key:
            same = (after.view(torch.int32) == before.view(torch.int32)).all(1)
            assert same[~is_new].all(), key
            assert not same[is_new].all() if "embed_tokens" in key else not same[is_new].any(), key
        else:
            assert torch.equal(after.view(torch.int32), before.view(torch.int32)), key
    tolerance = 1.5e-3 if name.endswith("bf16") else 1e-5
    assert jobs[name].scalars("Loss") == pytest.approx(new_rows.losses, rel=tolerance)
    assert jobs[name].scalars("Gradient Norm") == pytest.approx(new_rows.grad_norms, rel=20 * tolerance)


@pytest.mark.parametrize("name", TIED_ROWS_RUNS)
def test_new_rows_of_tied_embeddings(jobs, tied_model_dir, name):
    assert jobs[name].error is None
    dtype = torch.bfloat16 if name.endswith("gemini") else torch.float32
    before = AutoModelForCausalLM.from_pretrained(tied_model_dir).lm_head.weight.to(dtype).float()
    after = AutoModelForCausalLM.from_pretrained(jobs[name].model).lm_head.weight
    begin, end = NEW_ROWS[0]
    same = (after.view(torch.int32) == before.view(torch.int32)).all(1)
    assert same[:begin].all() and same[end:].all() and not same[begin:end].any()


@pytest.mark.parametrize("name", [*FLOAT32_RUNS, *BFLOAT16_RUNS])
def test_buffers_are_not_rounded(jobs, name):
    assert jobs[name].buffers_error == 0


def test_rounded_rotary_frequencies_lead_to_other_tokens(jobs, far_dir):
    """Guessing costs log 497 = 6.2; the token that attention finds is certain, except for the softmax's smoothing."""
    plain = reference.train(
        far_dir / "model", [str(far_dir / "part-00000")], precision="fp32", global_batch=2, lr=LR, clip=CLIP
    )
    assert jobs["far"].scalars("Loss") == pytest.approx(plain.losses, rel=5e-3)
    assert jobs["far_unrepaired"].scalars("Loss")[0] > 1.5 * plain.losses[0]
    assert jobs["far_unrepaired"].buffers_error > 1e-3 and jobs["far"].buffers_error == 0


def test_bugs_show_without_their_fixes(jobs, float32, bfloat16):
    assert jobs["ring_unrepaired"].scalars("Gradient Norm")[0] != pytest.approx(float32.grad_norms[0], rel=1e-2)
    # In bf16, losses between 4 and 8 are multiples of 1/32.
    assert jobs["loss_unrepaired"].scalars("Loss") != pytest.approx(bfloat16.losses, rel=5e-4)
    assert jobs["3d_pp2_zero1_bf16"].scalars("Loss") == pytest.approx(bfloat16.losses, rel=5e-4)


@pytest.mark.parametrize("name", FLOAT16_RUNS)
def test_fp16_makes_all_steps_however_high_its_first_loss_scale(jobs, float32, name):
    assert jobs[name].error is None
    assert jobs[name].scalars("Loss") == pytest.approx(float32.losses, rel=2e-3)
    # The gradient norm must be reported without the loss scale.
    assert jobs[name].scalars("Gradient Norm") == pytest.approx(float32.grad_norms, rel=0.03)
    scales = jobs[name].scalars("Loss Scale")
    assert len(scales) == STEPS and INITIAL_SCALE / 64 <= min(scales) <= scales[0] <= INITIAL_SCALE / 4
    states = json.loads((jobs[name].folder / "ckpt" / f"epoch-0_step-{STEPS}" / "running_states.json").read_text())
    assert 2 ** states["overflows"] == INITIAL_SCALE / scales[-1]
    assert {rank["loss_scale"]["scale"] for rank in states["ranks"]} == {scales[-1]}


def test_gemini_that_accumulates_continues_after_an_overflow(jobs):
    # Without the fix, it overflows at every loss scale.
    assert "gradient norm is NaN/Inf, even at a loss scale of 1, at step 1" in jobs["overflow_unrepaired"].error


@pytest.fixture(scope="module")
def tied(parts, tied_model_dir) -> reference.Trace:
    return reference.train(tied_model_dir, parts, precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("tied", 1e-5), ("tied_tp2", 1e-5), ("tied_pp2", 1e-5), ("tied_gemini", 2e-3)]
)
def test_tied_embeddings_train_and_save(jobs, tied, name, tolerance):
    assert jobs[name].error is None
    assert jobs[name].scalars("Loss") == pytest.approx(tied.losses, rel=tolerance)
    model = AutoModelForCausalLM.from_pretrained(jobs[name].model)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", OLD_MIRROR_RUNS)
def test_an_old_mirror_is_saved_in_the_form_of_today(jobs, name):
    assert jobs[name].error is None
    stored = {key for path in jobs[name].model.glob("*.safetensors") for key in load_file(path)}
    index = json.loads((jobs[name].model / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in stored and set(index["weight_map"]) == stored
    model, report = AutoModelForCausalLM.from_pretrained(jobs[name].model, output_loading_info=True)
    assert not any(report.values()) and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.pad_token_id is None and model.config.max_length == 20
    generation = json.loads((jobs[name].model / "generation_config.json").read_text())
    assert generation["do_sample"] and (generation["temperature"], generation["max_length"]) == (0.9, 99)


def test_biases_under_sequence_parallelism(jobs, parts, biased_model_dir):
    trace = reference.train(biased_model_dir, parts, precision="fp32", global_batch=GLOBAL_BATCH, lr=LR, clip=CLIP)
    *ours, unrepaired = (jobs[name] for name in BIASED_RUNS)
    for job in ours:
        assert job.error is None and job.scalars("Gradient Norm") == pytest.approx(trace.grad_norms, rel=1e-5)
        assert distance(weights_of(job), trace.weights) < 1e-4
    assert unrepaired.scalars("Gradient Norm") != pytest.approx(trace.grad_norms, rel=1e-4)


def test_only_weights_start_a_new_run(jobs):
    losses = jobs["weights_only"].scalars("Loss")
    assert len(losses) == STEPS
    assert losses[0] < jobs["zero2"].scalars("Loss")[0] - 0.35


def test_exported_model_has_the_trainer_s_loss(jobs, parts):
    """The first loss of a run that starts from exported weights, against plain transformers on the same samples."""
    model = AutoModelForCausalLM.from_pretrained(jobs["zero2"].model)
    rows = load_tokenized_dataset(parts)
    order = SampleOrder(
        num_samples=len(rows), micro_batch_size=GLOBAL_BATCH, data_size=1, accumulation_steps=1, seed=1024
    )
    batch = rows[next(order.steps(0, 0, 0))[0][0]]
    samples = list(zip(batch["input_ids"].to_pylist(), batch["labels"].to_pylist(), strict=True))
    predicted = sum(label != -100 for _, labels in samples for label in labels[1:])
    with torch.no_grad():
        loss = reference.cross_entropy_sum(model, [(np.array(ids), np.array(labels)) for ids, labels in samples])
    assert jobs["weights_only"].scalars("Loss")[0] == pytest.approx(float(loss) / predicted, rel=1e-6)


def test_epochs_end_with_a_step_of_what_is_left(jobs):
    # 4 micro batches of all ranks an epoch, 3 accumulated: steps of 3 and 1.
    assert len(jobs["two_epochs"].scalars("Loss")) == 4
    names = sorted(path.name for path in (jobs["two_epochs"].folder / "ckpt").iterdir())
    assert names == sorted([*REPORTS, "epoch-0_step-2", "epoch-1_step-4", "latest", "modeling"])


def test_neftune_is_reproducible(jobs, float32):
    losses = jobs["noise"].scalars("Loss")
    assert losses == jobs["noise_again"].scalars("Loss")
    assert len(losses) == 2 and losses[0] != pytest.approx(float32.losses[0], rel=1e-5)
    assert jobs["noise_gemini"].error is None
    assert jobs["noise_gemini"].scalars("Loss")[0] != pytest.approx(float32.losses[0], rel=1e-5)


def test_another_plugin_and_layout_resumes_too(jobs):
    job = jobs["on_tp2"]
    assert job.error is None
    assert job.scalars("Loss", run="tb_tp2") == pytest.approx(job.scalars("Loss")[MIDDLE:], rel=1e-5)


def test_a_finished_run_continues_with_more_epochs(jobs):
    job = jobs["second_epoch"]
    assert job.error is None
    assert len(job.scalars("Loss", run="tb_second")) == STEPS
    states = json.loads((job.folder / "ckpt" / f"epoch-1_step-{2 * STEPS}" / "running_states.json").read_text())
    assert (states["epoch"], states["step"], states["sample_start_index"]) == (1, 2 * STEPS, STEPS * GLOBAL_BATCH)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing_left", ["its training is complete", "--num_epochs"]),
        ("other_seed", ["seed was 1024, this run has 1", "--seed", "load only its weights"]),
        ("other_data", ["dataset_fingerprints", "--dataset"]),
        ("now_frozen", ["--freeze_non_embeds_params", "load only its weights"]),
        ("foreign_ids", ["has 600 tokens", "vocabulary 300"]),
        ("too_many_ranks", ["--tp 2", "3 attention heads"]),
        ("nan_zero2", [NAN_WEIGHT, "1 NaN of its 8,192 numbers"]),
        ("nan_gemini", [NAN_WEIGHT, "1 NaN of its 8,192 numbers"]),
        ("nan_tp2", [NAN_WEIGHT, "1 NaN of its 8,192 numbers"]),
    ],
)
def test_what_does_not_fit_together_is_refused(jobs, name, words):
    assert all(word in jobs[name].error for word in words), jobs[name].error


@pytest.mark.parametrize("name", ["zero2", "gemini_bf16", "3d_tp2"])
def test_exported_config_is_the_model_s_own(jobs, model_dir, name):
    before, after = (json.loads((path / "config.json").read_text()) for path in (model_dir, jobs[name].model))
    assert after["torch_dtype"] == ("bfloat16" if "bf16" in name else "float32")
    assert after.pop("trained_for") == {"stage": "pretrain"}
    assert {**after, "torch_dtype": None} == {**before, "torch_dtype": None}
    assert AutoModelForCausalLM.from_pretrained(jobs[name].model).config._attn_implementation == "sdpa"


def test_checkpoints_are_readable_by_others(jobs):
    umask = os.umask(0)
    os.umask(umask)
    for path in (jobs["zero2"].folder / "ckpt").rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_config_file_holds_resolved_flags(jobs):
    config = json.loads((jobs["3d_tp2"].folder / "config.json").read_text())
    assert (config["tp"], config["plugin"], config["world_size"]) == (2, "3d", 2)
    assert config["versions"]["colossalai"] == "0.5.0"
