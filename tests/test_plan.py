"""The plan against the prepared data and against what a real run then reads."""

import json
import os
from collections import Counter

import numpy as np
import pytest

from colossal_llama2.dataset.measuring import measure_parts
from colossal_llama2.dataset.prepare import prepare_pretrain
from colossal_llama2.dataset.sources import resolve_data
from colossal_llama2.errors import UserError
from colossal_llama2.train.plan import buckets_of, build_plan, make_order, plan_lines, plan_settings
from colossal_llama2.train.schedule import CosineSchedule
from tests import tiny
from tests.preparing import read_jsonl, settings, write_lines

MIXTURE = ["new=0.7", "old=0.3"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tokenizer_dir):
    """Real text as two sources: "new" of three parts and two categories, "old" of two parts."""
    folder = tmp_path_factory.mktemp("prepared")
    documents = tiny.english_documents()
    rows = {
        "new": [{"target": text, "category": f"kind {number % 2}"} for number, text in enumerate(documents[:420])],
        "old": [{"target": text, "category": "docs"} for text in documents[420:500]],
    }
    for bins, (name, lines) in zip((3, 2), rows.items(), strict=True):
        write_lines(folder / "in" / name / "rows.jsonl", lines)
        prepare_pretrain(
            **settings([folder / "in" / name], tokenizer_dir, folder / name, max_length=128, bins=bins,
                       eval_fraction=0.05)
        )  # fmt: skip
    return folder


def data_of(prepared, **flags):
    return resolve_data([f"{name}={prepared / name / 'arrow'}" for name in ("new", "old")], **flags)


def plan_of(data, **changes):
    numbers = {
        "micro_batch_size": 2, "data_size": 2, "accumulation_steps": 1, "seed": 1, "num_epochs": 2,
        "learning_rate": 3e-4, "warmup": None,
    }  # fmt: skip
    return plan_settings(data, **{**numbers, **changes})


