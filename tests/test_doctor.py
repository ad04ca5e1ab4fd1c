"""The doctor: what it asks of a host, the one line for each fault, and what a user sees. Real hosts: tests/cluster."""

import dataclasses
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from colossal_llama2.cluster.doctor import exchange, host_report, remote, survey
from colossal_llama2.cluster.doctor.findings import all_findings
from colossal_llama2.cluster.doctor.remote import Answer
from colossal_llama2.cluster.doctor.survey import Probe, Question, Reply
from colossal_llama2.cluster.doctor.variables import findings as variable_findings
from colossal_llama2.cluster.hostfile import Host
from colossal_llama2.train import doctor
from colossal_llama2.train.run_folder import lock_record
from tests.conftest import ROOT

GIB = 1 << 30
NAMES = ("node1", "node2", "node3")
QUESTION = Question(
    "/job", "/job/python", "/bin", scripts=("train.py",), paths=("model",), save_dir=Path("runs/a"), port=30013
)
PROBE = Probe(Path("/job/runs"), Path("/job/runs/.token-00000000"))


def good_report(number: int) -> dict:
    """What a healthy host reports."""
    return {
        "started": 1000.1,
        "ended": 1000.2,
        "port": {"problem": None, "from": 1000.1, "until": 1004.1},
        "host": {
            "name": f"node{number}",
            "user": "me",
            "addresses": [f"10.0.0.{number}"],
            "name_problem": None,
            "shell": "/bin/bash",
            "shell_problem": None,
            "locked_memory": None,
            "shared_memory": 8 * GIB,
        },
        "software": {
            "python": "3.11.7",
            "executable": "/job/python",
            "versions": {"torch": "2.5.1", "colossalai": "0.5.0", "transformers": "4.51.3", "NCCL": "2.21.5"},
            "torchrun": "/bin/torchrun",
            "package": {"errors.py": "aa", "logs.py": "bb"},
            "scripts": {"train.py": "cc"},
        },
        "gpus": {"list": [["NVIDIA A800-SXM4-80GB", "550.1", "81920", "10"]] * 8},
        "paths": {"model": {"bytes": 2 * GIB, "files": {"config.json": [10, "dd"]}, "rest": "ee"}},
        "save_folder": {
            "exists": True,
            "sees_probe": True,
            "write_problem": None,
            "flock": "held",
            "free": 900 * GIB,
            "owner_alive": None,
        },
        "network": {
            "interfaces": {"lo": "unknown", "eth0": "up", "ib0": "down"},
            "adapters": [],
            "master_addresses": ["10.0.0.1"],
            "master_problem": None,
            "route": [f"10.0.0.{number}", "eth0"],
        },
    }


def replies() -> list[Reply]:
    return [
        Reply(Host(name), good_report(number), sent=1000.0, received=1000.3)
        for number, name in enumerate(NAMES, start=1)
    ]


def lines(given: list[Reply], question: Question = QUESTION, per_host: int | None = 8, **variables: str) -> list[str]:
    found = all_findings(given, question, PROBE, variables, per_host)
    return [f"{finding.kind}: {finding.text}" for finding in found]


def test_healthy_hosts_have_no_findings():
    assert lines(replies()) == []


