"""train.example.sh and train_sft.example.sh: what they pass to `colossalai run`, recorded by a stand-in for it."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama2.cli import train_flags

ROOT = Path(__file__).resolve().parents[1]
PARSERS = {"train": train_flags.train_parser, "train_sft": train_flags.train_sft_parser}
NAMES = pytest.mark.parametrize("name", PARSERS)
VARIABLES = (
    "HOSTFILE",
    "NPROC_PER_NODE",
    "MASTER_PORT",
    "PROJECT_NAME",
    "PARENT_SAVE_DIR",
    "PARENT_TENSORBOARD_DIR",
    "PARENT_CONFIG_FILE",
    "PRETRAINED_MODEL_PATH",
    "DATASET",
    "STAGE",
    "RUN_NAME",
    "MIXTURE",
    "AFTER",
    "ALIGN_STEPS",
)


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with copies of the scripts, named as in the README, a hostfile, and a `colossalai` that records."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in PARSERS:
        shutil.copy(ROOT / f"{name}.example.sh", folder / f"{name}.sh")
    (folder / "hostfile").write_text("localhost\n")
    stand_in = tmp_path / "bin" / "colossalai"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps({{'cwd': os.getcwd(), 'words': sys.argv[1:], "
        "'environment': dict(os.environ)}))\n"
    )
    stand_in.chmod(0o755)
    # The folders in most tests do not exist: they are not checked.
    python = stand_in.with_name("python")
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    return folder


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script from another folder, with the stand-in first on PATH and no variables except those given."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | variables
    environment["PATH"] = f"{script.parent.parent / 'bin'}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", str(script), *words], cwd="/", env=environment, capture_output=True, text=True, timeout=30
    )


def launched(script: Path, *words: str, **variables: str):
    """(launcher's words, parsed flags) of a run, the flags as the shell on each host would split them."""
    process = run(script, *words, **variables)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    record = json.loads(process.stdout)
    assert record["cwd"] == str(script.parent)
    split = record["words"].index(f"{script.stem}.py")
    # `colossalai run` joins these words with spaces and gives them to a shell.
    flags = shlex.split(" ".join(record["words"][split + 1 :]))
    return record["words"][:split], PARSERS[script.stem]().parse_args(flags)


@NAMES
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_answered_once(name, word, workplace):
    process = run(workplace / f"{name}.sh", word)
    # The check, for which the stand-in prints nothing, has answered it.
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@NAMES
def test_as_it_is(name, workplace):
    launcher, args = launched(workplace / f"{name}.sh")
    assert launcher == ["run", "--nproc_per_node", "8", "--hostfile", "hostfile", "--master_port", "30013"]
    assert args.plugin == "zero2" and args.mixed_precision == "bf16"
    assert (args.save_interval, args.num_epochs, args.micro_batch_size, args.warmup_steps) == (400, 1, 8, 100)
    assert (args.gradient_clipping, args.weight_decay) == (1.0, 0.01)
    assert args.use_grad_checkpoint and args.use_flash_attn
    assert len(args.dataset) > 1 and all(re.search(r"/part-\d{5}$", folder) for folder in args.dataset)


def test_the_two_differ_only_where_the_readme_lists_it(workplace):
    pretraining, fine_tuning = (launched(workplace / f"{name}.sh")[1] for name in PARSERS)
    assert (pretraining.lr, pretraining.accumulation_steps) == (1e-4, 1)
    assert (fine_tuning.lr, fine_tuning.accumulation_steps, fine_tuning.use_neft) == (5e-5, 8, True)


def test_the_stages_of_the_recipe(workplace):
    given = {"MIXTURE": "zh=0.5 en=0.5", "AFTER": "align's/epoch-0_step-9/", "ALIGN_STEPS": "9"}
    names = ("align", "inject", "replay")
    stages = {name: launched(workplace / "train.sh", STAGE=name, **given)[1] for name in names}
    assert [(args.train_new_rows_only, args.max_steps) for args in stages.values()] == [(True, 9), *[(False, None)] * 2]
    assert all(args.bucketed for args in stages.values())
    assert stages["inject"].load_checkpoint == "align's/epoch-0_step-9/modeling" and stages["inject"].continue_data
    assert stages["replay"].mixture == ["zh=0.5", "en=0.5"] and stages["inject"].mixture is None
    assert stages["align"].lr > stages["inject"].lr > stages["replay"].lr
    named = launched(workplace / "train.sh", STAGE="replay", RUN_NAME="last one", MIXTURE="new=0.8 old=0.2")[1]
    assert named.save_dir == "runs/checkpoints/last one" and named.mixture == ["new=0.8", "old=0.2"]
    process = run(workplace / "train.sh", STAGE="first")
    assert process.returncode == 2 and "STAGE is first; give align, inject or replay" in process.stderr
    assert "STAGE=replay needs MIXTURE" in run(workplace / "train.sh", STAGE="replay").stderr


@NAMES
def test_a_run_keeps_the_name_that_it_is_given(name, workplace):
    first, again = (launched(workplace / f"{name}.sh", RUN_NAME="last one")[1] for _ in range(2))
    assert first.save_dir == again.save_dir
    assert Path(first.save_dir).name == Path(first.tensorboard_dir).name == Path(first.config_file).stem == "last one"


@NAMES
def test_every_variable_can_come_from_the_environment(name, workplace):
    launcher, args = launched(
        workplace / f"{name}.sh",
        NPROC_PER_NODE="2",
        MASTER_PORT="30099",
        PROJECT_NAME="my $run's",
        PARENT_SAVE_DIR="save dir/",
        PARENT_TENSORBOARD_DIR="board",
        PARENT_CONFIG_FILE="config",
        PRETRAINED_MODEL_PATH="models/明月 松间",
        DATASET="a/part-00000  b/part-00001\nc/part-00002",
    )
    assert launcher[2] == "2" and launcher[-1] == "30099"
    assert args.pretrained == "models/明月 松间"
    assert args.dataset == ["a/part-00000", "b/part-00001", "c/part-00002"]
    run_name = Path(args.save_dir).name
    assert re.fullmatch(r"my \$run's-\d{4}(-\d\d){5}", run_name)
    assert args.save_dir == f"save dir/{run_name}"
    assert args.tensorboard_dir == f"board/{run_name}"
    assert args.config_file == f"config/{run_name}.json"
    assert (workplace / "save dir").is_dir() and (workplace / "board").is_dir() and (workplace / "config").is_dir()


@NAMES
def test_launchers_get_the_variables_of_trackers_without_secrets(name, workplace):
    """`colossalai run` shows its whole environment in the process list of each host."""
    passed_on = {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "http://a:5000", "SWANLAB_PROJ_NAME": "mine"}
    names = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MY_VARIABLE")
    process = run(workplace / f"{name}.sh", **passed_on, **dict.fromkeys(names, "hidden"), NCCL_DEBUG="INFO")
    environment = json.loads(process.stdout)["environment"]
    assert passed_on.items() <= environment.items() and environment["NCCL_DEBUG"] == "INFO"
    assert not environment.keys() & set(names)


@NAMES
def test_arguments_are_last_and_take_precedence(name, workplace):
    _, args = launched(
        workplace / f"{name}.sh", "--plugin", "gemini", "--lr", "2e-5", "--load_checkpoint", "it's a folder"
    )
    assert (args.plugin, args.lr, args.load_checkpoint) == ("gemini", 2e-5, "it's a folder")


@NAMES
def test_the_dataset_array_may_be_edited(name, workplace):
    script = workplace / f"{name}.sh"
    text = script.read_text()
    array = 'declare -a dataset=(\n    "<DIR 1>/part-00000"\n    "<DIR_2>/part-00000"\n)'
    script.write_text(re.sub(r"declare -a dataset=\(.*?\n\)", array, text, flags=re.DOTALL))
    assert launched(script)[1].dataset == ["<DIR 1>/part-00000", "<DIR_2>/part-00000"]


@NAMES
def test_a_missing_hostfile_is_reported(name, workplace):
    (workplace / "hostfile").unlink()
    process = run(workplace / f"{name}.sh")
    assert process.returncode == 2 and process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert "cp hostfile.example hostfile" in process.stderr


@NAMES
def test_a_mistake_is_one_line_before_anything_is_launched(name, workplace):
    real = f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {shlex.quote(sys.executable)} "$@"\n'
    (workplace.parent / "bin" / "python").write_text(real)
    (workplace / "hostfile").write_text("localhost\n127.0.0.1\n")
    process = run(workplace / f"{name}.sh", "--plugin", "3d", "--tp", "3", NPROC_PER_NODE="2")
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"{name}.py: error: ") and "--pretrained" in line and "part-00000: no such folder" in line
    assert "--tp 3 does not divide the 4 processes" in line
    assert not (workplace / "runs").exists()
    process = run(workplace / f"{name}.sh", "--use_flash_attn", "True")
    assert process.returncode == 2 and "--use_flash_attn takes no value" in process.stderr
    assert run(workplace / f"{name}.sh", NPROC_PER_NODE="eight").stderr.startswith(f"{name}.py: error: NPROC_PER_NODE")


@NAMES
@pytest.mark.parametrize("code, launched", [(0, True), (127, True), (130, False), (143, False)])
def test_an_interrupted_check_launches_nothing(name, code, launched, workplace):
    (workplace.parent / "bin" / "python").write_text(f"#!/bin/sh\nexit {code}\n")
    (workplace / "hostfile").write_text("localhost\n")
    process = run(workplace / f"{name}.sh")
    assert process.returncode == (0 if launched else code)
    assert (process.stdout != "") is launched and (workplace / "runs").exists() is launched


@NAMES
def test_a_failing_launch_fails_the_script(name, workplace):
    (workplace.parent / "bin" / "colossalai").write_text("#!/bin/sh\nexit 3\n")
    assert run(workplace / f"{name}.sh").returncode == 3


def test_the_hostfile_is_the_readme_s():
    assert (ROOT / "hostfile.example").read_text() == "hostname1\nhostname2\nhostname3\nhostname4\n"


@NAMES
def test_the_example_can_be_executed(name):
    assert (ROOT / f"{name}.example.sh").stat().st_mode & stat.S_IXUSR
