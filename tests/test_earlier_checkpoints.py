"""Checkpoints of earlier versions are read exactly: their records are compared, and a resumed run repeats theirs.

tests/data/earlier_checkpoints/COMMIT/ has running_states.json and lr_scheduler of epoch-0_step-2, as that commit wrote
them for the flags in FLAGS on one rank. Version 6778aa0 recorded neither the version of its numerics nor first_sample.
"""

import hashlib
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.engine import resume_state
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory, was_interrupted
from colossal_llama2.train.checkpointing.run_facts import NUMERICS, RunFacts
from colossal_llama2.train.checkpointing.saved_run import SavedRun
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.from_flags import resolve_with_problems
from colossal_llama2.train.stepping.state import TrainState
from tests import tiny
from tests.conftest import ROOT

EARLIER = ROOT / "tests" / "data" / "earlier_checkpoints"
COMMITS = ("6778aa0", "7761401")
FLAGS = "--pretrained model --dataset part-00000 --max_length 16 --micro_batch_size 1 --plugin zero2"
FLAGS += " --mixed_precision fp16 --save_interval 2 --max_steps 4 --warmup_steps 1 --eval_dataset en=part-00000"
FLAGS += " --eval_interval 2"
# Entries that depend on the machine or on the inputs, and not on the version that wrote a checkpoint.
OF_THE_RUN = ("dataset_fingerprints", "eval_fingerprints", "tokenizer", "pretrained_tokenizer", "model_shape")
OF_THE_RUN += ("settings", "versions", "machine", "evaluations", "ranks", "base_model")


@pytest.mark.parametrize("commit", COMMITS)
def test_what_they_record_is_read_and_compared(commit):
    saved = SavedRun.read(EARLIER / commit)
    assert saved.state == TrainState(step=2, sample_start_index=2, samples_seen=2, tokens_seen=32)
    assert saved.first_sample == 0 and not was_interrupted(saved)
    assert saved.read_schedule() == {"peak": 0.0003, "total_steps": 4, "warmup_steps": 1, "step": 2}
    fingerprints = saved.entries["eval_fingerprints"]
    history = EvaluationHistory.after(saved, fingerprints)
    assert [entry["step"] for entry in history.evaluations] == [0, 2] and history.fingerprints == fingerprints
    # A run of this version with the same flags differs only in the numerics of the first.
    flags = resolve_with_problems(train_flags.train_parser().parse_args(FLAGS.split()))[0].flags
    names = [name for name in RunFacts.__dataclass_fields__ if name not in ("settings", "numerics", "first_sample")]
    # A fact of a later version is None where it is off.
    known = {name: saved.entries.get(name) for name in names}
    assert {name for name in names if name not in saved.entries} <= {"groups_by_length", "adapter"}
    facts = RunFacts(**known, settings=json.loads(json.dumps(flags)), numerics=NUMERICS)
    changed = [] if commit != "6778aa0" else [f"version of the numerics 1 -> {NUMERICS}"]
    assert resuming.changes(saved, facts) == changed
    assert resuming._same_layout(saved, facts)


@pytest.mark.parametrize("commit", COMMITS)
def test_random_states_and_loss_scale_are_restored(commit):
    import random

    import torch

    (states,) = SavedRun.read(EARLIER / commit).entries["ranks"]
    scaler = SimpleNamespace(_scale=torch.zeros(1), _growth_step=0, _hysteresis_step=0)
    engine = SimpleNamespace(optimizer=SimpleNamespace(mix_precision_mixin=SimpleNamespace(grad_scaler=scaler)))
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        resume_state.restore_rank_states(engine, states)
        assert json.loads(json.dumps(resume_state.rank_states(engine))) == states
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_dir, run_forked):
    """A run of this version with these flags: its folder, and a function that resumes it."""
    home = tmp_path_factory.mktemp("run")
    tiny.make_model(home / "model", tokenizer_dir, heads=2, layers=1)
    ids = np.random.default_rng(0).integers(3, 500, (8, 16)).tolist()
    datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(str(home / "part-00000"))

    def train(name, *more):
        paths = ["--save_dir", name, "--tensorboard_dir", f"{name}_tb", "--config_file", f"{name}.json"]
        done = run_forked("train.py", *FLAGS.split(), *paths, *more, cwd=home)
        assert done.returncode == 0, done.stderr
        return done.stderr

    train("whole")
    return home, train


def weights_of(folder: RunFolder) -> list[str]:
    """Hashes of the final model's weights."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.model.glob("*.safetensors"))]


@pytest.mark.parametrize("commit", COMMITS)
def test_a_run_resumes_from_their_records_bit_for_bit(run, commit):
    home, train = run
    checkpoint = home / "whole" / "epoch-0_step-2"
    earlier = json.loads((EARLIER / commit / "running_states.json").read_text())
    entries = json.loads((checkpoint / "running_states.json").read_text())
    entries = {name: entries[name] if name in OF_THE_RUN else value for name, value in earlier.items()}
    (checkpoint / "running_states.json").write_text(json.dumps(entries))
    (checkpoint / "lr_scheduler").write_bytes((EARLIER / commit / "lr_scheduler").read_bytes())
    sizes = checkpoint_files.list_files(checkpoint)
    checkpoint_files.write_manifest(checkpoint, checkpoint_files.file_entries(checkpoint, sizes), saved_at=1.0)
    log = train(commit, "--load_checkpoint", str(checkpoint))
    assert ("repeats the uninterrupted run bit for bit" in log) == (commit != "6778aa0")
    assert weights_of(RunFolder(home / commit)) == weights_of(RunFolder(home / "whole"))
