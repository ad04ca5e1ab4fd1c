"""train.example.sh and train_sft.example.sh: what they pass to `colossalai run`, recorded by a stand-in for it.

How real launchers end is tested in tests/test_launch.py and by tests/cluster/run.sh.
"""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama2.cli import train_flags

ROOT = Path(__file__).resolve().parents[1]
PARSERS = {"train": train_flags.train_parser, "train_sft": train_flags.train_sft_parser}
NAMES = pytest.mark.parametrize("name", PARSERS)
# What `colossalai run` prints when it has waited for all hosts.
FINISHED = "====== Training on All Nodes ====="


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder with copies of the scripts, named as in the README, a hostfile, and a `colossalai` that records."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in PARSERS:
        shutil.copy(ROOT / f"{name}.example.sh", folder / f"{name}.sh")
    shutil.copy(ROOT / "launch.sh", folder)
    (folder / "colossal_llama2").symlink_to(ROOT / "colossal_llama2")
    (folder / "hostfile").write_text("localhost\n")
    stand_in = tmp_path / "bin" / "colossalai"
    stand_in.parent.mkdir()
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nfrom pathlib import Path\n"
        "hostfile = Path(sys.argv[sys.argv.index('--hostfile') + 1]).read_text()\n"
        "print(json.dumps({'cwd': os.getcwd(), 'words': sys.argv[1:], 'environment': dict(os.environ), "
        f"'hostfile': hostfile}}))\nprint('{FINISHED}')\n"
    )
    stand_in.chmod(0o755)
    # The folders in most tests do not exist: they are not checked.
    set_check(folder, "exit 0")
    return folder


def set_check(workplace: Path, command: str) -> None:
    """What runs in place of the checks before a launch. The launch itself is real."""
    python = workplace.parent / "bin" / "python"
    launch = "*colossal_llama2.cluster.watch_launch*"
    python.write_text(f'#!/bin/sh\ncase "$*" in {launch}) exec {shlex.quote(sys.executable)} "$@" ;; esac\n{command}\n')
    python.chmod(0o755)


