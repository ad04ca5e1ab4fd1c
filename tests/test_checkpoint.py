"""What a run begins from, and which folders it may write to. Writing itself is in test_training.py."""

import json

import pytest

from colossal_llama2.errors import UserError
from colossal_llama2.train.checkpoint import check_save_dir, plan_loading
from colossal_llama2.train.loop import TrainState

STATES = {"epoch": 1, "step": 30, "sample_start_index": 80, "tokens_seen": 9000, "seed": 1024}


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
    return folder


def test_without_a_checkpoint():
    plan = plan_loading("llama", None)
    assert (plan.model_path, plan.resume_path) == ("llama", None)


def test_a_checkpoint_resumes_everything(checkpoint):
    plan = plan_loading("llama", str(checkpoint))
    assert (plan.model_path, plan.resume_path) == (str(checkpoint / "modeling"), str(checkpoint))
    state, saved = plan.read_states()
    assert state == TrainState(epoch=1, step=30, sample_start_index=80, tokens_seen=9000)
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
