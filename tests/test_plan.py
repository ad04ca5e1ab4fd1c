"""The plan against the prepared data. tests/test_resume.py shows that a real run follows its plan."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from colossal_llama2.dataset.layout.arrow_folder import ArrowFolder
from colossal_llama2.dataset.read.sources import resolve_data
from colossal_llama2.dataset.read.token_counts import measure_parts, read_by_source
from colossal_llama2.errors import UserError
from colossal_llama2.train.forecast.data_plan import buckets_of, build_plan, make_order, plan_lines
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.state import TrainState
from tests.preparing import plan_settings

MIXTURE = ["new=0.7", "old=0.3"]


def data_of(folder, **flags):
    return resolve_data([f"{name}={folder / name / 'arrow'}" for name in ("new", "old")], **flags)


def plan_of(data, **changes):
    numbers = {
        "micro_batch_size": 2,
        "data_size": 2,
        "accumulation_steps": 1,
        "seed": 1,
        "num_epochs": 2,
        "learning_rate": 3e-4,
    }
    return plan_settings(data, **{**numbers, **changes})


def test_without_buckets_everything_is_read_once(two_sources):
    plan = plan_of(data_of(two_sources))
    (bucket,) = plan["buckets"]
    tokens: Counter = Counter()
    for name in ("new", "old"):
        paths = (two_sources / name / "jsonl").glob("part-*")
        samples = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        source = bucket["sources"][name]
        assert (source["samples"], source["left_out"], source["again"]) == (len(samples), 0, 0)
        assert source["tokens"] == sum(len(sample["input_ids"]) for sample in samples)
        for sample in samples:
            for category, length in zip(sample["document_categories"], sample["sequence_lengths"], strict=True):
                tokens[category] += length
    assert {name: entry["tokens"] for name, entry in plan["categories"].items()} == tokens
    assert set(tokens) == {"kind 0", "kind 1", "docs"}
    assert plan["steps"] == 2 * plan["epoch"]["steps"] == 2 * (plan["epoch"]["samples"] // 4)


def test_buckets_a_mixture_and_what_is_missing(two_sources):
    plan = plan_of(data_of(two_sources, bucketed=True, mixture=MIXTURE))
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


def test_what_was_read_of_each_source_is_counted_over_epochs(two_sources):
    data = data_of(two_sources, bucketed=True, mixture=MIXTURE)
    measured = measure_parts(data.parts)
    numbers = {"micro_batch_size": 2, "data_size": 2, "accumulation_steps": 3, "seed": 1}
    order = make_order(0, **numbers, buckets=buckets_of(data, measured))
    owners = [(part.source, int(length)) for part, lengths in measured for length in lengths]
    # From the middle of an epoch to the middle of the second one after it.
    first, steps = 40, order.steps_after(40) + order.steps_after(0) + 5
    expected: Counter = Counter()
    taken = 0
    for epoch, begin in ((0, first), (1, 0), (2, 0)):
        for ranks in zip(*(order.steps(epoch, begin, rank) for rank in range(2)), strict=True):
            if steps == 0:
                break
            steps, taken = steps - 1, taken + ranks[0][1]
            for row in (int(row) for batches, _ in ranks for batch in batches for row in batch):
                source, length = owners[row]
                expected.update({(source, "samples"): 1, (source, "tokens"): length})
    found = read_by_source(measured, order, first_sample=first, samples_seen=taken)
    assert {(one.source, kind): getattr(one, kind) for one in found for kind in ("samples", "tokens")} == expected
    assert [(one.source, one.samples_there) for one in found] == list(Counter(source for source, _ in owners).items())
    assert found[1].source == "old" and found[1].samples > 2 * found[1].samples_there


def test_a_source_that_runs_out_can_end_the_bucket(two_sources):
    plan = plan_of(data_of(two_sources, bucketed=True, mixture=MIXTURE, mixture_end="stop"))
    for bucket in plan["buckets"][:2]:
        new, old = bucket["sources"]["new"], bucket["sources"]["old"]
        assert (old["again"], old["left_out"], new["again"]) == (0, 0, 0) and abs(old["share"] - 0.3) < 0.01
        assert new["left_out"] == new["samples_there"] - new["samples"] > 0
        assert new["left_out_tokens"] + new["tokens"] == new["tokens_there"]
    assert any(note.startswith("new: ") and note.endswith("left out in buckets 0 to 1") for note in plan["notes"])


def test_the_plan_counts_the_order_itself(two_sources):
    """Also the left-over samples, with a given schedule."""
    data = data_of(two_sources, bucketed=True)
    measured = measure_parts(data.parts)
    numbers = {"micro_batch_size": 8, "data_size": 4, "accumulation_steps": 1, "seed": 1}
    order = make_order(0, **numbers, buckets=buckets_of(data, measured))
    plan = build_plan(data, measured, order, num_epochs=1, schedule=CosineSchedule(1e-3, 7, 3), state=TrainState())
    lengths = np.concatenate([lengths for _, lengths in measured])
    left_over = order.epoch_rows(0)[order.steps_after(0) * 32 :]
    assert plan["epoch"]["left_over_samples"] == len(left_over) == len(lengths) % 32 > 0
    assert plan["epoch"]["left_over_tokens"] == lengths[left_over].sum()
    assert plan["epoch"]["tokens"] == lengths.sum() and plan["warmup_steps"] == 3 and plan["steps"] == 7
    with pytest.raises(UserError, match="one micro batch needs"):
        plan_of(data, data_size=10_000)


def test_the_learning_rate_after_a_resume_follows_updates(two_sources):
    data = data_of(two_sources)
    state = TrainState(step=20, sample_start_index=80, samples_seen=80, untrained_steps=4, bad_steps=1)
    plan = plan_of(data, state=state, num_epochs=1)
    schedule = CosineSchedule(3e-4, plan["steps"], plan["warmup_steps"])
    rates = dict(plan["learning_rate"])
    assert rates[21] == pytest.approx(schedule.learning_rate(15), rel=1e-5)
    assert rates[plan["steps"]] == pytest.approx(schedule.learning_rate(plan["steps"] - 6), rel=1e-5)


def test_a_part_without_samples_is_in_no_bucket(two_sources, tmp_path):
    parts = data_of(two_sources).parts
    new, old = ([part.path for part in parts if part.source == name] for name in ("new", "old"))
    # As after a prepare command with more bins than samples.
    empty, *_ = empties = [str(tmp_path / name) for name in ("a", "b", "c")]
    for path in empties:
        Path(path).mkdir()
        ArrowFolder(Path(path), {"input_ids": ["int32"], "labels": ["int32"]}).finish()
    # Bucket 1 has samples of the new source only, bucket 2 has none; the third source has none anywhere.
    words = [f"new={path}" for path in (new[0], new[1], empties[0], new[2])]
    words += [f"old={path}" for path in (old[0], empties[1], empties[2], old[1])]
    plan = plan_of(resolve_data(words, bucketed=True, mixture=MIXTURE))
    assert [(bucket["bucket"], bucket["absent"]) for bucket in plan["buckets"]] == [(0, []), (1, ["old"]), (3, [])]
    first, second, _ = plan["buckets"]
    assert first["sources"]["old"]["again"] and second["sources"]["new"]["asked"] == 1
    notes = "\n".join(plan["notes"])
    assert "old has no part left in bucket 1" in notes and "to reach the requested shares" not in notes
    bare = plan_of(resolve_data([f"new={new[0]}", f"bare={empty}"], bucketed=True))
    assert "bare holds no samples" in bare["notes"] and "bare" not in bare["buckets"][0]["sources"]


def test_steps_are_those_of_this_run(two_sources):
    """Against the order itself: the run ends early, or begins in the middle, or at the end of an epoch."""
    data = data_of(two_sources, bucketed=True)
    ends = np.cumsum([bucket["samples"] for bucket in plan_of(data)["buckets"]]).tolist()
    begin = ends[0] + 4

    def read_by(state, **changes):
        """For each bucket: the first and last step of the plan."""
        plan = plan_of(data, state=state, **changes)
        return plan, [(bucket["first_step"], bucket["last_step"]) for bucket in plan["buckets"]]

    # 4 samples a step.
    places = [(0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2] - ends[2] % 4)]
    expected = [(first // 4 + 1, -(-end // 4)) for first, end in places]
    assert read_by(None)[1] == expected
    cut, steps = read_by(None, max_steps=expected[0][1] + 2)
    last = cut["steps"]
    assert steps == [expected[0], (expected[1][0], last), (None, None)]
    assert cut["ends"] == {"epoch": 0, "sample": 4 * last, "step": last}
    (note,) = [note for note in cut["notes"] if note.startswith("it ends")]
    assert f"after step {last} in epoch 0, bucket 1; unread samples: {2 * ends[2] - 4 * last:,}" in note
    assert any(line.startswith("2 ") and line.endswith(" -") for line in plan_lines(cut))
    # A new run continues in the data of another one; a resumed one keeps its count of steps.
    for step in (0, 100):
        resumed, steps = read_by(TrainState(epoch=1, step=step, sample_start_index=begin))
        first = step + (ends[1] - begin) // 4 + 1
        assert steps == [(None, None), (step + 1, step - (begin - ends[1]) // 4), (first, resumed["steps"])]
        assert f"it begins with sample {begin} of epoch 1, bucket 1" in "\n".join(resumed["notes"])
        assert not any("not read" in note for note in resumed["notes"])
    whole = expected[2][1]
    at_end, steps = read_by(TrainState(epoch=0, step=whole, sample_start_index=4 * whole))
    assert at_end["begins"] == {"epoch": 1, "sample": 0, "step": whole}
    assert steps == [(whole + first, whole + last) for first, last in expected]
