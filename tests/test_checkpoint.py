"""Where a run begins, which folders it may write to, and whether a checkpoint is intact.

Writing itself is in test_training.py, resuming in test_resume.py.
"""

import dataclasses
import json
import math
import os

import pytest

from colossal_llama2 import logs
from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.checkpointer import publish_model
from colossal_llama2.train.checkpointing.resuming import Start
from colossal_llama2.train.checkpointing.run_facts import NUMERICS, RunFacts
from colossal_llama2.train.checkpointing.saved_run import SavedRun
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.from_flags import resolve_with_problems
from colossal_llama2.train.settings.model_source import ModelSource, find_source, newest_source
from colossal_llama2.train.stepping.state import TrainState
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
    # "modeling" in the path must have no effect.
    folder = tmp_path / "remodeling" / "epoch-1_step-30"
    (folder / "modeling").mkdir(parents=True)
    (folder / "modeling" / "config.json").write_text("{}")
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "pytorch_optim.bin.index.json").write_text("{}")
    (folder / "lr_scheduler").write_text('{"peak": 0.1}')
    (folder / "running_states.json").write_text(json.dumps(STATES))
    return seal(folder)


def test_without_a_checkpoint():
    assert find_source("llama", None) == ModelSource("llama", "llama", checkpoint=None)


def test_a_checkpoint_resumes_everything(checkpoint):
    source = find_source("llama", str(checkpoint))
    assert source == ModelSource("llama", str(checkpoint / "modeling"), str(checkpoint))
    saved = SavedRun.read(source.checkpoint)
    assert saved.state == TrainState(epoch=1, step=30, sample_start_index=80, samples_seen=180, tokens_seen=9000)
    assert saved.entries["seed"] == 1024 and saved.read_schedule() == {"peak": 0.1}


@pytest.mark.parametrize("spelling", ["modeling", "modelling"])
def test_its_model_folder_gives_only_weights(checkpoint, spelling):
    assert find_source("llama", str(checkpoint / spelling)) == ModelSource("llama", str(checkpoint / "modeling"))


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_source("llama", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="running_states.json"):
        find_source("llama", str(tmp_path))


@pytest.mark.parametrize("name", ["optimizer/pytorch_optim.bin.index.json", "lr_scheduler"])
def test_an_incomplete_checkpoint_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=name):
        find_source("llama", str(checkpoint))


@pytest.mark.parametrize("text", ["{", "[]", '{"epoch": 1}', '{"epoch": null}'])
def test_damaged_states_are_refused(checkpoint, text):
    (checkpoint / "running_states.json").write_text(text)
    seal(checkpoint)
    with pytest.raises(UserError, match="running states"):
        SavedRun.read(find_source("llama", str(checkpoint)).checkpoint)


def test_a_new_or_empty_folder_may_be_written(tmp_path):
    RunFolder(tmp_path / "new").check_unclaimed(None)
    RunFolder(tmp_path).check_unclaimed(None)
    (tmp_path / "epoch-0_step-5.tmp").mkdir()  # left by a crash in the first save
    RunFolder(tmp_path).check_unclaimed(None)


def test_the_remains_of_a_killed_rehearsal_are_not_a_checkpoint(tmp_path):
    aside = tmp_path / "epoch-0_step-0.old"
    (aside / "modeling").mkdir(parents=True)
    RunFolder(tmp_path).check_unclaimed(None)
    # With a manifest, it is a complete checkpoint that was being replaced.
    seal(aside)
    with pytest.raises(UserError, match="epoch-0_step-0.old of another run"):
        RunFolder(tmp_path).check_unclaimed(None)


def test_another_run_s_folder_may_not(checkpoint, tmp_path):
    with pytest.raises(UserError, match="epoch-1_step-30"):
        RunFolder(checkpoint.parent).check_unclaimed(None)
    (tmp_path / "done" / "modeling").mkdir(parents=True)
    with pytest.raises(UserError, match="modeling"):
        RunFolder(tmp_path / "done").check_unclaimed(str(checkpoint))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "file").check_unclaimed(None)


def test_a_resumed_run_continues_in_its_folder(checkpoint):
    RunFolder(checkpoint.parent).check_unclaimed(str(checkpoint))


def test_a_checkpoint_without_its_manifest_is_refused(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="so it is incomplete"):
        find_source("llama", str(checkpoint))
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


STRAYS = [
    ".DS_Store",
    "._config.json",
    ".nfs000000000001",
    ".fuse_hidden00001",
    "Thumbs.db",
    "desktop.ini",
    ".~lock.a.csv#",
    ".snapshot/old",
    "lost+found/x",
    "modeling/.DS_Store",
    "modeling/._model.safetensors",
    "optimizer/.nfs0000",
    "optimizer/@eaDir/x",
]


