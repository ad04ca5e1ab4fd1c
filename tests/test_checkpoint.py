"""What a run begins from, which folders it may write to, and whether a checkpoint is whole.

Writing itself is in test_training.py, resuming in test_resume.py.
"""

import dataclasses
import json

import pytest

from colossal_llama2 import logs
from colossal_llama2.dataset.loader import SampleOrder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.train import checkpoint_files, resuming
from colossal_llama2.train.checkpoint import check_save_dir, plan_loading
from colossal_llama2.train.loop import TrainState
from tests.faults import damage

STATES = {"epoch": 1, "step": 30, "sample_start_index": 80, "samples_seen": 180, "tokens_seen": 9000, "seed": 1024}


def seal(folder, saved_at=1.0):
    """Write the manifest of a folder."""
    sizes = checkpoint_files.list_files(folder)
    checkpoint_files.write_manifest(folder, checkpoint_files.file_entries(folder, sizes), saved_at=saved_at)
    return folder


def bare_checkpoint(save_dir, step, saved_at):
    """A complete checkpoint with one file."""
    folder = save_dir / f"epoch-0_step-{step}"
    folder.mkdir(parents=True)
    (folder / "running_states.json").write_text("{}")
    return seal(folder, saved_at)


@pytest.fixture
def checkpoint(tmp_path):
    # "modeling" in the path must decide nothing.
    folder = tmp_path / "remodeling" / "epoch-1_step-30"
    (folder / "modeling").mkdir(parents=True)
    (folder / "modeling" / "config.json").write_text("{}")
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "pytorch_optim.bin.index.json").write_text("{}")
    (folder / "lr_scheduler").write_text('{"peak": 0.1}')
    (folder / "running_states.json").write_text(json.dumps(STATES))
    return seal(folder)


def test_without_a_checkpoint():
    plan = plan_loading("llama", None)
    assert (plan.model_path, plan.resume_path) == ("llama", None)


def test_a_checkpoint_resumes_everything(checkpoint):
    plan = plan_loading("llama", str(checkpoint))
    assert (plan.model_path, plan.resume_path) == (str(checkpoint / "modeling"), str(checkpoint))
    state, saved = plan.read_states()
    assert state == TrainState(epoch=1, step=30, sample_start_index=80, samples_seen=180, tokens_seen=9000)
    assert saved["seed"] == 1024 and plan.read_schedule() == {"peak": 0.1}


@pytest.mark.parametrize("spelling", ["modeling", "modelling"])
def test_its_model_folder_gives_weights_alone(checkpoint, spelling):
    plan = plan_loading("llama", str(checkpoint / spelling))
    assert (plan.model_path, plan.resume_path) == (str(checkpoint / "modeling"), None)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        plan_loading("llama", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="running_states.json"):
        plan_loading("llama", str(tmp_path))


@pytest.mark.parametrize("name", ["optimizer/pytorch_optim.bin.index.json", "lr_scheduler"])
def test_an_incomplete_checkpoint_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=name):
        plan_loading("llama", str(checkpoint))


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 1}', '{"epoch": null}'])
def test_damaged_states_are_refused(checkpoint, text):
    (checkpoint / "running_states.json").write_text(text)
    seal(checkpoint)
    with pytest.raises(UserError, match="running states"):
        plan_loading("llama", str(checkpoint)).read_states()


def test_a_new_or_empty_folder_may_be_written(tmp_path):
    check_save_dir(str(tmp_path / "new"), None)
    check_save_dir(str(tmp_path), None)
    (tmp_path / "epoch-0_step-5.tmp").mkdir()  # what a crash in the first save leaves
    check_save_dir(str(tmp_path), None)


def test_another_run_s_folder_may_not(checkpoint, tmp_path):
    with pytest.raises(UserError, match="epoch-1_step-30"):
        check_save_dir(str(checkpoint.parent), None)
    (tmp_path / "done" / "modeling").mkdir(parents=True)
    with pytest.raises(UserError, match="modeling"):
        check_save_dir(str(tmp_path / "done"), str(checkpoint))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        check_save_dir(str(tmp_path / "file"), None)


def test_a_resumed_run_goes_on_in_its_folder(checkpoint):
    check_save_dir(str(checkpoint.parent), str(checkpoint))


def test_a_checkpoint_without_its_manifest_is_refused(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="not written to its end"):
        plan_loading("llama", str(checkpoint))
    assert checkpoint_files.complete_checkpoints(checkpoint.parent) == []


@pytest.mark.parametrize("kind", ["cut", "delete", "flip", "swap"])
def test_every_damaged_file_is_named(checkpoint, kind):
    for name in (*checkpoint_files.list_files(checkpoint), "manifest.json"):
        before = (checkpoint / name).read_bytes()
        damage.KINDS[kind](checkpoint / name)
        found = checkpoint_files.sizes_problem(checkpoint)
        found = found or next(checkpoint_files.content_problems(checkpoint), None)
        assert found and name in found, (kind, name, found)
        (checkpoint / name).write_bytes(before)
    assert checkpoint_files.sizes_problem(checkpoint) is None