def run(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a script from another folder, with the stand-in first on PATH and no variables except those given."""
    path = f"{script.parent.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(script), *words],
        cwd="/",
        env={"PATH": path, "HOME": os.environ.get("HOME", "/")} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def record_of(process: subprocess.CompletedProcess) -> dict:
    """What the stand-in has recorded."""
    return json.loads(process.stdout.splitlines()[0])


def launched(script: Path, *words: str, messages: str = "", **variables: str):
    """(launcher's words, parsed flags) of a run, the flags as the shell on each host would split them."""
    process = run(script, *words, **variables)
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(messages, process.stderr), process.stderr
    record = record_of(process)
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
    assert [*launcher[:4], *launcher[5:]] == ["run", "--nproc_per_node", "8", "--hostfile", "--master_port", "30013"]
    assert args.resume is None
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


def test_the_same_command_continues_its_run(workplace):
    script = workplace / "train.sh"
    first = launched(script, "--lr", "2e-4")[1]
    # A start that has written nothing is no run.
    again = launched(script, "--lr", "2e-4")[1]
    assert again.save_dir == first.save_dir and again.resume is None
    (workplace / first.save_dir).mkdir()
    run_name = Path(first.save_dir).name
    message = rf"train\.sh: continuing the run {run_name}, which runs/checkpoints/run_names.txt has .*\n"
    again = launched(script, "--lr", "2e-4", messages=message)[1]
    assert (again.save_dir, again.resume) == (first.save_dir, "auto")
    assert launched(script, "--lr", "2e-4", "--resume", "auto", messages=message)[1].save_dir == first.save_dir
    # Another project has runs of its own.
    named = launched(script, "--lr", "2e-4", PROJECT_NAME="named")[1]
    assert Path(named.save_dir).name.startswith("named-") and named.resume is None
    # Names have seconds.
    other = launched(script, "--lr", "3e-4", PROJECT_NAME="other")[1]
    assert other.save_dir != first.save_dir and other.resume is None
    anew = launched(script, "--lr", "2e-4", RESUME="never")[1]
    assert anew.save_dir != first.save_dir and anew.resume is None
    # The newest run of a command is the one that continues.
    assert launched(script, "--lr", "2e-4")[1].save_dir == anew.save_dir
    # A run is asked for that is not there.
    message = r"train\.sh: starting the run second-\S+; \S+/run_names.txt has none .*; RUN_NAME=\.\.\. .*\n"
    launched(script, "--lr", "2e-4", "--resume", "auto", PROJECT_NAME="second", messages=message)
    assert run(script, RESUME="yes").stderr.endswith("RESUME is yes; give auto or never\n")


@NAMES
def test_a_run_keeps_the_name_that_it_is_given(name, workplace):
    first = launched(workplace / f"{name}.sh", RUN_NAME="last one")[1]
    assert Path(first.save_dir).name == Path(first.tensorboard_dir).name == Path(first.config_file).stem == "last one"
    (workplace / first.save_dir).mkdir()
    message = rf"{name}\.sh: continuing the run last one\n"
    # With other flags too: a name is a run.
    again = launched(workplace / f"{name}.sh", "--lr", "3e-3", RUN_NAME="last one", messages=message)[1]
    assert (again.save_dir, again.resume) == (first.save_dir, "auto")
    assert launched(workplace / f"{name}.sh", RUN_NAME="last one", RESUME="never")[1].resume is None


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
    environment = record_of(process)["environment"]
    assert passed_on.items() <= environment.items() and environment["NCCL_DEBUG"] == "INFO"
    assert not environment.keys() & set(names)
    # Nothing is dropped in silence.
    assert all(name in process.stderr for name in names)


@NAMES
def test_launchers_get_the_variables_of_libraries(name, workplace):
    passed_on = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": "/tmp",
        "FI_PROVIDER": "efa",
        "TRITON_CACHE_DIR": "/tmp/triton cache",
        "MY_VARIABLE": "asked for",
    }
    given = {"HTTPS_PROXY": "http://me:secret@proxy", "NCCL_PS": 'a "quote"', "CUDA_VISIBLE_DEVICES": ""}
    process = run(workplace / f"{name}.sh", **passed_on, **given, PASS_ENVIRONMENT="MY_VARIABLE")
    environment = record_of(process)["environment"]
    assert passed_on.items() <= environment.items() and not environment.keys() & given.keys()
    lines = process.stderr.splitlines()
    assert len(lines) == 3 and "secret" not in process.stderr
    assert [line.partition("hosts: ")[2].partition(" (")[0] for line in lines] == list(given)


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
    set_check(workplace, f'exec {shlex.quote(sys.executable)} "$@"')
    (workplace / "hostfile").write_text("# two hosts\r\nnode1\r\n\r\nme@node2\r\n")
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
@pytest.mark.parametrize("code, launched", [(0, True), (2, False), (130, False), (143, False)])
def test_an_interrupted_check_launches_nothing(name, code, launched, workplace):
    set_check(workplace, f'[ "$1" = -c ] && exit 0; exit {code}')
    process = run(workplace / f"{name}.sh")
    assert process.returncode == (0 if launched else code)
    assert (process.stdout != "") is launched and (workplace / "runs").exists() is launched


@NAMES
def test_a_failing_launch_fails_the_script(name, workplace):
    (workplace.parent / "bin" / "colossalai").write_text("#!/bin/sh\nexit 3\n")
    process = run(workplace / f"{name}.sh")
    assert process.returncode == 3 and process.stderr.startswith(f"{name}.sh: error: ")
    # It ends with 0 if it does not understand its own flags.
    (workplace.parent / "bin" / "colossalai").write_text("#!/bin/sh\necho wrong flag\n")
    process = run(workplace / f"{name}.sh")
    assert process.returncode == 1 and "colossalai run ended without starting anything" in process.stderr


@NAMES
def test_a_hostfile_may_have_comments_slots_and_line_ends_of_windows(name, workplace):
    (workplace / "hostfile").write_text("# the first\r\nlocalhost slots=8 # GPUs\r\n\r\n")
    assert record_of(run(workplace / f"{name}.sh"))["hostfile"] == "localhost\n"
    (workplace / "hostfile").write_text("localhost slots=4\n")
    process = run(workplace / f"{name}.sh")
    assert process.returncode == 2 and "slots=4 for localhost, but NPROC_PER_NODE is 8" in process.stderr


@NAMES
def test_launchers_that_cannot_be_used_are_refused(name, workplace):
    cures = {"mpirun": "give colossalai, torchrun or slurm", "slurm": "outside of a Slurm job; submit one: sbatch"}
    for launcher, cure in cures.items():
        process = run(workplace / f"{name}.sh", LAUNCHER=launcher)
        assert (process.returncode, process.stdout) == (2, "") and cure in process.stderr
        assert len(process.stderr.splitlines()) == 1
    mistakes = {
        "MAX_RESTARTS=2": "MAX_RESTARTS=2 needs LAUNCHER=torchrun",
        "MAX_RESTARTS=-1": "MAX_RESTARTS is -1; give a whole number",
        "MAX_RESTARTS=abc": "MAX_RESTARTS is abc; give a whole number",
        "MASTER_PORT=abc": "MASTER_PORT is abc; give a port from 1 to 65535",
        "MASTER_PORT=70000": "MASTER_PORT is 70000; give a port",
    }
    for variable, message in mistakes.items():
        process = run(workplace / f"{name}.sh", **dict([variable.split("=")]))
        assert process.returncode == 2 and message in process.stderr and len(process.stderr.splitlines()) == 1
    assert not (workplace / "runs").exists()
    (workplace.parent / "bin" / "colossalai").unlink()
    process = run(workplace / f"{name}.sh", PATH=f"{workplace.parent / 'bin'}:/usr/bin:/bin")
    assert process.returncode == 2 and "source .venv/bin/activate" in process.stderr


def start_job(workplace: Path, train: str, **variables: str) -> subprocess.Popen:
    """Run train.example.sbatch as Slurm does, with another train.sh, and an scontrol that records."""
    shutil.copy(ROOT / "train.example.sbatch", workplace / "train.sbatch")
    (workplace / "train.sh").write_text(train)
    scontrol = workplace.parent / "bin" / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" >scontrol.txt\n')
    scontrol.chmod(0o755)
    given = {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": "/venv",
        "SLURM_SUBMIT_DIR": str(workplace),
        "SLURM_JOB_ID": "70007",
        "SLURM_JOB_NAME": "my job",
        "SLURM_NTASKS_PER_NODE": "4",
        **variables,
    }
    return subprocess.Popen(
        ["bash", workplace / "train.sbatch", "--lr", "1"], env=given, stdout=subprocess.PIPE, text=True
    )


def test_a_slurm_job_requeues_itself_after_a_save(workplace):
    """SIGUSR1, which Slurm sends to the script alone, reaches the launch, and comes before the end of the job."""
    process = start_job(workplace, "trap 'sleep 0.5; exit 0' USR1\necho ready $@\nwhile :; do sleep 0.1; done\n")
    assert process.stdout.readline() == "ready --lr 1\n"
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and "requeueing job 70007" in output
    assert (workplace / "scontrol.txt").read_text() == "requeue 70007\n"


# A train.sh in which another folder was written over PARENT_SAVE_DIR, and which saves.
SAVES = (
    "source ./launch.sh\nfolder='my runs/x'\nrecord_launch --save_dir runs/x --lr 1 --save_dir \"$folder\"\n"
    'mkdir -p "$folder"; echo epoch-0_step-{step} >"$folder/latest"\n'
)


@pytest.mark.parametrize("code", [1, 134, 137, 139])
def test_a_slurm_job_requeues_itself_after_a_fault_if_it_has_saved(code, workplace):
    train = f"{SAVES.format(step=9)}exit {code}\n"
    process = start_job(workplace, train)
    (line,) = process.communicate(timeout=20)[0].splitlines()
    assert line == f"train.sbatch: exit code {code}, after the checkpoint epoch-0_step-9; requeueing job 70007"
    assert process.returncode == code and (workplace / "scontrol.txt").read_text() == "requeue 70007\n"
    assert len((workplace / "my runs" / "x" / "faults.txt").read_text().splitlines()) == 1
    (workplace / "scontrol.txt").unlink()
    # The same fault at the same place again.
    (line,) = start_job(workplace, train).communicate(timeout=20)[0].splitlines()
    assert line == f"train.sbatch: exit code {code} without a new checkpoint in my runs/x; job 70007 is not requeued"
    assert not (workplace / "scontrol.txt").exists()


def test_a_slurm_job_is_requeued_after_so_many_faults_alone(workplace):
    """Requeues before the end of the job's time are not counted."""
    for number, allowed in enumerate((True, True, False)):
        train = f"{SAVES.format(step=number)}exit 1\n"
        process = start_job(workplace, train, MAX_REQUEUES="2", SLURM_RESTART_COUNT="50")
        output, _ = process.communicate(timeout=20)
        assert ("requeueing job" in output) is allowed
    assert output == "train.sbatch: exit code 1 after 2 requeues (MAX_REQUEUES); job 70007 is not requeued\n"


def test_a_signal_to_a_slurm_job_reaches_the_launch_whose_exit_code_counts(workplace):
    """`scancel -b --signal=TERM JOB`. The signal alone does not end the job."""
    process = start_job(workplace, "trap 'sleep 0.5; exit 143' TERM\necho ready\nwhile :; do sleep 0.1; done\n")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert output == "train.sbatch: ended by a signal; job 70007 is not requeued\n"


@pytest.mark.parametrize(
    "code, line",
    [
        (0, None),
        (1, "exit code 1 before the launch"),
        (2, "exit code 2: something has to be"),
        (143, "ended by a signal"),
    ],
)
def test_a_slurm_job_that_is_done_or_has_failed_is_not_requeued(code, line, workplace):
    names = "LAUNCHER RUN_NAME RESUME NPROC_PER_NODE MASTER_PORT"
    process = start_job(workplace, f'for name in {names}; do echo "${{!name}}"; done; exit {code}\n')
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code and not (workplace / "scontrol.txt").exists()
    # The job's number stays the same when it is requeued.
    assert output.splitlines()[:5] == ["slurm", "my job-70007", "auto", "4", "20007"]
    reasons = output.splitlines()[5:]
    assert not reasons if line is None else (line in reasons[0] and reasons[0].endswith("70007 is not requeued"))


def test_the_hostfile_is_the_readme_s():
    assert (ROOT / "hostfile.example").read_text() == "hostname1\nhostname2\nhostname3\nhostname4\n"


@pytest.mark.parametrize("name", ["train.example.sh", "train_sft.example.sh", "train.example.sbatch"])
def test_the_example_can_be_executed(name):
    assert (ROOT / name).stat().st_mode & stat.S_IXUSR