def test_files_that_systems_create_anywhere_are_ignored(checkpoint):
    before = checkpoint_files.list_files(checkpoint)
    for name in STRAYS:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")
    assert checkpoint_files.sizes_problem(checkpoint) is None
    assert find_source("llama", str(checkpoint)).checkpoint == str(checkpoint)
    # It is neither listed in the manifest of a new one, nor copied into the exported model.
    assert checkpoint_files.list_files(checkpoint) == before
    publish_model(checkpoint)
    assert [path.name for path in (checkpoint.parent / "modeling").iterdir()] == ["config.json"]


@pytest.mark.parametrize("kind", ["file", "link", "link to a folder", "pipe"])
def test_other_strangers_are_named_with_the_cure(checkpoint, kind):
    """For example a model.safetensors beside shards, which transformers would load instead of them."""
    stranger = checkpoint / "modeling" / "stranger"
    if kind == "file":
        stranger.write_text("x")
    elif kind == "pipe":
        os.mkfifo(stranger)
    else:
        stranger.symlink_to(checkpoint / ("optimizer" if "folder" in kind else "lr_scheduler"))
    assert "modeling/stranger: is not listed in manifest.json; remove it" in checkpoint_files.sizes_problem(checkpoint)
    with pytest.raises(UserError, match="remove it to use this checkpoint"):
        newest_source(RunFolder(checkpoint.parent), otherwise=ModelSource.of_pretrained("llama"))
    stranger.unlink()
    assert checkpoint_files.sizes_problem(checkpoint) is None


NUMBERS = [-1, -(10**400), 10**400, 1e308, math.nan, math.inf, True, "1", None, [], {}, 0.5, 2**53 + 1]


def seal_around(checkpoint, text):
    (checkpoint / "running_states.json").write_text(text)
    return SavedRun.read(find_source("llama", str(seal(checkpoint))).checkpoint)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda value: str(value)[:12])