# Part, key, value on node2 alone, and the one line.
FAULTS = [
    ("host", "name", "node1", "error: node2: its own name is node1, as on node1; remove one of the lines"),
    ("host", "shell_problem", "export: not found", "error: node2: the login shell /bin/bash does not run"),
    (
        "host",
        "addresses",
        ["127.0.1.1"],
        "warning: node2: its own name node2 has the address 127.0.1.1; training looks",
    ),
    ("host", "name_problem", "not known", "warning: node2: its own name node2 has no address"),
    ("host", "shared_memory", 64 << 20, "warning: node2: /dev/shm has 64 MiB; start the container with --shm-size"),
    ("software", "python", "3.10.1", "error: node2: has Python 3.10.1, but node1, node3 3.11.7"),
    ("software", "torchrun", None, "error: node2: torchrun is not on PATH; activate the environment"),
    (
        "software",
        "package",
        {"errors.py": "xx", "logs.py": "bb"},
        "version of colossal_llama2 than node1, node3 (errors.py)",
    ),
    ("software", "package", None, "error: node2: Python does not find the package colossal_llama2"),
    ("software", "scripts", {"train.py": "xx"}, "version of colossal_llama2 than node1, node3 (train.py)"),
    (
        "gpus",
        "list",
        [["NVIDIA A800-SXM4-80GB", "550.1", "81920", "10"]] * 7,
        "error: node2: has 7 GPUs for 8 processes",
    ),
    (
        "gpus",
        "list",
        [["NVIDIA A100", "550.1", "81920", "10"]] * 8,
        "warning: node2: the GPU is NVIDIA A100, but NVIDIA A8",
    ),
    (
        "gpus",
        "list",
        [["NVIDIA A800-SXM4-80GB", "535.1", "8", "10"]] * 8,
        "warning: node2: the driver is 535.1, but 550.1",
    ),
    (
        "gpus",
        "list",
        [["NVIDIA A800-SXM4-80GB", "550.1", "8", "9000"]] * 8,
        "warning: node2: another program uses GPU 0, 1",
    ),
    ("gpus", "slow", 8.0, "warning: node2: nvidia-smi took more than 8 s; switch persistence mode on"),
    ("paths", "model", None, "error: node2: has no model; copy it to the same path"),
    (
        "paths",
        "model",
        {"bytes": 2, "files": {"config.json": [9, "x"]}},
        "error: node2: model differs from that on node1 (co",
    ),
    (
        "save_folder",
        "sees_probe",
        False,
        "error: node2: --save_dir runs/a: files that this host writes to /job/runs do not",
    ),
    ("save_folder", "write_problem", "Permission denied", "cannot write to /job/runs (Permission denied)"),
    ("save_folder", "flock", "free", "warning: node2: --save_dir runs/a: locks of one host are not seen there"),
    ("save_folder", "free", GIB, "error: node2: --save_dir runs/a: 1.0 GiB are free, less than the model's 2.0 GiB"),
    (
        "save_folder",
        "free",
        9 * GIB,
        "warning: node2: --save_dir runs/a: 9.0 GiB are free, about what one checkpoint takes",
    ),
    ("network", "master_problem", "unknown", "error: node2: cannot find node1 (unknown); write its address"),
    ("network", "master_addresses", ["127.0.0.1"], "error: node2: node1 has the address 127.0.0.1 there"),
    ("network", "adapters", ["mlx5_0"], None),
    (
        "port",
        "problem",
        "timed out",
        "error: node2: cannot connect to node1 on MASTER_PORT=30013 (timed out); open the ports",
    ),
    (
        "gpus",
        "failed",
        "nvidia-smi: Driver/library version mismatch",
        "error: node2: the check of the GPUs failed (nvidia-sm",
    ),
]


@pytest.mark.parametrize("part, key, value, message", FAULTS)
def test_a_fault_of_one_host_is_one_line(part, key, value, message):
    given = replies()
    given[1].report[part][key] = value
    found = lines(given)
    assert len(found) == (1 if message else 0), found
    assert not message or message in found[0]


def test_versions_are_compared_and_the_odd_one_is_named():
    given = replies()
    for name, version in (("torch", "2.4.0"), ("NCCL", None)):
        given[0].report["software"]["versions"][name] = version
    assert [line.partition(";")[0] for line in lines(given)] == [
        "error: node1: has torch 2.4.0, but node2, node3 2.5.1",
        "error: node1: has no NCCL, but node2, node3 2.21.5",
    ]


def test_a_host_without_a_report_is_named_once_and_not_compared():
    given = replies()
    given[1] = Reply(Host("node2"), ssh_problem="does not answer; check", fabric_problem="is unreachable; check")
    assert lines(given) == ["error: node2: does not answer; check"]


@pytest.mark.parametrize(
    "problems, launcher, message",
    [
        ({"ssh_problem": "refuses"}, "colossalai", "error: node2: reached by fabric, but not by ssh: it refuses"),
        (
            {"fabric_problem": "refuses"},
            "colossalai",
            "reached by ssh, but not by fabric, which colossalai run uses: it ref",
        ),
        ({"ssh_problem": "refuses"}, "ssh", "error: node2: refuses"),
    ],
)
def test_which_of_ssh_and_fabric_fails_is_named(problems, launcher, message):
    given = replies()
    given[1] = dataclasses.replace(given[1], **problems)
    (found,) = lines(given, dataclasses.replace(QUESTION, launcher=launcher))
    assert message in found


