"""A problem of one rank of two ends the run on both, with its message."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.train.run_folder import checkpoint_files
from tests import fork_server, launching, tiny
from tests.conftest import ROOT
from tests.faults import one_rank

ZERO2 = ["--plugin", "zero2", "--mixed_precision", "fp32"]
PIPELINE = ["--plugin", "3d", "--mixed_precision", "bf16", "--pp", "2", "--micro_batch_size", "2"]


def spoil_start(path):
    """Another beginning of the same size: neither safetensors nor JSON files begin like this."""
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def misspell_states(path):
    """The states of the ranks exist, under other names."""
    path.write_bytes(path.read_bytes().replace(b'"python": [', b'"pythom": ['))


# Files of a checkpoint that one rank reads differently: the difference, and the message.
DAMAGES = {
    "moments": ("optimizer/pytorch_optim-00001.safetensors", spoil_start, "not a state file"),
    "index": ("optimizer/pytorch_optim.bin.index.json", spoil_start, "is not UTF-8"),
    "schedule": ("lr_scheduler", spoil_start, "not UTF-8"),
    "states": ("running_states.json", spoil_start, "not the running states"),
    "random_states": ("running_states.json", misspell_states, "random states cannot be read"),
}
# Inputs that differ on rank 1, and the message. Problems of a model are found before the ranks connect.
INPUTS = {
    "data": "a sample of --dataset has 33 tokens, --max_length 32 given",
    "cut_data": "cannot be loaded",
}


def write_part(folder, tokenizer_dir, longest=20):
    rows = [[1, *ids[:18], 2] for ids in load_encoder(tokenizer_dir).encode(tiny.english_documents()[:7])]
    rows.append([5] * longest)
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder)


@pytest.fixture(scope="module")
def views(tmp_path_factory, tokenizer_dir, model_dir):
    """Folders of the same names for both ranks, with different content on rank 1, by name of INPUTS."""
    folder = tmp_path_factory.mktemp("views")
    for name in ("same", *INPUTS):
        for rank in range(2):
            view = folder / name / f"rank-{rank}"
            shutil.copytree(model_dir, view / "model")
            write_part(view / "part", tokenizer_dir, longest=33 if name == "data" and rank == 1 else 20)
    cut = folder / "cut_data" / "rank-1" / "part" / "data-00000-of-00001.arrow"
    cut.write_bytes(cut.read_bytes()[:100])
    return folder


def flags_in(home, *more):
    """A small run on the files of its rank."""
    places = {"--save_dir": home / "ckpt", "--tensorboard_dir": home / "tb", "--config_file": home / "config.json"}
    words = ["--pretrained", "model", "--dataset", "part", "--max_length", 32, "--lr", "1e-3", "--num_epochs", 2]
    return [str(word) for word in (*words, *(word for pair in places.items() for word in pair), *more)]


def damaged_views(folder, views, checkpoint, name):
    """Both ranks read a checkpoint; the rank that does not compare the file with the manifest reads it damaged."""
    file, spoil, _ = DAMAGES[name]
    for rank in range(2):
        shutil.copytree(views / "same" / f"rank-{rank}", folder / f"rank-{rank}")
        shutil.copytree(checkpoint, folder / f"rank-{rank}" / "checkpoint")
    spoil(folder / "rank-0" / "checkpoint" / file)
    notices = any(checkpoint_files.content_problems(folder / "rank-0" / "checkpoint", share=0, shares=2))
    if notices:
        (folder / "rank-0").rename(folder / "swapped")
        (folder / "rank-1").rename(folder / "rank-0")
        (folder / "swapped").rename(folder / "rank-1")
    return folder


@pytest.fixture(scope="module")
def ends(tmp_path_factory, views):
    """Run all on two ranks: name -> [[error, what was half written then] of each rank]."""
    folder = tmp_path_factory.mktemp("jobs")

    def spec(name, *flags, seen="same", **more):
        words = flags_in(folder / name, *flags)
        return {"name": name, "script": "train.py", "flags": words, "views": str(views / seen), **more}

    launching.launch(folder, [spec("whole", *ZERO2)], worker="resume_worker.py")
    checkpoint = folder / "whole" / "ckpt" / "epoch-0_step-4"
    specs = [spec(name, *ZERO2, seen=name) for name in INPUTS]
    for name in DAMAGES:
        seen = damaged_views(folder / "views" / name, views, checkpoint, name)
        specs.append(spec(name, *ZERO2, "--num_epochs", 3, "--load_checkpoint", "checkpoint", seen=seen))
    specs += [spec(f"save_{kind}", *PIPELINE, fault=kind) for kind in ("index", "folder", "slow")]
    launching.launch(folder, specs, worker="resume_worker.py")
    return {spec["name"]: json.loads((folder / f"{spec['name']}.json").read_text())["ranks"] for spec in specs}


@pytest.mark.parametrize("name", [*INPUTS, *DAMAGES])
def test_different_inputs_of_one_rank_are_reported_on_both(ends, name):
    (error, _), other = ends[name]
    assert other[0] == error and error is not None
    assert (INPUTS.get(name) or DAMAGES[name][2]) in error


@pytest.mark.parametrize("kind", ["index", "folder", "slow"])
def test_a_stage_that_cannot_write_its_index_ends_the_save_on_both(ends, kind):
    (error, left), other = ends[f"save_{kind}"]
    assert other == [error, left] and left == []
    words = "Permission denied" if kind == "folder" else "No space left on device"
    assert "epoch-0_step-4 cannot be written (" in error and words in error and one_rank.PARTS in error
    assert "(rank 1 on " in error and "earlier checkpoints are complete" in error


# train.py, each rank of which sees a folder of its own.
OF_ITS_OWN = f"""
import os, runpy, sys
os.chdir(os.path.join(sys.argv.pop(1), "rank-" + os.environ["RANK"]))
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_it_is_one_line_and_a_mistake_of_the_user(views, tmp_path):
    (tmp_path / "train_there.py").write_text(OF_ITS_OWN)
    words = [tmp_path / "train_there.py", views / "data", *flags_in(tmp_path, *ZERO2)]
    command = fork_server.start(words, tmp_path, ranks=2)
    command.wait(timeout=120)
    lines = [line for line in command.errors.splitlines() if line.startswith("train.py: error:")]
    problem = "the ranks of this job differ, so it would not train one model: the samples of --dataset: rank 1 on "
    assert len(lines) == 1 and problem in lines[0], command.errors
    assert command.codes == [2, 2] and "Traceback" not in command.errors
    assert not Path(tmp_path, "ckpt").exists()
