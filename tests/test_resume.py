"""Resuming on two ranks: bit for bit with every plugin, in another layout, and past damaged files."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import resolve_data
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.train import verify
from colossal_llama2.train.forecast.data_plan import plan_lines
from colossal_llama2.train.run_folder import checkpoint_files, file_names
from colossal_llama2.train.stepping.schedule import CosineSchedule
from tests import launching, layouts, tiny
from tests.faults import damage
from tests.preparing import plan_settings

SAMPLES = 46
# What a --save_dir holds besides checkpoints.
TOP_FILES = {"latest", "modeling", "plan.json"}
# In a checkpoint, besides weights and moments.
# The history counts steps without an update too.
UNCHANGED = ("optimizer/pytorch_optim_group", "modeling/training_history.json")
# 11 micro batches of 4 samples an epoch, 2 accumulated: 6 steps, the last of one micro batch; 2 samples are left over.
STEPS_AN_EPOCH = 6


def flags_of(layout: str, *more: str) -> list[str]:
    """A layout's flags, for steps of 8 samples in two micro batches."""
    return layouts.flags(layout, *more, batch=8, accumulation_steps=2)


LAYOUTS = {
    "ddp_fp32": flags_of("fp32 ddp"),
    "ddp_bf16": flags_of("bf16 ddp"),
    "zero2_fp32": flags_of("fp32 zero2"),
    # The first of two buckets has 23 samples, step 4 is the 32nd.
    "zero2_fp32_bucketed": flags_of("fp32 zero2", "--bucketed"),
    "zero2_bf16": flags_of("bf16 zero2"),
    "zero2_fp16": flags_of("fp16 zero2"),
    "zero2_cpu_bf16": flags_of("bf16 zero2_cpu"),
    "gemini_bf16": flags_of("bf16 gemini"),
    "gemini_auto_bf16": flags_of("bf16 gemini_auto"),
    "3d_fp32": flags_of("fp32 3d"),
    "3d_zero0_bf16": flags_of("bf16 3d zero0"),
    "3d_zero1_bf16": flags_of("bf16 3d zero1"),
    "3d_pp2_bf16": flags_of("bf16 3d pp2 zero1"),
    "3d_sp2_bf16": flags_of("bf16 3d sp2 all_to_all zero1"),
    "3d_tp2_bf16": flags_of("bf16 3d tp2 zero1"),
}
# These continue in a second epoch, which depends on the data and not on the layout.
TWO_EPOCHS = ("zero2_fp32", "zero2_fp32_bucketed", "zero2_bf16")


def last_of(name: str) -> str:
    """The last checkpoint of a layout's run."""
    epochs = 2 if name in TWO_EPOCHS else 1
    return f"ckpt/epoch-{epochs - 1}_step-{epochs * STEPS_AN_EPOCH}"


# 360 samples; step 13 is in the middle of the second bucket, where "old" is read a second time.
MIXTURE = ["new=0.7", "old=0.3"]
MIXED_STEP = 13
MIXED = [
    "--bucketed",
    "--mixture",
    *MIXTURE,
    "--max_length",
    "128",
    "--micro_batch_size",
    "8",
    "--accumulation_steps",
    "1",
    "--num_epochs",
    "1",
    "--save_interval",
    str(MIXED_STEP),
]