def test_this_host_needs_no_ssh_to_itself():
    given = replies()
    given[0] = dataclasses.replace(given[0], needs_ssh=False, ssh_problem="refuses", fabric_problem="refuses")
    assert lines(given) == ["warning: node1: refuses; it is this host, so the launch itself does not need it"]


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"NCCL_DEBUG": "INFO", "PATH": "/bin", "PS1": "$ "}, None),
        ({"NCCL_DEBUG_FILE": 'a"b'}, "error: NCCL_DEBUG_FILE: a shell would change the value"),
        (
            {"HF_TOKEN": "abc", "WANDB_API_KEY": "d"},
            "warning: HF_TOKEN, WANDB_API_KEY: colossalai run by hand shows it",
        ),
        ({"UID": "0", "BASH_FUNC_f%%": "() { :; }"}, "warning: BASH_FUNC_f%%, UID: no shell sets it"),
    ],
)
def test_variables_that_colossalai_cannot_pass_are_named(variables, message):
    found = [f"{finding.kind}: {finding.text}" for finding in variable_findings(variables)]
    assert (message is None and found == []) or (len(found) == 1 and found[0].startswith(message))


def test_a_part_that_hangs_or_a_missing_folder_is_named():
    given = replies()
    del given[0].report["save_folder"]
    del given[1].report["paths"]
    given[2].report = {"missing": "folder"}
    assert [line.partition(";")[0] for line in lines(given)] == [
        "error: node3: has no folder /job",
        "error: node1: the check of --save_dir did not end within 10 s",
        "warning: node2: comparing model and data took more than 10 s and was left out",
    ]


@pytest.mark.parametrize("ahead, message", [(60, "60 s ahead of"), (-60, "60 s behind"), (4, None)])
def test_clocks_are_compared(ahead, message):
    given = replies()
    for name in ("started", "ended"):
        given[1].report[name] += ahead
    found = lines(given)
    assert (message is None and found == []) or (len(found) == 1 and message in found[0])


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"GLOO_SOCKET_IFNAME": "eth0"}, None),
        ({"GLOO_SOCKET_IFNAME": "eth"}, "GLOO_SOCKET_IFNAME=eth: no eth there; it has lo, eth0, ib0"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "GLOO_SOCKET_IFNAME=ib0: ib0 is down"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth: no eth there"),
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, None),
        ({"NCCL_SOCKET_IFNAME": "bond0,eth0"}, None),
        ({"NCCL_SOCKET_IFNAME": "^eth,ib"}, "it excludes every interface"),
        ({"NCCL_IB_HCA": "mlx5_1:1"}, "NCCL_IB_HCA=mlx5_1:1: no mlx5_1 there; it has no InfiniBand adapter"),
        ({"NCCL_IB_HCA": "mlx5_1:1", "NCCL_IB_DISABLE": "1"}, None),
    ],
)
def test_interfaces_that_variables_name_have_to_exist(variables, message):
    found = lines(replies(), **variables)
    assert (message is None and found == []) or (len(found) == 3 and message in found[0])


def test_a_lock_is_explained_by_what_its_host_reports():
    question = dataclasses.replace(QUESTION, lock_owner={"host": "node2", "pid": 7, "since": "noon", "ending": False})
    for alive, message in (
        (True, "error: --save_dir runs/a: process 7 on node2 since noon is writing to it"),
        (False, "warning: --save_dir runs/a: .lock was left by process 7 on node2 since noon, which has died"),
        (None, "warning: --save_dir runs/a: .lock is of process 7 on node2 since noon, none of these hosts"),
    ):
        given = replies()
        given[1].report["save_folder"]["owner_alive"] = alive
        (found,) = lines(given, question)
        assert found.startswith(message)