def test_without_buckets_everything_is_read_once(prepared):
    plan = plan_of(data_of(prepared))
    (bucket,) = plan["buckets"]
    tokens: Counter = Counter()
    for name in ("new", "old"):
        samples = read_jsonl(prepared / name / "jsonl")
        (held_out,) = [path for path in (prepared / name / "jsonl").glob("eval*")]
        samples = samples[: len(samples) - 0]
        samples = [s for path in sorted((prepared / name / "jsonl").glob("part-*")) for s in lines_of(path)]
        source = bucket["sources"][name]
        assert (source["samples"], source["left_out"], source["again"]) == (len(samples), 0, 0)
        assert source["tokens"] == sum(len(sample["input_ids"]) for sample in samples)
        for sample in samples:
            for category, length in zip(sample["document_categories"], sample["sequence_lengths"], strict=True):
                tokens[category] += length
    assert {name: entry["tokens"] for name, entry in plan["categories"].items()} == tokens
    assert set(tokens) == {"kind 0", "kind 1", "docs"} and held_out.is_file()
    assert plan["steps"] == 2 * plan["epoch"]["steps"] == 2 * (plan["epoch"]["samples"] // 4)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_buckets_a_mixture_and_what_is_missing(prepared):
    plan = plan_of(data_of(prepared, bucketed=True, mixture=MIXTURE))
    assert [bucket["absent"] for bucket in plan["buckets"]] == [[], [], ["old"]]
    steps = [(bucket["first_step"], bucket["last_step"]) for bucket in plan["buckets"]]
    assert steps[0][0] == 1 and steps[-1][1] == plan["epoch"]["steps"]
    assert all(before[1] in (after[0], after[0] - 1) for before, after in zip(steps, steps[1:], strict=False))
    for bucket in plan["buckets"][:2]:
        new, old = bucket["sources"]["new"], bucket["sources"]["old"]
        assert new["samples"] == new["samples_there"] and old["again"] == old["samples"] - old["samples_there"] > 0
        assert abs(old["share"] - 0.3) < 0.01 and old["asked"] == 0.3
        assert sum(old["categories"].values()) == old["tokens"]
    notes = "\n".join(plan["notes"])
    assert "old has no part left in bucket 2" in notes and "old runs out in buckets 0 to 1" in notes
    text = list(plan_lines(plan))
    assert "buckets in order" in text[0] and "asked" in text[1] and text[1].index("asked") > 0
    points = plan["learning_rate"]
    assert points[0][0] == 1 and points[-1][0] == plan["steps"] and max(rate for _, rate in points) == 3e-4
    json.dumps(plan)


def test_a_source_that_runs_out_can_end_the_bucket(prepared):
    plan = plan_of(data_of(prepared, bucketed=True, mixture=MIXTURE, mixture_end="stop"))
    for bucket in plan["buckets"][:2]:
        new, old = bucket["sources"]["new"], bucket["sources"]["old"]
        assert (old["again"], old["left_out"], new["again"]) == (0, 0, 0) and abs(old["share"] - 0.3) < 0.01
        assert new["left_out"] == new["samples_there"] - new["samples"] > 0
        assert new["left_out_tokens"] + new["tokens"] == new["tokens_there"]
    assert "of new are left out in buckets 0 to 1" in "\n".join(plan["notes"])


def test_the_plan_counts_the_order_itself(prepared):
    """Also what is left over, with a schedule that is given."""
    data = data_of(prepared, bucketed=True)
    measured = measure_parts(data.parts)
    numbers = {"micro_batch_size": 8, "data_size": 4, "accumulation_steps": 1, "seed": 1}
    order = make_order(0, **numbers, buckets=buckets_of(data, measured))
    plan = build_plan(data, measured, order, num_epochs=1, schedule=CosineSchedule(1e-3, 7, 3))
    lengths = np.concatenate([lengths for _, lengths in measured])
    left_over = order.epoch_rows(0)[order.steps_after(0) * 32 :]
    assert plan["epoch"]["left_over_samples"] == len(left_over) == len(lengths) % 32 > 0
    assert plan["epoch"]["left_over_tokens"] == lengths[left_over].sum()
    assert plan["epoch"]["tokens"] == lengths.sum() and plan["warmup_steps"] == 3 and plan["steps"] == 7
    with pytest.raises(UserError, match="one micro batch needs"):
        plan_of(data, data_size=10_000)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, prepared, model_dir, run_script):
    """A real run with buckets and a mixture, and one that goes on from the middle of its second bucket."""
    home = tmp_path_factory.mktemp("runs")

    def train(name, *flags):
        places = [word for place in ("save_dir", "tensorboard_dir", "config_file") for word in
                  (f"--{place}", home / name / place)]  # fmt: skip
        process = run_script(
            "train.py", "--pretrained", model_dir, "--dataset", *(f"{s}={prepared / s / 'arrow'}" for s in ("old", "new")),
            "--bucketed", "--mixture", *MIXTURE, "--plugin", "zero2", "--mixed_precision", "fp32", "--max_length", 128,
            "--micro_batch_size", 8, "--save_interval", step, *places, *flags,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        return process.stderr

    plan = plan_of(
        resolve_data([f"{s}={prepared / s / 'arrow'}" for s in ("old", "new")], bucketed=True, mixture=MIXTURE),
        micro_batch_size=8, data_size=1, seed=1024, num_epochs=1,
    )  # fmt: skip
    second = plan["buckets"][1]
    step = (second["first_step"] + second["last_step"]) // 2
    logs = [train("whole"), train("resumed", "--load_checkpoint", home / "whole" / "save_dir" / f"epoch-0_step-{step}")]
    return home, plan, logs


def test_a_real_run_reads_what_its_plan_says(runs):
    home, plan, (log, resumed_log) = runs
    saved = json.loads((home / "whole" / "save_dir" / "plan.json").read_text())
    assert saved == json.loads(json.dumps(plan))
    for line in plan_lines(plan):
        assert line in log
    last = home / "whole" / "save_dir" / f"epoch-0_step-{plan['steps']}"
    states = json.loads((last / "running_states.json").read_text())
    epoch = plan["epoch"]
    assert states["tokens_seen"] == epoch["tokens"] - epoch["left_over_tokens"]
    assert states["samples_seen"] == epoch["samples"] - epoch["left_over_samples"]
    assert f"samples left over at the ends of epochs: {epoch['left_over_samples']}." in log


def test_a_run_resumed_inside_a_bucket_repeats_it_bit_for_bit(runs):
    home, plan, (_, resumed_log) = runs
    assert "repeats the uninterrupted run bit for bit" in resumed_log

    def hashes(name):
        manifest = json.loads((home / name / "save_dir" / f"epoch-0_step-{plan['steps']}" / "manifest.json").read_text())
        return {file["path"]: file["sha256"] for file in manifest["files"] if file["path"].endswith(".safetensors")}

    assert hashes("whole") == hashes("resumed") and len(hashes("whole")) > 1
