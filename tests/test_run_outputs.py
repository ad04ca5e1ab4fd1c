"""The files of a run beside its checkpoints: complete or not at all, never through a link, never another run's."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from colossal_llama2.cli import dependent_flags, train_flags
from colossal_llama2.errors import UserError
from colossal_llama2.storage import files
from colossal_llama2.train.report import run_report, train_log
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.run_folder.run_folder import RunFolder
from tests.test_checkpoint import bare_checkpoint

EVENTS = "events.out.tfevents.1.host.2.0"
PLACES = ("--save_dir", "--tensorboard_dir", "--config_file")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(save_dir):
    return {"save_dir": save_dir, "pretrained": "llama", "versions": {}, "lr": 1e-4}


def begin(save_dir, *, config="config_file", events="logs_dir"):
    """What a run does at its beginning; returns the names of its outputs."""
    Path(save_dir).mkdir(exist_ok=True)
    run_folder = RunFolder(Path(save_dir))
    run_outputs.check_places(run_folder, events, config)
    path = run_outputs.write_settings(config, settings(save_dir), run_folder=run_folder)
    folder = run_outputs.claim_events_folder(events, run_folder=run_folder)
    (folder / EVENTS).touch()
    return str(path), str(folder)


def test_each_run_has_its_own_names_and_keeps_them(here, caplog):
    assert begin("checkpoint_dir") == ("config_file", "logs_dir")
    before = Path("config_file").read_bytes()
    assert not caplog.text
    sft = ("config_file-checkpoint_dir_sft", "logs_dir/checkpoint_dir_sft")
    assert begin("checkpoint_dir_sft") == sft
    assert f"are in {sft[0]}" in caplog.text and f"are in {sft[1]}" in caplog.text
    assert Path("config_file").read_bytes() == before
    # As when resumed, or started again after an early end.
    assert begin("checkpoint_dir") == ("config_file", "logs_dir") and begin("checkpoint_dir_sft") == sft
    # Another folder of the same name, and the same name again after the folder was removed.
    Path("more").mkdir()
    assert begin("more/checkpoint_dir_sft") == tuple(f"{name}-2" for name in sft)
    shutil.rmtree("checkpoint_dir")
    assert begin("checkpoint_dir") == ("config_file-checkpoint_dir", "logs_dir/checkpoint_dir")


def test_a_moved_run_keeps_its_names_and_a_copied_one_gets_its_own(here):
    begin("one", config="configs/a.json")
    shutil.copytree("one", "two")
    assert begin("two", config="configs/a.json") == ("configs/a-two.json", "logs_dir/two")
    assert begin("two", config="configs/a.json") == ("configs/a-two.json", "logs_dir/two")
    assert begin("one", config="configs/a.json") == ("configs/a.json", "logs_dir")
    os.rename("one", "three")
    assert begin("three", config="configs/a.json") == ("configs/a.json", "logs_dir")


def test_settings_of_an_earlier_version_are_known_by_their_folder(here):
    Path("config_file").write_text(json.dumps(settings("checkpoint_dir")))
    assert begin("other")[0] == "config_file-other"
    assert begin("checkpoint_dir")[0] == "config_file"


def test_all_files_may_be_in_one_folder(here):
    names = ("run/settings.json", "run")
    assert begin("run", config=names[0], events="run") == names
    assert begin("run", config=names[0], events="run") == names


def test_the_report_keeps_the_id(here):
    begin("run")
    run_id = json.loads(Path("run/settings.json").read_text())["run_id"]
    Path("run", "train_log.jsonl").touch()
    folder = RunFolder(Path("run"))
    run_report.RunReport(folder, settings("run"), {}, None, "llama").write_files()
    assert json.loads(folder.settings.read_text())["run_id"] == run_id == run_outputs.identify(folder)


def test_its_own_settings_are_read_back(here):
    """The id is not a flag."""
    args = train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d"])
    path = run_outputs.write_settings(
        "config_file", {**dependent_flags.used_flags(args), "versions": {}}, run_folder=RunFolder(here)
    )
    again = train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d", "--load_config", str(path)])
    assert again.save_dir == args.save_dir


def broken_places(home):
    """Impossible flags, with the message."""
    (home / "file").write_text("mine")
    (home / "folder").mkdir()
    (home / "dangling").symlink_to(home / "nowhere")
    (home / "linked").symlink_to(home / "file")
    checkpoint = bare_checkpoint(home / "old", 1, saved_at=1.0)
    (home / "old" / "modeling").mkdir()
    (home / "old" / "latest").touch()
    part = home / "part-00000"
    part.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (part / name).write_text("{}")
    (home / "odd" / "plan.json").mkdir(parents=True)
    (home / "list.json").write_text("[1]")
    (home / "llama").mkdir()
    (home / "llama" / "model.safetensors").touch()
    (home / "taken").mkdir()
    (home / "taken" / "modeling").write_text("mine")
    return [
        ("--tensorboard_dir", "file", "is a file, not a folder"),
        ("--save_dir", "file", "is a file, not a folder"),
        ("--config_file", "folder", "is a folder, not a file"),
        ("--config_file", "/dev/null", "is a device"),
        ("--config_file", "file", "not a settings file"),
        ("--config_file", "linked", "not a settings file"),
        ("--config_file", "list.json", "not a settings file"),
        *((flag, "dangling", "broken link") for flag in PLACES),
        *((flag, "file/x", "file is a file, not a folder") for flag in PLACES),
        ("--config_file", "save", "is the same path as --save_dir"),
        ("--config_file", "tb", "is the same path as --tensorboard_dir"),
        ("--tensorboard_dir", "config/x", "would have to be a folder above --tensorboard_dir"),
        *((flag, checkpoint / "x", "is in the checkpoint") for flag in PLACES),
        ("--save_dir", home / "old" / "modeling" / "x", "which its run replaces at its end"),
        ("--tensorboard_dir", part / "x", "holds prepared samples"),
        *(("--config_file", f"save/{name}", f"removes {name} in") for name in ("plan.json", ".lock", "modeling")),
        ("--tensorboard_dir", "save/epoch-0_step-5/tb", "removes epoch-0_step-5 in"),
        ("--tensorboard_dir", "save/modeling", "removes modeling in"),
        ("--save_dir", "odd", "plan.json in it is a folder"),
        ("--save_dir", "taken", "modeling in it is not a folder"),
        *((flag, home / "llama" / "x", "which holds a model") for flag in PLACES),
        ("--save_dir", home / "llama", "which holds a model"),
    ]


def test_a_place_that_cannot_be_is_found_at_the_start(here):
    before = None
    for flag, path, words in broken_places(here):
        before = before or sorted(here.rglob("*"))
        places = {"--save_dir": "save", "--tensorboard_dir": "tb", "--config_file": "config", flag: str(path)}
        with pytest.raises(UserError) as error:
            run_outputs.check_places(RunFolder(Path(places.pop("--save_dir"))), *places.values())
        assert words in str(error.value) and str(path) in str(error.value), error.value
    assert sorted(here.rglob("*")) == before
    (here / "empty").touch()
    run_outputs.check_places(RunFolder(Path("save")), "tb", "empty")
    run_outputs.check_places(RunFolder(Path("folder")), "folder", "folder/new.json")


# Files.


def test_a_replaced_link_leaves_what_it_led_to(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    for name, plant in {"link": os.symlink, "hard": os.link}.items():
        plant(target, tmp_path / name)
        files.replace_file(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new" and not (tmp_path / name).is_symlink()
    with pytest.raises(FileExistsError):
        files.replace_file(tmp_path / "link", b"newer", replaces=False)
    os.symlink(target, tmp_path / "again.json")
    with pytest.raises(OSError, match="again.json"):
        files.write_json(tmp_path / "again.json", {})
    assert target.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "hard", "link", "target"]


def test_a_failed_write_names_its_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "config").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as error:
        files.replace_file(tmp_path / "config", b"new")
    assert error.value.filename == str(tmp_path / "config") and error.value.errno == errno.ENOSPC
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_log_is_appended_to_no_other_file(tmp_path):
    """As in a copy of a run by hard links, and in a folder from someone else."""
    line = b'{"step": 1, "loss": 1.0}\n'
    for name, plant in {"link": os.symlink, "hard": os.link}.items():
        target, folder = tmp_path / f"{name}.jsonl", tmp_path / name
        target.write_bytes(line)
        folder.mkdir()
        plant(target, folder / "train_log.jsonl")
        resumed_from = str(folder / "epoch-0_step-1")
        log = train_log.TrainLog(train_log.begin(RunFolder(folder), last_step=1, resumed_from=resumed_from))
        log.write({"step": 2})
        log.close()
        assert target.read_bytes() == line and (folder / "train_log.jsonl").read_bytes().startswith(line + b'{"step":2')
    os.mkfifo(tmp_path / "pipe")
    log = train_log.TrainLog(tmp_path / "pipe")
    log.write({"step": 1})
    log.close()