def test_a_lock_of_this_host_before_it_was_started_again_is_not_judged_by_its_process_id(tmp_path, monkeypatch):
    lock = tmp_path / ".lock"
    lock.touch()
    own = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": lock_record.kernel_id(), "processes": None}
    assert host_report._is_alive(own, lock) is False  # flock shows that nobody has it

    def missing(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(host_report.fcntl, "flock", missing)
    assert host_report._is_alive(own, lock) is True
    assert host_report._is_alive({**own, "kernel": "an earlier one"}, lock) is None


def test_a_taken_port_is_named_once():
    given = replies()
    for reply in given:
        reply.report["port"]["problem"] = "Address already in use" if reply is given[0] else "Connection refused"
    (found,) = lines(given)
    assert found.startswith("error: node1: MASTER_PORT=30013 cannot be used (Address already in use); see who has it")


def test_a_host_that_could_not_call_in_time_is_not_called_blocked():
    given = replies()
    given[1].report["port"] = {"problem": "Connection refused", "from": 1004.0, "until": 1009.0}
    (found,) = lines(given)
    assert found.startswith("warning: node2: could not be asked to connect to node1 on MASTER_PORT=30013, since ssh")


@pytest.mark.parametrize(
    "trouble, message",
    [
        (
            "me@node2: Permission denied (publickey).",
            "refuses this user's key (me@node2: Permission denied (publickey)); ",
        ),
        ("AuthenticationException: Authentication failed.", "ssh-copy-id node2 from here"),
        (
            "Host key verification failed.",
            "has an unknown or changed host key (Host key verification failed); connect once",
        ),
        ("ssh: connect to host node2 port 22: Connection refused", "accepts no connection on ssh's port"),
        ("ssh: connect to host node2 port 22: No route to host", "does not answer within 5 s"),
        ("PasswordRequiredException: private key file is encrypted", "load it into ssh-agent (ssh-add)"),
        ("something new\n", "cannot be reached (something new); try ssh node2 by hand"),
        ("", "cannot be reached (no message)"),
    ],
)
def test_errors_of_ssh_are_explained(trouble, message):
    assert message in remote.explained(trouble, Host("node2"))


def test_files_are_compared_by_size_and_small_ones_by_contents(tmp_path):
    (tmp_path / "small").write_text("a")
    (tmp_path / "large").write_bytes(bytes(100))
    os.mkfifo(tmp_path / "pipe")
    found = host_report.paths({"paths": [str(tmp_path), str(tmp_path / "none")], "hash_bytes": 50})
    files = found[str(tmp_path)]["files"]
    assert files["large"] == [100, None] and files["pipe"] == [0, None]
    assert files["small"][0] == 1 and len(files["small"][1]) == 16
    assert found[str(tmp_path / "none")] is None


def test_a_part_that_hangs_does_not_delay_the_report(monkeypatch):
    parts = {"slow": lambda request: time.sleep(30), "quick": lambda request: 1, "wrong": lambda request: 1 / 0}
    monkeypatch.setattr(host_report, "PARTS", parts)
    report = host_report.report({"seconds": 0.1, "path_seconds": 0.1})
    assert report["quick"] == 1 and "slow" not in report and "ZeroDivisionError" in report["wrong"]["failed"]


def test_the_last_caller_of_the_port_gets_its_answer():
    """The first host's process ends when all have called, but not before they have been answered."""
    with socket.create_server(("", 0)) as free:
        number = free.getsockname()[1]
    request = {
        "seconds": 10,
        "path_seconds": 10,
        "port": {"number": number, "callers": 1, "token": "secret", "seconds": 5},
    }
    program = "from colossal_llama2.cluster.doctor import host_report as r; r.PARTS = {'port': r.port}; r.main(%r)"
    process = subprocess.Popen([sys.executable, "-c", program % json.dumps(request)], cwd=ROOT, stdout=subprocess.PIPE)
    assert host_report._call("localhost", number, "secret", time.monotonic() + 10) is None
    output, _ = process.communicate(timeout=10)
    assert json.loads(output.decode().removeprefix(host_report.MARK))["port"]["problem"] is None


def test_another_program_on_the_port_is_recognized():
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"SSH-2.0"), daemon=True).start()
        number = server.getsockname()[1]
        problem = host_report._call("localhost", number, "secret", time.monotonic() + 0.3)
    assert problem in ("another program answers there", "timed out")


@pytest.mark.parametrize("shell, is_fine", [("/bin/sh", True), ("/bin/false", False), ("/no/shell", False)])
def test_a_login_shell_has_to_run_what_the_launcher_sends(shell, is_fine):
    assert (host_report._shell_problem(shell) is None) == is_fine