# Which rank's numbers are corrupted, at which of POISONED_STEPS steps, how (see tests/faults/poison.py).
POISONED = {
    "ddp_bf16": (1, 3, "gradient"),
    "zero2_fp32": (0, 3, "loss"),
    "zero2_bf16": (1, 1, "gradient"),
    "zero2_fp16": (1, 3, "loss"),
    "zero2_fp16_overflowing": (1, 1, "gradient"),
    "zero2_cpu_bf16": (0, 3, "report"),
    "gemini_bf16": (1, 1, "loss"),
    "gemini_auto_bf16": (0, 3, "gradient"),
    "3d_fp32": (1, 3, "gradient"),
    "3d_zero0_bf16": (0, 3, "loss"),
    "3d_tp2_bf16": (1, 3, "report"),
}
POISONED_STEPS = 4
# Of 24 samples those of the first of three steps have no trained token, and those of one more pass of all ranks.
UNTRAINED = ("zero2_fp16", "gemini_bf16", "gemini_auto_bf16", "3d_pp2_bf16")


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tokenizer_dir):
    encoder = load_encoder(tokenizer_dir)
    stream = [token for ids in encoder.encode(tiny.english_documents()[:200]) for token in [1, *ids, 2]]
    folder = tmp_path_factory.mktemp("prepared")
    for part in range(2):
        rows = [stream[start : start + 16 + start % 9] for start in range(part * 2000, part * 2000 + SAMPLES // 2)]
        datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder / f"part-{part}")
    return [str(folder / f"part-{part}") for part in range(2)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, parts, model_dir, tokenizer_dir, two_sources):
    """Run every command of this file on two ranks: name -> (its folder, error, log)."""
    folder = tmp_path_factory.mktemp("jobs")
    specs = []

    def add(name, *flags, home=None, damages=(), save_dir=None, poison=None, fault=None):
        here = folder / (home or name)
        common = ["--pretrained", model_dir, "--dataset", *parts, "--max_length", 64, "--lr", "2e-3", "--use_neft"]
        common += ["--save_dir", save_dir or here / "ckpt", "--tensorboard_dir", folder / name / "tb"]
        common += ["--config_file", folder / name / "config.json"]
        common += ["--num_epochs", 2, "--save_interval", 4]
        words = [str(word) for word in [*common, *flags]]
        faults = {"damage": list(damages), "poison": poison, "fault": fault}
        specs.append({"name": name, "script": "train_sft.py", "flags": words, **faults})

    for name, flags in LAYOUTS.items():
        flags = [*flags, "--num_epochs", 2 if name in TWO_EPOCHS else 1]
        add(name, *flags)
        add(f"{name}_again", *flags, "--load_checkpoint", folder / name / "ckpt" / "epoch-0_step-4")
    tokenizer = tiny.make_tokenizer(folder / "other_tokenizer", vocab_size=550)
    tiny.make_model(folder / "other_tokenizer_model", tokenizer)
    mixed = [*LAYOUTS["zero2_fp32"], "--dataset", *sources_in(two_sources), *MIXED]
    add("mixed", *mixed)
    add("mixed_again", *mixed, "--load_checkpoint", folder / "mixed" / "ckpt" / f"epoch-0_step-{MIXED_STEP}")
    add_others(add, folder, tokenizer_dir)
    launching.launch(folder, specs, worker="resume_worker.py")
    results = {spec["name"]: json.loads((folder / f"{spec['name']}.json").read_text()) for spec in specs}
    return {name: (folder / name, result["error"], result["log"]) for name, result in results.items()}


def sources_in(two_sources):
    """The --dataset of both."""
    return [f"{name}={two_sources / name / 'arrow'}" for name in ("old", "new")]


def write_untrained(folder: Path, tokenizer_dir) -> Path:
    """24 samples, see UNTRAINED; the masked pass is samples 16 to 19 of the run."""
    (stream,) = load_encoder(tokenizer_dir).encode([" ".join(tiny.english_documents()[200:240])])
    order = SampleOrder(num_samples=24, micro_batch_size=4, data_size=1, accumulation_steps=2, seed=1024)
    masked = {*order.rows(0, 0, 8), *order.rows(0, 16, 20)}
    rows = [[1, *stream[20 * row :][: 10 + row % 9]] for row in range(24)]
    labels = [[-100] * len(ids) if row in masked else ids for row, ids in enumerate(rows)]
    datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}).save_to_disk(folder)
    return folder


