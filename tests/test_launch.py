"""A launch ends with its job: what its output reveals, which variables pass, and launches on real hosts.

tests/cluster/run.sh tests the same with training, for each launcher.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from colossal_llama2.cluster import environment, job_processes, watch_launch
from colossal_llama2.cluster.hostfile import Host
from colossal_llama2.cluster.launch_output import LaunchOutput
from colossal_llama2.cluster.launchers import ColossalaiLaunch, Plan, SlurmLaunch
from colossal_llama2.errors import RunError
from tests.conftest import ROOT
from tests.launching import free_port

# torchrun 2.5 and 2.12 print this; `colossalai run` 0.5.0 adds the rest.
REPORT = """
============================================================
train.py FAILED
------------------------------------------------------------
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_20:{second}
  host      : {host}
  rank      : {rank} (local_rank: 0)
  exitcode  : {code} (pid: 15)
  error_file: <N/A>
  traceback : {message}
============================================================
"""
NO_TRACEBACK = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
UNREACHABLE = (
    "Error: failed to run torchrun --nnodes=2 train.py on 10.201.0.9, is localhost: False, exception: [Errno None] "
    "Unable to connect to port 22 on 10.201.0.9"
)
ENDED = (
    "Error: failed to run torchrun train.py on node2, is localhost: False, exception: Encountered a bad command exit "
    "code!\n\nCommand: 'cd /x && export A=\"b\"'\n\nExit code: {}\n\nStdout: already printed\n"
)


def read(text: str) -> LaunchOutput:
    output = LaunchOutput()
    for line in text.splitlines():
        output.read(line + "\n")
    return output


def report(host: str, rank: int, code: int, second: str = "00:00", message: str = NO_TRACEBACK) -> str:
    return REPORT.format(host=host, rank=rank, code=code, second=second, message=message)


def test_the_first_rank_that_failed_is_the_root_cause():
    later, first = report("node1", 0, 1, "00:05"), report("node2", 1, -9, "00:03")
    root = read(later + first).root_cause()
    assert (root.host, root.rank, root.exit_code, root.message) == ("node2", 1, 137, "")
    # In one second, what says most: torchrun ends the others with SIGTERM, and partners end with 1.
    same = [report("node1", 0, -15), report("node1", 1, 1), report("node2", 2, 3, message="train.py: error: full")]
    root = read("".join(same)).root_cause()
    assert (root.rank, root.exit_code, root.message) == (2, 3, "train.py: error: full")
    assert read("nothing\n").root_cause() is None


def test_hosts_that_colossalai_has_lost():
    failure = read(UNREACHABLE).hosts["10.201.0.9"]
    assert not failure.was_connected and failure.code is None and "Unable to connect" in failure.reason
    assert read(ENDED.format(1)).hosts["node2"].code == 1
    # A connection that is lost says nothing about the ranks there.
    lost = read(ENDED.format(-1)).hosts["node2"]
    assert lost.was_connected and lost.code == -1


@pytest.mark.parametrize(
    "line, meaning",
    [
        ("bash: line 1: torchrun: command not found", "no torchrun there"),
        ("python: can't open file '/w/train.py': [Errno 2] No such file or directory", "no file /w/train.py there"),
        ("export: Command not found.", "login shell"),
        ("torch.distributed.DistNetworkError: ... EADDRINUSE", "set another MASTER_PORT"),
    ],
)
def test_messages_of_other_programs_are_explained(line, meaning):
    assert meaning in read(line).hints[0]


def test_variables_for_command_lines():
    passed = environment.for_command_line(
        {
            "PATH": "/bin",
            "NCCL_IB_HCA": "mlx5_1:1,mlx5_2:1",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_TOKEN": "hf_x",
            "WANDB_API_KEY": "x",
            "https_proxy": "http://me:sesame@proxy",
            "TORCH_LOGS": '+"dynamo"',
            "CUDA_VISIBLE_DEVICES": "",
            "MINE": "1",
            "MY_PASSWORD": "1",
            "LS_COLORS": "1",
            "SLURM_JOB_ID": "1",
            "BASH_FUNC_a%%": "() { :; }",
        },
        more="MY_PASSWORD",
    )
    assert list(passed.variables) == ["NCCL_IB_HCA", "PATH", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM"]
    assert passed.secret == ["HF_TOKEN", "MY_PASSWORD", "WANDB_API_KEY", "https_proxy"]
    assert (passed.unquotable, passed.empty, passed.unknown) == (["TORCH_LOGS"], ["CUDA_VISIBLE_DEVICES"], ["MINE"])
    assert len(passed.reports()) == 4 and "sesame" not in "".join(passed.reports())


def test_the_timeout_of_hosts_is_that_of_ranks():
    assert watch_launch.dist_timeout(["--lr", "1"]) == 600
    assert watch_launch.dist_timeout(["--dist_timeout", "5", "--x", "--dist_timeout=30"]) == 30


@pytest.fixture
def launch(make_cluster, tmp_path):
    """A function that starts a script on two hosts, and returns exit code, errors, seconds, and the hosts."""
    (tmp_path / "hostfile").write_text("node1\nnode2\n")
    (tmp_path / "colossal_llama2").symlink_to(ROOT / "colossal_llama2")

    def start(launcher: str, script: str, *, prepare=lambda cluster: None, **variables: str):
        (tmp_path / "script.py").write_text(script)
        cluster = make_cluster(2)
        prepare(cluster)
        options = f"--launcher {launcher} --hostfile hostfile --nproc_per_node 1 --name train.sh script.py".split()
        command = [sys.executable, "-m", "colossal_llama2.cluster.watch_launch", *options]
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        started = time.monotonic()
        process = cluster.run(1, command, cwd=tmp_path, env={"PATH": path, **variables}, timeout=100)
        return process.returncode, process.stderr, time.monotonic() - started, cluster

    return start


def processes(cluster, host: int) -> str:
    return cluster.run(host, ["ps", "-A", "-o", "args"]).stdout


def test_a_script_that_fails_on_one_host_ends_the_launch(launch, tmp_path):
    """With its exit code and host, and nothing is left on the other. Secrets reach it unseen."""
    script = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "if os.environ['RANK'] == '0':\n    Path('started').touch()\n    time.sleep(300)\n"
        "while not Path('started').exists():\n    time.sleep(0.1)\n"
        "assert os.environ['MY_SECRET'] == 'a \"$b\" \\\\ c'\n"
        "assert '$b' not in subprocess.run(['ps', '-A', '-o', 'args'], capture_output=True, text=True).stdout\n"
        "sys.exit(7)\n"
    )
    code, errors, _, cluster = launch("torchrun", script, MY_SECRET='a "$b" \\ c')
    assert code == 7, errors
    assert errors.splitlines()[-1] == "train.sh: error: node2: rank 1 ended with exit code 7"
    assert not any("script.py" in processes(cluster, host) for host in (1, 2))


def test_colossalai_run_ends_when_a_host_refuses_it(launch):
    """By itself it waits for ever. train.sh checks hosts before, but a host may change its mind."""
    code, errors, seconds, cluster = launch(
        "colossalai", "import time\ntime.sleep(300)\n", prepare=lambda cluster: cluster.authorize(2, False)
    )
    assert code == 1 and seconds < 60
    assert re.match("train.sh: error: node2: no ssh connection: Authentication", errors.splitlines()[-1]), errors
    assert "script.py" not in processes(cluster, 1)


SAVES = (
    "import signal, sys, time\nfrom pathlib import Path\n"
    "def save(number, frame):\n    Path('saved').touch()\n    sys.exit(128 + number)\n"
    "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(60)\n"
)


@pytest.fixture
def start_here(tmp_path):
    """A function that starts a script by a `colossalai` that runs it as the one rank of this host."""
    (tmp_path / "hostfile").write_text("localhost\n")
    stand_in = tmp_path / "bin" / "colossalai"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\nLOCAL_RANK=0 exec {sys.executable} -u script.py\n")
    stand_in.chmod(0o755)

    def start(script: str, *flags: str, variables: dict[str, str] | None = None, **streams) -> subprocess.Popen:
        (tmp_path / "script.py").write_text(script)
        words = [sys.executable, "-m", "colossal_llama2.cluster.watch_launch", "--nproc_per_node=1", "--name=train.sh"]
        words += [f"--master_port={free_port()}"]
        path = {"PATH": f"{stand_in.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*words, *flags, "script.py"], cwd=tmp_path, env=path | (variables or {}), **streams)

    return start


def test_a_signal_reaches_the_ranks_though_nobody_reads_the_messages(start_here, tmp_path):
    """As with `bash train.sh 2>&1 | tee log` and Ctrl+C, which ends tee too, or in a terminal that was closed."""
    reader, writer = os.pipe()
    process = start_here(SAVES, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert process.stdout.readline() == b"ready\n"
    os.close(reader)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_ranks_have_started_ends_the_launch(start_here, tmp_path, number):
    """Nothing is there that could save, and nothing that would end later because of the signal."""
    (tmp_path / "bin" / "colossalai").write_text("#!/bin/sh\necho ready\nexec sleep 60\n")
    process = start_here("", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.decode().splitlines()[-1] == "train.sh: error: ended before the ranks had started"


def test_a_signal_to_a_launch_by_slurm_ends_it_with_the_code_of_srun(start_here, tmp_path):
    """Slurm's tasks are ranks without LOCAL_RANK. The stand-ins find a step by its name, and signal its one task."""
    for name, does in {
        "scontrol": "echo localhost",
        "srun": f'for word; do case $word in --job-name=*) echo "${{word#--job-name=}}" >{tmp_path}/name; esac; done\n'
        f"echo $$ >{tmp_path}/task; exec {sys.executable} -u script.py",
        "squeue": f'echo "7.0 $(cat {tmp_path}/name)"',
        "scancel": f'test "$*" = "--signal=TERM 7.0" && kill "$(cat {tmp_path}/task)"',
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    process = start_here(
        SAVES, "--launcher=slurm", variables={"SLURM_JOB_ID": "7"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and (tmp_path / "saved").exists()
    assert errors.decode() == "train.sh: SIGTERM: passed on to the ranks, which save and end\n"


def test_hosts_are_looked_up_once(tmp_path, monkeypatch):
    """During a run of weeks the name service may fail, or take longer than hosts wait for a sign of life."""
    (tmp_path / "hostfile").write_text("localhost\n")
    words = ["--nproc_per_node=1", f"--hostfile={tmp_path / 'hostfile'}", f"--master_port={free_port()}", "script.py"]
    plan = watch_launch.plan_of(watch_launch.parser().parse_args(words))

    def fail(*words, **more):
        raise AssertionError("a name is looked up")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    assert ColossalaiLaunch(plan, LaunchOutput()).ended() == {} and plan.other_destinations() == []
    assert plan.here.name == "localhost"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A launch in a job of a stand-in for Slurm, whose commands record their words in a file."""
    for name, prints in {"srun": "", "scancel": "", "squeue": 'echo "7.2 other"; echo "7.3 abc"'}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{tmp_path}/words"\n{prints}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    return SlurmLaunch(Plan([Host("a"), Host("b")], 4, 30013, ["train.py"], mark="abc"), LaunchOutput())


def test_slurm_gives_each_task_the_cpus_of_the_job(slurm, tmp_path):
    slurm.start()
    slurm.processes[""].communicate(timeout=20)
    (words,) = (tmp_path / "words").read_text().splitlines()
    assert words.startswith("srun --nodes=2 --ntasks=8 --ntasks-per-node=4 ") and " --cpus-per-task=6 " in words


def test_slurm_signals_the_tasks_of_this_launch_alone(slurm, tmp_path):
    """Not srun, which takes SIGTERM as an order to kill its tasks at once."""
    assert slurm.signal_ranks(signal.SIGTERM)
    assert (tmp_path / "words").read_text().splitlines()[-1] == "scancel --signal=TERM 7.3"
    # Slurm refuses: this is reported, and the ranks go on.
    (tmp_path / "scancel").write_text("#!/bin/sh\necho 'no controller' >&2\nexit 1\n")
    with pytest.raises(RunError, match="scancel: no controller"):
        slurm.signal_ranks(signal.SIGTERM)
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 0\n")
    assert not slurm.signal_ranks(signal.SIGTERM)


def test_only_ranks_themselves_get_a_signal_on_another_host():
    """Not what they have started, and not processes whose variables only look like theirs."""
    script = job_processes.SIGNAL_SCRIPT.format(mark=job_processes.MARK, value="abc", number=0, only_ranks="{}")
    with ExitStack() as stack:
        for variables in ({"LOCAL_RANK": "0"}, {"LOCAL_RANK": "1"}, {"X": "LOCAL_RANK=0", "MY_LOCAL_RANK": "2"}):
            process = subprocess.Popen(
                ["sh", "-c", "sleep 60 & echo; wait"],
                env={"PATH": "/usr/bin:/bin", job_processes.MARK: "abc", **variables},
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(os.killpg, process.pid, signal.SIGKILL)
            process.stdout.readline()
        counts = [
            subprocess.run(["sh"], input=script.replace("{}", word), capture_output=True, text=True).stdout
            for word in ("yes", "no")
        ]
    assert counts == ["2\n", "6\n"]


def test_torchrun_s_hosts_get_what_libraries_read():
    given = {"CONDA_PREFIX": "/c", "CONDA_SHLVL": "1", "OMPI_COMM_WORLD_RANK": "0", "HF_TOKEN": "x", "MINE": "1"}
    assert set(environment.for_hosts(given)) == {"CONDA_PREFIX", "HF_TOKEN", "MINE"}


def test_no_variable_of_the_scripts_is_reported_as_withheld():
    scripts = ("launch.sh", "train.example.sh", "train_sft.example.sh", "train.example.sbatch")
    names = set(re.findall(r"\$\{([A-Z_]+):[-?]", "".join((ROOT / name).read_text() for name in scripts)))
    assert {"CHECK_HOSTS", "LAUNCH_RECORD", "RUN_NAME"} <= names
    assert environment.for_command_line(dict.fromkeys(names, "1")).unknown == []


@pytest.mark.parametrize(
    ("program", "cure"), [("ssh", "openssh-client"), ("srun", "Slurm's commands"), ("colossalai", "activate")]
)
def test_a_missing_program_has_its_own_cure(program, cure):
    assert cure in watch_launch.cure_of(program)