def test_bad_numbers_are_reported(checkpoint, number):
    for name in ("epoch", "step", "sample_start_index", "samples_seen", "tokens_seen", "first_sample"):
        if number is not None or name != "first_sample":
            with pytest.raises(UserError, match="not the running states"):
                seal_around(checkpoint, json.dumps({**STATES, name: number}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    wrong = [{**manifest, "files": [{**manifest["files"][0], "bytes": number}]}]
    wrong += [{**manifest, "saved_at": number}] if number not in (1e308, 2**53 + 1, 0.5) else []
    wrong += [{**manifest, "files": number}, {**manifest, "files": [number]}] if number != [] else []
    for content in wrong:
        (checkpoint / "manifest.json").write_text(json.dumps(content))
        assert "not the manifest" in checkpoint_files.sizes_problem(checkpoint), content


def test_bad_random_states_and_loss_scales_are_reported(checkpoint):
    """NumPy reads outside its memory at such a position, and PyTorch accepts any scale."""
    good = {"numpy": ["MT19937", "", 624, 0, 0.0], "loss_scale": {"scale": 1.0, "growth_step": 0, "hysteresis_step": 2}}
    seal_around(checkpoint, json.dumps({**STATES, "ranks": [good]}))
    for position in (-5, 625, 10**6, 0.5):
        rank = {**good, "numpy": [*good["numpy"][:2], position, 0, 0.0]}
        with pytest.raises(UserError, match="position of NumPy's"):
            seal_around(checkpoint, json.dumps({**STATES, "ranks": [rank]}))
    for scale in (0, -1.0, math.nan, math.inf, 1e300, "x", None):
        rank = {**good, "loss_scale": {**good["loss_scale"], "scale": scale}}
        with pytest.raises(UserError, match="scale"):
            seal_around(checkpoint, json.dumps({**STATES, "ranks": [rank]}))


def test_counts_that_contradict_each_other_are_reported(checkpoint):
    for counts in ({"untrained_steps": 31}, {"bad_steps": 31}, {"untrained_steps": 16, "bad_steps": 15}):
        with pytest.raises(UserError, match="31 steps without an update .*, but step is 30"):
            seal_around(checkpoint, json.dumps({**STATES, **counts}))
    saved = seal_around(checkpoint, json.dumps({**STATES, "untrained_steps": 30}))
    assert saved.state.updates == 0


def test_loss_scales_are_the_same_on_all_ranks(checkpoint):
    scale = {"scale": 1.0, "growth_step": 0, "hysteresis_step": 2}
    for other in (None, {**scale, "scale": 2.0}, {**scale, "growth_step": 1}):
        ranks = [{"loss_scale": scale}, {"loss_scale": other}]
        with pytest.raises(UserError, match="on one rank and .* on another"):
            seal_around(checkpoint, json.dumps({**STATES, "ranks": ranks}))
    seal_around(checkpoint, json.dumps({**STATES, "ranks": [{"loss_scale": scale}] * 2}))


NESTED = '{"a": ' * 900 + "1" + "}" * 900


@pytest.mark.parametrize("text", ["", "\ufeff[]", "[" * 10**5, NESTED, '{"epoch": 1, "epoch": 2}', '{"epoch": 1'])
def test_a_file_that_is_not_an_object_is_reported(checkpoint, text):
    with pytest.raises(UserError, match="not the running states"):
        seal_around(checkpoint, text)
    (checkpoint / "manifest.json").write_text(text)
    assert "not the manifest" in checkpoint_files.sizes_problem(checkpoint)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_only_regular_files_of_a_checkpoint_are_opened(checkpoint, kind):
    for name in ("running_states.json", "manifest.json", "lr_scheduler"):
        path = checkpoint / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
        with pytest.raises(UserError, match=f"{name}|holds neither"):
            find_source("llama", str(checkpoint))
        readers = {
            "running_states.json": lambda: SavedRun.read(checkpoint),
            "lr_scheduler": SavedRun(checkpoint, TrainState(), {}).read_schedule,
            "manifest.json": lambda: checkpoint_files.read_manifest(checkpoint),
        }
        with pytest.raises(UserError, match=name):
            readers[name]()
        path.unlink()
        path.write_bytes(content)


def test_a_position_outside_the_data_is_reported(checkpoint):
    order = SampleOrder(num_samples=80, micro_batch_size=1, data_size=1, accumulation_steps=1, seed=1)
    for change in ({"sample_start_index": 81}, {"samples_seen": 161}, {"samples_seen": 10**15}):
        state = dataclasses.replace(TrainState(epoch=1, sample_start_index=80, samples_seen=160), **change)
        with pytest.raises(UserError, match="not a position in data of 80 samples"):
            resuming._check_place(SavedRun(checkpoint, state, {}), order)
    at_end = TrainState(epoch=1, sample_start_index=80, samples_seen=160)
    resuming._check_place(SavedRun(checkpoint, at_end, {}), order)


def test_only_the_link_of_a_linked_checkpoint_is_removed(tmp_path, caplog):
    elsewhere = bare_checkpoint(tmp_path / "elsewhere", 1, saved_at=1.0)
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / elsewhere.name
    link.symlink_to(elsewhere)
    RunFolder(tmp_path / "run").check_unclaimed(str(link))
    newest = bare_checkpoint(tmp_path / "run", 2, saved_at=2.0)
    caplog.set_level("INFO")
    checkpoint_files.remove_old(newest, keep_last=1, keep_every=None)
    assert "Removed the link" in caplog.text and not os.path.lexists(link)
    assert checkpoint_files.sizes_problem(elsewhere) is None


def test_leftovers_that_lead_elsewhere_are_removed_as_links(tmp_path):
    elsewhere = bare_checkpoint(tmp_path / "elsewhere", 1, saved_at=1.0)
    (tmp_path / "run").mkdir()
    names = ["epoch-0_step-1.old", "epoch-0_step-2.tmp", "modeling.tmp", "latest.tmp", ".plan.json.0123abcd.tmp"]
    for name in names:
        (tmp_path / "run" / name).symlink_to(elsewhere)
    checkpoint_files.remove_leftovers(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()) and checkpoint_files.sizes_problem(elsewhere) is None


def test_inodes_are_room_too(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    used_up = os.statvfs_result((*free[:5], 1000, 5, 5, *free[8:]))
    monkeypatch.setattr(checkpoint_files.os, "statvfs", lambda path: used_up)
    checkpoint_files.check_room(tmp_path, 1, files=5)
    with pytest.raises(RunError, match="has about 17 files, 5 more can be created .inodes"):
        checkpoint_files.check_room(tmp_path, 1, files=17)
    without = os.statvfs_result((*free[:5], 0, 0, 0, *free[8:]))
    monkeypatch.setattr(checkpoint_files.os, "statvfs", lambda path: without)
    checkpoint_files.check_room(tmp_path, 1, files=17)


def test_checkpoints_are_listed_in_the_order_they_were_written(tmp_path):
    late, early = bare_checkpoint(tmp_path, 5, saved_at=20.0), bare_checkpoint(tmp_path, 90, saved_at=10.0)
    (tmp_path / "epoch-0_step-95").mkdir()
    assert checkpoint_files.complete_checkpoints(tmp_path) == [early, late]


@pytest.mark.parametrize("mark", ["", ".0123abcd"])
def test_leftovers_are_removed_and_a_half_replaced_checkpoint_is_restored(tmp_path, mark):
    kept = bare_checkpoint(tmp_path, 5, saved_at=1.0)
    replaced = bare_checkpoint(tmp_path, 10, saved_at=2.0)
    replaced.rename(tmp_path / f"epoch-0_step-10{mark}.old")
    for name in (f"epoch-0_step-10{mark}.tmp", f"epoch-0_step-5{mark}.old", "modeling.tmp"):
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


def test_a_clock_that_is_set_back_removes_nothing_new(tmp_path):
    bare_checkpoint(tmp_path, 1, saved_at=2000.0)
    assert checkpoint_files.later_than_all(tmp_path, 3000.0) == 3000.0
    saved_at = checkpoint_files.later_than_all(tmp_path, 1000.0)
    assert saved_at > 2000.0
    newest = bare_checkpoint(tmp_path, 2, saved_at=saved_at)
    checkpoint_files.remove_old(newest, keep_last=1, keep_every=None)
    assert checkpoint_files.complete_checkpoints(tmp_path) == [newest]


def test_the_checkpoint_in_hand_is_never_removed(tmp_path):
    """If it is not the newest by its time, as when an earlier version wrote it by a clock that was behind."""
    in_hand, other = bare_checkpoint(tmp_path, 2, saved_at=1.0), bare_checkpoint(tmp_path, 1, saved_at=2.0)
    checkpoint_files.remove_old(in_hand, keep_last=1, keep_every=None)
    assert checkpoint_files.complete_checkpoints(tmp_path) == [in_hand, other]


def test_only_a_finished_run_found_by_auto_is_done(checkpoint):
    """--load_checkpoint may name a finished run in another folder, from which this run must not remove anything."""
    order = SampleOrder(num_samples=80, micro_batch_size=1, data_size=1, accumulation_steps=1, seed=1)
    words = ["--pretrained", "llama", "--dataset", "data", "--num_epochs", "2"]
    config, _ = resolve_with_problems(train_flags.train_parser().parse_args(words))
    named = dataclasses.replace(config, source=find_source("llama", str(checkpoint)))
    newest = dataclasses.replace(config, source=dataclasses.replace(named.source, is_newest=True))
    start = Start(SavedRun.read(checkpoint).state)
    assert not resuming.is_done(named, start, order)
    assert resuming.is_done(newest, start, order)
    assert not resuming.is_done(newest, dataclasses.replace(start, eval_pending=True), order)


def facts_of(**changes) -> RunFacts:
    """The facts of a run on one rank."""
    names = [field.name for field in dataclasses.fields(RunFacts)]
    known = {"world_size": 1, "data_parallel_size": 1, "numerics": NUMERICS}
    known |= {name: {} for name in ("settings", "versions", "machine", "layout")}
    return RunFacts(**{**dict.fromkeys(names), **known, **changes})


def saved_run(checkpoint, facts: RunFacts, **changes) -> SavedRun:
    """The record in a checkpoint of a run with these facts, except for `changes`."""
    saved = SavedRun.read(checkpoint)
    return dataclasses.replace(saved, entries={**saved.entries, **facts.entries(), **changes})


@pytest.mark.parametrize("name", ["benchmark", "num_samples", "profile", "peak_tflops"])
def test_flags_of_the_benchmark_do_not_change_a_run(checkpoint, name):
    facts = facts_of(settings={name: 7})
    assert resuming.changes(saved_run(checkpoint, facts, settings={}), facts) == []


@pytest.mark.parametrize("is_exact", [True, False])
def test_the_log_reports_how_exactly_a_run_continues(checkpoint, caplog, monkeypatch, is_exact):
    """On GPUs a step is not bit-identical when repeated; an earlier version computed its checkpoint differently."""
    facts = facts_of()
    monkeypatch.setattr(logs.get_logger(), "handlers", [caplog.handler])
    monkeypatch.setattr(resuming, "repeats_exactly", lambda: is_exact)
    with caplog.at_level("INFO"):
        resuming.log_verdict(saved_run(checkpoint, facts), facts)
    assert ("bit for bit" in caplog.text, "except for rounding" in caplog.text) == (is_exact, not is_exact)
    caplog.clear()
    earlier = saved_run(checkpoint, facts)
    del earlier.entries["numerics"]
    resuming.log_verdict(earlier, facts)
    assert f"not bit for bit, since this changed: version of the numerics 1 -> {NUMERICS}" in caplog.text
    assert "master weights" not in caplog.text


def test_another_split_with_the_same_settings_is_reported(checkpoint, caplog, monkeypatch):
    """As in a checkpoint of Gemini whose chunks were filled in a different order."""
    facts = facts_of(layout={"plugin": "gemini", "chunks": "layers by use"})
    monkeypatch.setattr(logs.get_logger(), "handlers", [caplog.handler])
    resuming.log_verdict(saved_run(checkpoint, facts, layout={"plugin": "gemini"}), facts)
    assert "not bit for bit" in caplog.text and "{'chunks': 'layers by use'}" in caplog.text
    assert "master weights are replaced by the rounded" in caplog.text and "uninterrupted" not in caplog.text