@pytest.fixture
def job(tmp_path):
    """A folder to launch from, with what stands for a model and data."""
    folder = tmp_path / "job with $ and 'quotes'"
    (folder / "model").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    for name in ("train.py", "train_sft.py", "colossal_llama2"):
        (folder / name).symlink_to(ROOT / name)
    return folder


SCRIPT = "train.py --pretrained model --dataset zh=data --save_dir runs/a".split()


@pytest.fixture
def run_doctor(job, bare_environment):
    """Runs the command in `job`, where only the standard library and the package's light parts can be imported."""

    def run(*words: str) -> subprocess.CompletedProcess:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "colossal_llama2.train.doctor", "--master_port", str(port), *words]
        env = {**bare_environment, "PATH": path, "COLUMNS": "80"}
        return subprocess.run(command, cwd=job, env=env, capture_output=True, text=True, timeout=60)

    return run


def test_this_host_alone_is_checked_and_nothing_is_left(run_doctor, job):
    before = sorted(job.rglob("*"))
    process = run_doctor(*SCRIPT)
    assert process.returncode == 0, process.stderr
    head, row, summary = process.stdout.splitlines()
    assert head.split()[:3] == ["host", "result", "Python"] and row.split()[:2] == [socket.gethostname(), "ok"]
    assert max(map(len, (head, row))) <= 80
    assert summary.startswith("doctor: 1 host: no fault found (")
    assert sorted(job.rglob("*")) == before