def test_a_manifest_that_names_files_outside_is_refused(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in ("../secret", "/etc/passwd", "a\\b", 7):
        entry = {"path": name, "bytes": 1, "sha256": ""}
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": [entry]}))
        assert "not the manifest" in checkpoint_files.sizes_problem(checkpoint)


def test_checkpoints_come_in_the_order_they_were_written(tmp_path):
    late, early = bare_checkpoint(tmp_path, 5, saved_at=20.0), bare_checkpoint(tmp_path, 90, saved_at=10.0)
    (tmp_path / "epoch-0_step-95").mkdir()
    assert checkpoint_files.complete_checkpoints(tmp_path) == [early, late]


def test_leftovers_go_and_what_was_being_replaced_comes_back(tmp_path):
    kept = bare_checkpoint(tmp_path, 5, saved_at=1.0)
    replaced = bare_checkpoint(tmp_path, 10, saved_at=2.0)
    replaced.rename(tmp_path / "epoch-0_step-10.old")
    for name in ("epoch-0_step-10.tmp", "epoch-0_step-5.old", "modeling.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest.tmp").write_text("x")
    (tmp_path / "notes.tmp").write_text("the user's")
    checkpoint_files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0_step-10", "epoch-0_step-5", "notes.tmp"]
    assert checkpoint_files.complete_checkpoints(tmp_path) == [kept, replaced]


def test_room_is_checked_before_a_save(tmp_path):
    checkpoint_files.check_room(tmp_path, 1)
    with pytest.raises(RunError, match="needs about .* are free"):
        checkpoint_files.check_room(tmp_path, 10**18)


def test_a_clock_that_goes_back_removes_nothing_new(tmp_path):
    bare_checkpoint(tmp_path, 1, saved_at=2000.0)
    assert checkpoint_files.later_than_all(tmp_path, 3000.0) == 3000.0
    saved_at = checkpoint_files.later_than_all(tmp_path, 1000.0)
    assert saved_at > 2000.0
    newest = bare_checkpoint(tmp_path, 2, saved_at=saved_at)
    checkpoint_files.remove_old(newest, keep_last=1, keep_every=None)
    assert checkpoint_files.complete_checkpoints(tmp_path) == [newest]


def test_the_checkpoint_in_hand_is_never_removed(tmp_path):
    """Where it is not the newest by its time, such as one that an earlier version wrote by a clock that was behind."""
    in_hand, other = bare_checkpoint(tmp_path, 2, saved_at=1.0), bare_checkpoint(tmp_path, 1, saved_at=2.0)
    checkpoint_files.remove_old(in_hand, keep_last=1, keep_every=None)
    assert checkpoint_files.complete_checkpoints(tmp_path) == [in_hand, other]


def test_only_what_auto_found_is_done_again(checkpoint):
    """--load_checkpoint may name a finished run of another folder, in which nothing is this run's to remove."""
    order = SampleOrder(num_samples=80, micro_batch_size=1, data_size=1, accumulation_steps=1, seed=1)
    plan = plan_loading("llama", str(checkpoint))
    state, _ = plan.read_states()
    run = {"num_epochs": 2, "max_steps": None}
    newest = dataclasses.replace(plan, is_newest=True)
    assert not resuming.is_done(plan, state, order, **run, owes_evaluation=False)
    assert resuming.is_done(newest, state, order, **run, owes_evaluation=False)
    assert not resuming.is_done(newest, state, order, **run, owes_evaluation=True)


@pytest.mark.parametrize("name", ["benchmark", "num_samples", "profile", "peak_tflops"])
def test_flags_of_the_benchmark_do_not_change_a_run(name):
    now = {"world_size": 1, "data_parallel_size": 1, "settings": {name: 7}, "versions": {}, "machine": {}}
    assert resuming.changes({**now, "settings": {}}, now) == []


def test_another_split_under_the_same_settings_is_told(checkpoint, caplog, monkeypatch):
    """As a checkpoint of Gemini has it whose chunks were filled in another order."""
    plan = plan_loading("llama", str(checkpoint))
    state, _ = plan.read_states()
    now = {"world_size": 1, "data_parallel_size": 1, "settings": {}, "versions": {}, "machine": {}}
    now["layout"] = {"plugin": "gemini", "chunks": "layers by use"}
    monkeypatch.setattr(logs.get_logger(), "handlers", [caplog.handler])
    resuming.tell_verdict(plan, state, {**now, "layout": {"plugin": "gemini"}}, now)
    assert "not bit for bit" in caplog.text and "{'chunks': 'layers by use'}" in caplog.text
    assert "left aside" in caplog.text and "uninterrupted" not in caplog.text
