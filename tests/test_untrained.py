"""Samples and data without a trained token."""

import datasets
import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.read.untrained import log_untrained, untrained_samples
from colossal_llama2.errors import UserError
from colossal_llama2.train import dry_run
from colossal_llama2.train.settings.from_flags import resolve_with_problems
from colossal_llama2.train.stepping.nonfinite_steps import without_update
from colossal_llama2.train.stepping.state import StepResult, TrainState


def samples_of(labels, documents=None):
    columns = {"input_ids": [[7] * len(row) for row in labels], "labels": labels}
    columns.update({"sequence_lengths": documents} if documents else {})
    return datasets.Dataset.from_dict(columns).with_format("arrow")


def test_untrained_samples_are_counted():
    masked = [[-100, 5, 2], [-100] * 4, [5, -100], [-100, -100, 2], [8]]
    # The first token of a sample is not predicted.
    assert untrained_samples(samples_of(masked), share=0, shares=1) == 3
    assert [untrained_samples(samples_of(masked), share=share, shares=2) for share in (0, 1)] == [1, 2]
    assert untrained_samples(samples_of([[1, 2], [1], [3, 4, 5]]), share=0, shares=1) == 1
    # Nor is that of each document, if documents are kept apart.
    for label in (9, -100):
        spliced = samples_of([[1, 9, 1], [1, 1], [1, label, 1, -100]], [[2, 1], [1, 1], [1, 1, 2]])
        assert untrained_samples(spliced, share=0, shares=1) == 2
        assert untrained_samples(spliced.remove_columns("sequence_lengths"), share=0, shares=1) == 0
    assert untrained_samples(samples_of(masked), share=0, shares=9) == 0


def test_data_without_a_trained_token_is_refused(tmp_path, model_dir, caplog):
    folders = {}
    for name, labels in (("none", [[-100] * 8] * 4), ("some", [[-100] * 8] * 3 + [[1] * 8])):
        folders[name] = str(tmp_path / name)
        datasets.Dataset.from_dict({"input_ids": [[1] * 8] * 4, "labels": labels}).save_to_disk(folders[name])

    def plan(dataset, *more):
        words = ["--pretrained", str(model_dir), "--dataset", folders[dataset], "--save_dir", str(tmp_path / "ckpt")]
        words += ["--tensorboard_dir", str(tmp_path / "tb"), "--config_file", str(tmp_path / "c"), "--dry_run"]
        dry_run.dry_run(*resolve_with_problems(train_flags.train_parser().parse_args([*words, *more])))

    with pytest.raises(UserError, match="^--dataset: no trained token in 4 samples, all labels"):
        plan("none")
    with pytest.raises(UserError, match="^--eval_dataset en: no trained token in 4 samples"):
        plan("some", "--eval_dataset", f"en={folders['none']}")
    assert "--dataset: no trained token in 3 of 4 samples" in caplog.text
    log_untrained(0, 4)


def test_steps_without_an_update_are_counted_and_leave_the_schedule():
    state = TrainState()
    results = [StepResult(2.0, 1.0, 10, overflows=3), StepResult(None, None, 10), StepResult(float("nan"), 1.0, 10)]
    results += [StepResult(2.0, None, 10, loss_scale=1.0), StepResult(2.0, 0.0, 10)]
    for result in results:
        state.count(result, 4)
    assert (state.step, state.updates, state.sample_start_index, state.samples_seen) == (5, 2, 20, 20)
    assert (state.untrained_steps, state.bad_steps, state.overflows, state.tokens_seen) == (1, 2, 3, 50)
    ending = ", 3 of them without an update (1 had no trained token, 2 had a NaN/Inf loss or gradient norm)"
    assert without_update(state) == ending and without_update(TrainState(step=9)) == ""
    assert TrainState.from_dict(state.to_dict()) == state
    # As an earlier version wrote it.
    old = {name: value for name, value in state.to_dict().items() if not name.endswith(("_steps", "overflows"))}
    assert TrainState.from_dict(old).updates == 5