def test_faults_of_this_host_are_lines_on_stderr_and_exit_code_2(run_doctor, job):
    (job / "model" / "config.json").unlink()
    (job / "model").rmdir()
    (job / "runs" / "a").mkdir(parents=True)
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": "noon"}
    (job / "runs" / "a" / ".lock").write_text(json.dumps(owner))
    with open(job / "runs" / "a" / ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = run_doctor("--quick", *SCRIPT)
    assert process.returncode == 2 and process.stdout == ""
    missing, locked, summary = process.stderr.splitlines()
    assert missing == f"doctor: error: {socket.gethostname()}: has no model; check the flag"
    assert f"error: --save_dir runs/a: process {os.getpid()} on {socket.gethostname()} since noon is writing" in locked
    assert summary.startswith("doctor: 1 host: 2 errors (")


def test_a_taken_port_is_an_error(run_doctor):
    with socket.create_server(("", 0)) as server:
        process = run_doctor("--quick", "--master_port", str(server.getsockname()[1]))
    assert process.returncode == 2 and "cannot be used (Address already in use)" in process.stderr


def test_mistakes_in_the_hostfile_and_in_flags_end_before_any_host_is_asked(run_doctor, job):
    (job / "hosts").write_text("node1,node2\r\nlocalhost:9\r\n")
    process = run_doctor("--hostfile", "hosts")
    assert process.returncode == 2 and process.stdout == ""
    first, second = process.stderr.splitlines()
    assert first.startswith("doctor: error: hosts:1: 'node1,node2' is not one host")
    assert second.startswith("doctor: error: hosts:2: 'localhost:9': 9 is an unlikely port of ssh")
    for words, message in (
        (["--dist_seconds", "0"], "--dist_seconds"),
        (["--launcher", "slurm"], "this is not a Slurm job; submit it with sbatch train.sbatch"),
        (["--launcher", "slurm", "--hostfile", "hosts"], "--hostfile has no effect with --launcher slurm"),
        (["--launcher", "slurm", "--dist"], "--launcher slurm uses none; give --launcher torchrun and a --hostfile"),
        (["train.py", "--dataset", "a"], "--pretrained"),
    ):
        process = run_doctor(*words)
        assert process.returncode == 2 and len(process.stderr.splitlines()) == 1 and message in process.stderr


@pytest.mark.parametrize(
    "program, message",
    [
        (None, "cannot be asked, since srun does not run here (No such file or directory); mend Slurm's commands"),
        ("trap '' TERM; echo stuck >&2; sleep 30", "runs nothing by srun within 1 s (stuck); look at sinfo"),
        ("cat > input; echo it ran; env > variables", None),
        (
            "echo 'srun: error: Unable to create step: Invalid node name' >&2; exit 1",
            "runs nothing by srun (srun: error: Unable to create step: Invalid node name); look at sinfo",
        ),
        (
            "echo 'srun: Step creation temporarily disabled, retrying' >&2; exec sleep 30",
            "runs nothing by srun within 1 s (srun: Step creation temporarily disabled, retrying); look at sinfo",
        ),
    ],
    ids=["absent", "cannot be ended", "runs", "refuses", "waits"],
)
def test_a_node_of_a_slurm_job_is_asked_by_srun(program, message, tmp_path, monkeypatch):
    """A script of the name is in place of srun, whose waiting and refusals it repeats."""
    if program is not None:
        (tmp_path / "srun").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin; cd {tmp_path}; echo $* > words\n{program}\n")
        (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, value in {
        "SLURM_JOB_ID": "7",
        "SLURM_GPUS": "16",
        "SLURM_NTASKS": "16",
        "SLURM_GPUS_PER_NODE": "8",
    }.items():
        monkeypatch.setenv(name, value)
    answer = remote.by_srun(Host("node2"), "echo hello\n", seconds=1 if message and "within" in message else 20)
    if message is not None:
        assert answer.output is None and answer.problem.startswith(message)
        return
    assert answer == Answer("it ran\n") and (tmp_path / "input").read_text() == "echo hello\n"
    assert "--nodelist=node2" in (tmp_path / "words").read_text()
    # What the job has asked for all nodes is not asked of one.
    variables = (tmp_path / "variables").read_text().splitlines()
    assert "SLURM_GPUS_PER_NODE=8" in variables and "SLURM_JOB_ID=7" in variables
    assert not any(line.startswith(("SLURM_GPUS=", "SLURM_NTASKS=")) for line in variables)


def test_the_table_fits_80_columns():
    given = replies()
    rows = doctor.table_rows(given, all_findings(given, QUESTION, PROBE, {}, 8))
    assert rows[1] == ["node1", "ok", "3.11.7", "2.5.1", "0.5.0", "8 A800", "eth0", "900 GiB"]
    from colossal_llama2.tables import table_lines

    assert max(map(len, table_lines(rows, align="l"))) <= 80


@pytest.mark.parametrize(
    "program, message",
    [
        ("exec sleep 30", "rank 0: did not start within 1 s; run python"),
        (
            'echo \'MARK{"rank": 0, "stage": "imported"}\'; sleep 30',
            "rank 0: did not connect to localhost on MASTER_PORT=30013 within 1 s; open that port",
        ),
        ('echo \'MARK{"rank": 0, "problem": "oh"}\'; exit 1', "rank 0: did not start (oh); run python"),
    ],
)
def test_a_rank_that_gets_stuck_is_named_with_where(program, message, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program.replace('MARK', exchange.WORKER_MARK)}\n")
    python.chmod(0o755)
    question = dataclasses.replace(survey.here("ssh"), python=str(python), port=30013)
    seconds = 5 if "problem" in program else 1
    rows, found = exchange.exchange([], question, 1, seconds=seconds, variables={})
    assert rows == [] and len(found) == 1 and message in found[0].text


def test_a_slow_link_is_named_by_the_rank_that_receives():
    rates = (1.1e9, 1.2e7, 1.0e9)
    ranks = [
        exchange.Rank(number, Host(name), figures={"gloo": {"receive": rate}})
        for number, (name, rate) in enumerate(zip(NAMES, rates, strict=True))
    ]
    (found,) = exchange._slow_links(ranks)
    assert found.text.startswith("node2: rank 1: receives 12 MB/s from node1 over gloo, others 1.0 GB/s; check cable")


@pytest.mark.slow
def test_two_ranks_exchange_data_and_report_what_they_measured(job):
    """Real processes with PyTorch, on this host."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    words = ["--dist", "--dist_seconds", "120", "--nproc_per_node", "2", "--master_port", str(port)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.run(
        [sys.executable, "-m", "colossal_llama2.train.doctor", *words],
        cwd=job,
        env={**os.environ, "PATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    head, first, second = process.stdout.splitlines()[3:6]
    assert head.split()[:5] == ["rank", "host", "network", "interface", "latency"]
    for number, row in enumerate((first, second)):
        assert row.split()[:4] == [str(number), socket.gethostname(), "gloo", "lo"] and row.count("B/s") == 2