def add_others(add, folder: Path, tokenizer: Path) -> None:
    """Commands on the checkpoints of zero2_fp32 and zero2_bf16; damage is done only to copies."""
    fp32, bf16 = LAYOUTS["zero2_fp32"], LAYOUTS["zero2_bf16"]
    middle = ("--load_checkpoint", folder / "zero2_bf16" / "ckpt" / "epoch-0_step-4")
    add("other_micro_batch", *bf16, "--micro_batch_size", 1, "--accumulation_steps", 4, *middle)
    add("other_layout", *LAYOUTS["3d_tp2_bf16"], *middle)
    add("other_order", *bf16, "--bucketed", *middle)
    add("other_tokenizer", *bf16, "--pretrained", folder / "other_tokenizer_model", *middle)
    add("stage_one", *fp32, "--max_steps", 3)
    second = ("--continue_data", "--load_checkpoint", folder / "stage_one" / "ckpt" / "epoch-0_step-3" / "modeling")
    add("stage_two", *fp32, *second)
    add("stage_two_of_other_data", *fp32, *second, "--seed", 5)
    add("keeping", *fp32, "--save_interval", 1, "--keep_last", 2, "--keep_every", 5)
    for name, poison in POISONED.items():
        allowed = int(name != "zero2_fp32")
        flags = LAYOUTS[name.removesuffix("_overflowing")]
        add(
            f"poisoned_{name}",
            *flags,
            "--max_steps",
            POISONED_STEPS,
            "--save_interval",
            1,
            "--max_bad_steps",
            allowed,
            poison=poison,
        )
    untrained = write_untrained(folder / "untrained_data", tokenizer)
    for name in UNTRAINED:
        flags = [*LAYOUTS[name], "--dataset", untrained, "--num_epochs", 1, "--save_interval", 1, "--warmup_steps", 2]
        add(f"untrained_{name}", *flags)
        add(
            f"untrained_{name}_again",
            *flags,
            "--load_checkpoint",
            folder / f"untrained_{name}" / "ckpt" / "epoch-0_step-1",
        )
    add("unsavable", *fp32, fault="rename")
    earlier = folder / "zero2_fp32" / "ckpt" / "epoch-0_step-4"
    add("of_an_earlier_version", *fp32, "--load_checkpoint", earlier, damages=[["age", str(earlier)]])
    add("auto_on_nothing", *fp32, "--resume", "auto")
    ckpt = folder / "auto_on_nothing" / "ckpt"
    optimizer = ckpt / "epoch-1_step-12" / "optimizer" / "pytorch_optim-00001.safetensors"
    add("auto_done", *fp32, "--resume", "auto", home="auto_on_nothing")
    damages = [["flip", str(optimizer)], ["delete", str(ckpt / "epoch-1_step-8" / "lr_scheduler")]]
    add("auto_past_damage", *fp32, "--resume", "auto", home="auto_on_nothing", damages=damages)
    damaged = ckpt / "epoch-0_step-6"
    add(
        "named_and_damaged",
        *fp32,
        "--load_checkpoint",
        damaged,
        home="elsewhere",
        damages=[["flip", str(damaged / "modeling" / "tokenizer.model")]],
    )
    names = ("epoch-0_step-4", "epoch-0_step-6", "epoch-1_step-12")
    everything = [["add", str(ckpt / name / "stray.json")] for name in names]
    everything += [["cut", str(ckpt / "epoch-1_step-8" / "manifest.json")]]
    add("auto_on_ruins", *fp32, "--resume", "auto", home="auto_on_nothing", damages=everything)


def losses(job):
    """TensorBoard's losses by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(job[0] / "tb"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("Loss")}


def contents(checkpoint: Path):
    """Hashes of weights, optimizer states and master weights, and the states of every rank."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    states = json.loads((checkpoint / "running_states.json").read_text())
    kept = {entry["path"]: entry["sha256"] for entry in files if "/" in entry["path"]}
    return kept, states["ranks"], states["tokens_seen"], states["samples_seen"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(jobs, name):
    straight, again = jobs[name], jobs[f"{name}_again"]
    assert straight[1] is None and again[1] is None
    assert "bit for bit" in " ".join(again[2]) and "not bit" not in " ".join(again[2])
    whole = losses(straight)
    last = last_of(name)
    assert len(whole) == int(last.rpartition("-")[2])
    assert losses(again) == {step: loss for step, loss in whole.items() if step > 4}
    assert contents(straight[0] / last) == contents(again[0] / last)
    assert any("optimizer" in path for path in contents(again[0] / last)[0])


def test_a_run_with_buckets_and_a_mixture_follows_its_plan(jobs, two_sources):
    data = resolve_data(sources_in(two_sources), bucketed=True, mixture=MIXTURE)
    plan = plan_settings(
        data,
        micro_batch_size=8,
        data_size=2,
        accumulation_steps=1,
        seed=1024,
        num_epochs=1,
        learning_rate=2e-3,
        warmup=None,
    )
    second = plan["buckets"][1]
    assert second["first_step"] < MIXED_STEP < second["last_step"] and second["sources"]["old"]["again"]
    home, error, log = jobs["mixed"]
    assert error is None and json.loads((home / "ckpt" / "plan.json").read_text()) == json.loads(json.dumps(plan))
    assert [line for line in log if line in set(plan_lines(plan))] == list(plan_lines(plan))
    epoch, last = plan["epoch"], f"ckpt/epoch-0_step-{plan['steps']}"
    states = json.loads((home / last / "running_states.json").read_text())
    assert states["tokens_seen"] == epoch["tokens"] - epoch["left_over_tokens"]
    assert states["samples_seen"] == epoch["samples"] - epoch["left_over_samples"]
    assert f"unread samples: {epoch['left_over_samples']}." in log[-1]
    again = jobs["mixed_again"]
    card, card_again = ((job[0] / "ckpt" / "modeling" / "README.md").read_text() for job in (jobs["mixed"], again))
    assert f"| {states['samples_seen']} |  | {states['tokens_seen']:,} | 100.0% |" in card
    assert _read_part(card) == _read_part(card_again) and "| old |" in _read_part(card)
    assert "bit for bit" in " ".join(again[2]) and contents(home / last) == contents(again[0] / last)


def _read_part(card: str) -> str:
    return card.split("What training has read.")[1].split("The available data")[0]


def test_another_micro_batch_or_layout_reads_the_same_samples(jobs):
    straight = losses(jobs["zero2_bf16"])
    for name, words in {
        "other_micro_batch": ["micro_batch_size 2 -> 1", "accumulation_steps 2 -> 4"],
        "other_layout": ["plugin zero2 -> 3d", "tp 1 -> 2", "master weights are replaced"],
    }.items():
        _, error, log = jobs[name]
        assert error is None
        assert "not bit for bit" in " ".join(log) and all(word in " ".join(log) for word in words)
    # With other samples the noise and the losses would differ from the first digits on.
    assert losses(jobs["other_layout"]) == pytest.approx(
        {step: loss for step, loss in straight.items() if step > 4}, rel=2e-2
    )


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_another_number_of_ranks_reads_the_same_order(ranks_before, ranks_after):
    def taken(ranks, consumed, steps):
        order = SampleOrder(num_samples=64, micro_batch_size=2, data_size=ranks, accumulation_steps=8 // ranks, seed=7)
        ranked = [list(order.steps(0, consumed, rank)) for rank in range(ranks)]
        step_ids = []
        for step in range(steps):
            micro = range(len(ranked[0][step][0]))
            step_ids.append([int(i) for m in micro for rank in range(ranks) for i in ranked[rank][step][0][m]])
        return step_ids

    assert taken(ranks_before, 0, 4) == taken(ranks_before, 0, 2) + taken(ranks_after, 32, 2)


def test_another_tokenizer_or_order_is_refused(jobs):
    error = jobs["other_tokenizer"][1]
    assert "pretrained_tokenizer was" in error and "--pretrained" in error
    error = jobs["other_order"][1]
    assert "bucketed was None, this run has True; resume with the same --bucketed" in error


def test_a_stage_continues_in_the_data_of_another(jobs):
    home, error, log = jobs["stage_one"]
    assert error is None and (home / "ckpt" / "epoch-0_step-3" / "modeling").is_dir()
    assert any(line.startswith("Done: 3 steps") for line in log)
    home, error, log = jobs["stage_two"]
    assert error is None
    # 8 samples a step, 46 an epoch; the last 2 are too few for a micro batch: 20 and 44 are left.
    assert any(line.startswith("Data: continuing after") and line.endswith("epoch 0, sample 24") for line in log)
    assert any(line.startswith("Done: 9 steps") and "unread samples: 4." in line for line in log)
    assert "--continue_data: seed was 1024, this run has 5" in jobs["stage_two_of_other_data"][1]


def test_a_folder_without_write_permission_is_refused_before_step_1(jobs):
    home, error, log = jobs["unsavable"]
    assert "no checkpoint can be written there" in error and "Operation not permitted" in error
    assert not any(line.startswith("Saved") for line in log)
    assert not (home / "tb").exists() and not (home / "config.json").exists()
    assert not list((home / "ckpt").iterdir())


def test_a_checkpoint_of_an_earlier_version_is_resumed(jobs):
    """It has neither the later counters nor training_history.json, and its numbers were computed differently."""
    home, error, log = jobs["of_an_earlier_version"]
    assert error is None
    assert "not bit for bit, since this changed: version of the numerics 1 -> 2" in " ".join(log)
    # Here nothing else has changed, and the complete state of the run is used.
    last = "ckpt/epoch-1_step-12"
    kept, expected = (contents(folder / last) for folder in (home, jobs["zero2_fp32"][0]))
    assert [name for name in kept[0] if kept[0][name] != expected[0].get(name)] == ["modeling/training_history.json"]
    assert kept[1:] == expected[1:]
    (stage,) = json.loads((home / last / "modeling" / "training_history.json").read_text())["stages"]
    assert stage["steps"] == stage["updates"] == 2 * STEPS_AN_EPOCH
    assert stage["resumed"] == [{"step": 4, "changed": ["version of the numerics 1 -> 2"]}]


def test_old_checkpoints_are_removed_but_never_the_newest(jobs):
    home, error, log = jobs["keeping"]
    names = {path.name for path in (home / "ckpt").iterdir()}
    names -= {file_names.LOG_NAME, *file_names.REPORT_NAMES}
    assert error is None
    assert names == {"epoch-0_step-5", "epoch-1_step-10", "epoch-1_step-11", "epoch-1_step-12"} | TOP_FILES
    assert (home / "ckpt" / "latest").read_text() == "epoch-1_step-12\n"
    removed = [line for line in log if line.startswith("Removed")]
    assert len(removed) == 8
    for line in removed:
        # When one is removed, the two after it exist.
        step = int(line.split("step-")[1].split(" ")[0])
        earlier = log[: log.index(line)]
        assert all(any(f"step-{later}:" in text for text in earlier) for later in (step + 1, step + 2))


def test_resume_auto(jobs):
    assert jobs["auto_on_nothing"][1] is None
    assert "Already done" in jobs["auto_done"][2][-1]
    _, error, log = jobs["auto_past_damage"]
    assert error is None
    found = [line for line in log if line.startswith(("--resume auto", "Resuming"))]
    assert "pytorch_optim-00001.safetensors: its content has changed (sha256 differs)" in found[0]
    assert "epoch-1_step-8: has no lr_scheduler" in found[1] and "epoch-0_step-6: epoch 0, step 6" in found[2]
    assert losses(jobs["auto_past_damage"])[12] == losses(jobs["zero2_fp32"])[12]


def test_a_damaged_checkpoint_that_is_named_is_refused(jobs):
    error = jobs["named_and_damaged"][1]
    assert "epoch-0_step-6/modeling/tokenizer.model" in error and "sha256" in error
    assert "no checkpoint" in jobs["auto_on_ruins"][1] and "is complete and intact" in jobs["auto_on_ruins"][1]


def weights_and_moments(checkpoint: Path):
    """Hashes of what an update changes."""
    return {name: digest for name, digest in contents(checkpoint)[0].items() if not name.startswith(UNCHANGED)}


@pytest.mark.parametrize("name", POISONED)
def test_a_bad_step_updates_nothing(jobs, name):
    home, error, log = jobs[f"poisoned_{name}"]
    _, step, kind = POISONED[name]
    first = (step - 1) * 8
    words = f"the {'gradient norm' if kind == 'gradient' else 'loss'} is "
    found = next(line for line in (log if error is None else [error]) if line.startswith(words))
    assert f"step {step}, samples {first} to {first + 7} of epoch 0 (rows " in found
    order = SampleOrder(num_samples=SAMPLES, micro_batch_size=2, data_size=2, accumulation_steps=2, seed=1024)
    assert f"(rows {', '.join(map(str, order.rows(0, first, first + 8)))} of the data)" in found
    saved = {checkpoint_files.step_of(path): path for path in checkpoint_files.complete_checkpoints(home / "ckpt")}
    if name == "zero2_fp32":
        assert "--max_bad_steps 0 allowed" in error and sorted(saved) == [1, 2]
        return
    assert error is None and sorted(saved) == list(range(1, POISONED_STEPS + 1))
    if step > 1:
        assert weights_and_moments(saved[step]) == weights_and_moments(saved[step - 1])
    assert weights_and_moments(saved[step + 1]) != weights_and_moments(saved[step])
    list(verify.verify(str(saved[POISONED_STEPS])))
    # The schedule is one of four updates, of which one was not made.
    rates = [CosineSchedule(2e-3, POISONED_STEPS, 0).learning_rate(update) for update in range(POISONED_STEPS - 1)]
    assert [record["lr"] for record in steps_of(home)] == pytest.approx([*rates[:step], *rates[step - 1 :]])
    assert ", 1 of them without an update (1 had a NaN/Inf loss or gradient norm), " in log[-1]


def steps_of(home: Path):
    """The lines of train_log.jsonl that are about a step."""
    lines = (home / "ckpt" / file_names.LOG_NAME).read_text().splitlines()
    return [record for record in map(json.loads, lines) if "lr" in record]


def weights_in(folder: Path):
    """A model's tensors, by name."""
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def states_of(home: Path, step: int) -> dict:
    return json.loads((home / "ckpt" / f"epoch-0_step-{step}" / "running_states.json").read_text())


def test_a_gradient_that_overflows_at_every_loss_scale_is_a_bad_step(jobs):
    home, error, log = jobs["poisoned_zero2_fp16_overflowing"]
    tries = [line for line in log if line.startswith("step 1: gradients overflowed fp16")]
    assert error is None and len(tries) == 21
    assert tries[0].endswith("at a loss scale of 2,097,152; the step is repeated at 1,048,576")
    assert tries[-1].endswith("at a loss scale of 2; the step is repeated at 1")
    words = "the gradient norm is NaN/Inf, even at a loss scale of 1, at step 1, samples 0 to 7 of epoch 0 "
    assert any(line.startswith(words) for line in log)
    # The scale was not the cause, and is unchanged.
    first, second = states_of(home, 1), states_of(home, 2)
    assert first["ranks"][0]["loss_scale"]["scale"] == 2**21 > second["ranks"][0]["loss_scale"]["scale"] > 2**12
    assert (first["bad_steps"], first["overflows"]) == (1, 21) and second["overflows"] > 21


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_step_without_a_trained_token_updates_nothing_and_is_logged(jobs, model_dir, name):
    home, error, log = jobs[f"untrained_{name}"]
    assert error is None
    assert any(line.startswith("--dataset: no trained token in 12 of 24 samples, all their labels are") for line in log)
    assert any(line.startswith("no trained token at step 1, samples 0 to 7 of epoch 0 (rows ") for line in log)
    assert "Done: 3 steps, 1 of them without an update (1 had no trained token), " in log[-1]
    first, *others = steps_of(home)
    assert first["loss"] is None and first["grad_norm"] is None and all(record["loss"] > 1 for record in others)
    assert sorted(losses((home,))) == [2, 3]
    # Warm-up advances only with updates, two steps of it.
    assert [record["lr"] for record in (first, *others)] == pytest.approx([1e-3, 1e-3, 2e-3])
    masked = 1 if "pp2" in name else 2
    assert [r.get("untrained_micro_batches", 0) for r in (first, *others)] == [2 * masked, 0, masked]
    given, kept = weights_in(model_dir), weights_in(home / "ckpt" / "epoch-0_step-1" / "modeling")
    assert len(given) == len(kept) and all(torch.equal(kept[n], value.to(kept[n].dtype)) for n, value in given.items())
    assert states_of(home, 3)["untrained_steps"] == 1
    assert "| of them without an update | 1 |" in (home / "ckpt" / "modeling" / "README.md").read_text()
    again = jobs[f"untrained_{name}_again"][0] / "ckpt" / "epoch-0_step-3"
    assert contents(again) == contents(home / "ckpt" / "epoch-0_step-3")
    assert states_of(again.parent.parent, 3)["overflows"] == states_of(home, 3)["overflows"]


def test_verify_accepts_intact_checkpoints(jobs):
    for name in LAYOUTS:
        report = list(verify.verify(str(jobs[name][0] / last_of(name))))
        assert [line.split()[0] for line in report] == ["checkpoint", "files", "place", *verify.CHECKS]
    assert "epoch-1_step-12" in next(verify.verify(str(jobs["keeping"][0] / "ckpt")))


WEIGHTS = "modeling/model-00001-of-00001.safetensors"
MOMENTS = "optimizer/pytorch_optim-00001.safetensors"
# (file, the damage, whether it was done before the manifest was written, the message)
BROKEN = [
    (WEIGHTS, damage.flip, False, "sha256"),
    (MOMENTS, damage.swap, False, "sha256"),
    ("master_weights/rank-00001.safetensors", damage.delete, False, "is missing"),
    ("master_weights/rank-00001.safetensors", damage.delete, True, "the run had 2 ranks"),
    ("master_weights/rank-00001.safetensors", damage.cut, True, "cannot be read"),
    (WEIGHTS, lambda path: rewrite(path, lambda name, t: t * float("nan")), True, "NaN"),
    (MOMENTS, lambda path: rewrite(path, lambda name, t: t / 0), True, "NaN or infinite"),
    (WEIGHTS, lambda path: rewrite(path, lambda name, t: t[:-1].clone()), True, "of shape"),
    (MOMENTS, lambda path: rewrite(path, lambda name, t: t[:-1].clone()), True, "has shape (599, 64)"),
    ("optimizer/pytorch_optim.bin.index.json", damage.cut, True, "is not JSON"),
    ("running_states.json", lambda path: path.write_text("{}"), True, "not the running states"),
    ("modeling/tokenizer.model", damage.flip, True, "differs from the tokenizer of the run"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_verify_names_what_is_wrong(jobs, tmp_path, capsys, case):
    file, break_it, is_listed, words = BROKEN[case]
    copy = shutil.copytree(jobs["zero2_bf16"][0] / "ckpt" / "epoch-1_step-12", tmp_path / "epoch-1_step-12")
    break_it(copy / file)
    if is_listed:
        sizes = checkpoint_files.list_files(copy)
        checkpoint_files.write_manifest(copy, checkpoint_files.file_entries(copy, sizes), saved_at=1.0)
    with pytest.raises(SystemExit) as end:
        verify.main([str(copy)])
    text = capsys.readouterr().err
    assert end.value.code == 2 and len(text.splitlines()) == 1
    # A wrong shape is reported for the model, not for the file.
    assert words in text and (file in text or "modeling: has" in text)


def test_verify_compares_transformers_with_sentencepiece(jobs, tmp_path):
    copy = shutil.copytree(jobs["zero2_bf16"][0] / "ckpt" / "epoch-1_step-12", tmp_path / "epoch-1_step-12")
    fast = json.loads((copy / "modeling" / "tokenizer.json").read_text())
    fast["model"]["merges"] = fast["model"]["merges"][:50]
    (copy / "modeling" / "tokenizer.json").write_text(json.dumps(fast))
    sizes = checkpoint_files.list_files(copy)
    checkpoint_files.write_manifest(copy, checkpoint_files.file_entries(copy, sizes), saved_at=1.0)
    with pytest.raises(UserError, match="fast tokenizer gives"):
        list(verify.verify(str(copy)))


def rewrite(path, change):
    """Change every tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, metadata=metadata)
