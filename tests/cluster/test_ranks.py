"""Ranks on several hosts: what happens to a run when a rank, a host, its launcher or its storage goes away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.connections import is_connected
from tests.test_launcher import parent_of
from tests.test_run_lock import OTHER
from tests.training_jobs import write_short_documents

# Under a load of other tests, the imports of two ranks take a minute.
START_SECONDS = 240.0
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "-1", "PYTHONDONTWRITEBYTECODE": "1"}
# A host whose file system has no flock, and which knows only itself: another kernel. Short times.
APART = """
import fcntl, socket
from colossal_llama2.train.run_folder import lock_claim, lock_holder, lock_record

def missing(*args):
    raise OSError("no locks on this file system")

fcntl.flock = missing
lock_record.kernel_id = lambda: f"kernel of {socket.gethostname()}"
lock_claim.STALE_SECONDS, lock_holder.BEAT_SECONDS, lock_holder.FRESH_SECONDS = 3.0, 0.3, 1.0
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer_dir, model_dir):
    """Of a run that lasts longer than any test."""
    part = write_short_documents(tmp_path_factory.mktemp("prepared"), tokenizer_dir)
    words = ["--pretrained", model_dir, "--dataset", part, "--max_length", 64, "--plugin", "zero2"]
    return [*words, "--mixed_precision", "fp32", "--dist_timeout", 60, "--num_epochs", 400]


class Job:
    """Processes of a run on the hosts of a cluster, with a file of output for each."""

    def __init__(self, cluster, folder, flags):
        self.save_dir, self._cluster, self._folder = folder / "save", cluster, folder
        places = ["--save_dir", self.save_dir, "--tensorboard_dir", folder / "tb", "--config_file", folder / "config"]
        self._words = [*flags, *places]
        self.processes = []

    def start(self, host, launcher, *flags, **environment):
        """Start train.py on a host under a launcher; returns the process and a function that reads its output."""
        output = self._folder / f"output-{len(self.processes)}"
        with output.open("wb") as file:
            words = [*launcher, ROOT / "train.py", *self._words, *flags]
            process = self._cluster.popen(
                host,
                words,
                cwd=ROOT,
                env={**ENVIRONMENT, **environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.processes.append(process)
        return process, lambda: output.read_text(errors="replace")

    def wait_for(self, name, *outputs):
        """Return when this file of the save folder exists."""
        deadline = time.monotonic() + START_SECONDS
        while not (self.save_dir / name).exists():
            assert time.monotonic() < deadline, "\n".join(output() for output in outputs)
            time.sleep(0.05)

    def ranks(self):
        """The processes of train.py, by rank, as this machine counts them."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                rank = [word[5:] for word in variables if word.startswith(b"RANK=")]
                if rank and os.fsencode(self.save_dir) in words and b"-u" in words[:2]:
                    found[int(rank[0])] = int(entry.name)
        return found


def torchrun(*, restarts=0):
    """Of two hosts, with one rank each."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--max_restarts"]
    return [*words, restarts, "--rdzv_backend", "c10d", "--rdzv_endpoint", "node1:29500", "--rdzv_id", "job"]


ALONE = [sys.executable, "-u"]


@pytest.fixture
def job(make_cluster, tmp_path, flags):
    cluster = make_cluster(2)
    job = Job(cluster, tmp_path, flags)
    job.cluster = cluster
    yield job
    for process in job.processes:
        process.kill()
        process.wait()


def wait_for_line(output, words, seconds=START_SECONDS):
    deadline = time.monotonic() + seconds
    while words not in output():
        assert time.monotonic() < deadline, output()
        time.sleep(0.05)


def test_of_two_hosts_that_start_at_once_one_writes(make_cluster, tmp_path):
    """With flock and on a file system without it, several times."""
    cluster = make_cluster(2)
    script = tmp_path / "other.py"
    script.write_text(OTHER)
    for number, options in enumerate([(), ("no-flock",), (), ("no-flock",)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs = [
            cluster.popen(
                host,
                [sys.executable, script, folder, f"node{host}", *options],
                env={**ENVIRONMENT, "PYTHONPATH": ROOT},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for host in (1, 2)
        ]
        deadline = time.monotonic() + 60.0
        while all(run.poll() is None for run in runs) or not (folder / "log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (folder / "stop").touch()
        outputs = [run.communicate(timeout=30)[0] for run in runs]
        assert sorted(run.returncode for run in runs) == [0, 2], outputs
        winner = next(f"node{host}" for host, run in enumerate(runs, 1) if run.returncode == 0)
        assert set((folder / "log").read_text().split()) == {winner}
        assert any(f"on {winner} since" in output and "is writing to it" in output for output in outputs), outputs


def test_the_lock_of_a_killed_host_does_not_stop_a_run_on_another(job):
    """The names of the hosts differ, the lock file stays, and the file system's flock shows that its holder is dead."""
    _, output = job.start(2, ALONE, "--save_interval", 2)
    job.wait_for("epoch-0_step-2", output)
    job.cluster.kill(2)
    owner = json.loads((job.save_dir / ".lock").read_text())
    assert owner["host"] == "node2"
    process, output = job.start(1, ALONE, "--resume", "auto", "--save_interval", 2)
    wait_for_line(output, "Resumed ")
    assert f"Replacing {job.save_dir}/.lock of process {owner['pid']} on node2" in output()


def test_a_host_that_was_cut_off_and_comes_back_writes_nothing(job, tmp_path):
    """Its storage does not answer: here, it is suspended. Another host takes over and finishes the run."""
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "sitecustomize.py").write_text(APART)
    path = {"PYTHONPATH": f"{tmp_path}/apart:{ROOT}"}
    more = ["--resume", "auto", "--max_steps", 60, "--save_interval", 2]
    first, output = job.start(1, ALONE, *more, **path)
    job.wait_for("epoch-0_step-2", output)
    (pid,) = writers(job)
    os.kill(pid, signal.SIGSTOP)
    second, other = job.start(2, ALONE, *more, **path)
    wait_for_line(other, "Resumed ")
    before = {
        entry.name: entry.stat().st_mtime_ns for entry in job.save_dir.iterdir() if entry.name.startswith("epoch")
    }
    # nsenter, which waits for it, has stopped with it.
    for stopped in (pid, first.pid):
        os.kill(stopped, signal.SIGCONT)
    assert first.wait(60) == 1, output()
    assert "has taken over the lock of this process on node1" in output() and "Traceback" not in output()
    assert second.wait(START_SECONDS) == 0, other()
    # No checkpoint was written twice, and each step is in the log once.
    assert all((job.save_dir / name).stat().st_mtime_ns == changed for name, changed in before.items())
    steps = [json.loads(line) for line in (job.save_dir / "train_log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if "loss" in record] == list(range(1, 61))


def writers(job):
    """The processes of a run without a launcher, as this machine counts them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(job.save_dir) in words and words[1:2] == [b"-u"]:
                found.append(int(entry.name))
    return found


def test_names_that_resolve_to_a_loopback_address_and_a_dead_rank_0(job):
    """As Debian writes /etc/hosts. Then torchrun starts the ranks again after the death of rank 0."""
    for host in (1, 2):
        names = "".join(f"{job.cluster.address(i)} node{i}\n" for i in (1, 2) if i != host)
        job.cluster.set_hosts(host, f"127.0.0.1 localhost\n127.0.1.1 node{host}\n{names}")
    more = ["--resume", "auto", "--save_interval", 2]
    outputs = [job.start(host, torchrun(restarts=2), *more)[1] for host in (1, 2)]
    job.wait_for("epoch-0_step-2", *outputs)
    found = outputs[0]() + outputs[1]()
    assert "(GLOO_SOCKET_IFNAME): eth0 on node1, eth0 on node2" in found, found
    os.kill(job.ranks()[0], signal.SIGKILL)
    deadline = time.monotonic() + START_SECONDS
    while "Resumed " not in outputs[0]() + outputs[1]():
        assert time.monotonic() < deadline, outputs[0]() + outputs[1]()
        time.sleep(0.05)
    # torchrun is killed: its ranks save and end, and the other host's ranks with them.
    launchers = [process.pid for process in job.processes]
    for pid in launchers:
        for child in children(pid):
            os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 60.0
    while job.ranks():
        assert time.monotonic() < deadline, outputs[0]() + outputs[1]()
        time.sleep(0.05)
    assert not (job.save_dir / ".lock").exists()


def children(pid):
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_rank_that_dies_while_it_starts_ends_the_others(job):
    """Before PyTorch is imported; torchrun itself does not notice what happens on other hosts."""
    outputs = [job.start(host, torchrun(), "--max_steps", 2)[1] for host in (1, 2)]
    deadline = time.monotonic() + START_SECONDS
    while len(ranks := job.ranks()) < 2 or not all(map(is_connected, ranks.values())):
        assert time.monotonic() < deadline, outputs[0]() + outputs[1]()
        time.sleep(0.02)
    # All are connected within this time, to each other as well, and import PyTorch for longer.
    time.sleep(1.0)
    begun = time.monotonic()
    os.kill(job.ranks()[1], signal.SIGKILL)
    while job.ranks():
        assert time.monotonic() < begun + 30.0, outputs[0]() + outputs[1]()
        time.sleep(0.05)
    found = outputs[0]() + outputs[1]()
    assert " died; nothing was trained, start again" in found, found
    # Rank 0 may have locked the folder for its save.
    assert not job.save_dir.exists() or not list(job.save_dir.iterdir()), found


def test_ranks_of_colossalai_run_end_with_its_connection(job, tmp_path):
    """The ssh connection to node2 ends there. colossalai run itself does not notice it."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1\nnode2\n")
    launcher = [Path(sys.executable).with_name("colossalai"), "run", "--hostfile", hostfile, "--nproc_per_node", 1]
    _, output = job.start(1, [*launcher, "--master_addr", "node1"], "--save_interval", 2)
    job.wait_for("epoch-0_step-2", output)
    # The rank's parent is torchrun, whose parent is the server of the connection.
    server = parent_of(parent_of(job.ranks()[1]))
    assert Path(f"/proc/{server}/comm").read_text().startswith("sshd")
    os.kill(server, signal.SIGKILL)
    deadline = time.monotonic() + 60.0
    while job.ranks():
        assert time.monotonic() < deadline, output()
        time.sleep(0.05)
    assert not (job.save_dir / ".lock").exists() and "Traceback" not in output()


def test_another_version_of_the_package_on_one_host_is_refused(job, tmp_path):
    changed = tmp_path / "adam.py"
    changed.write_text((ROOT / "colossal_llama2" / "engine" / "adam.py").read_text() + "# another version\n")
    job.cluster.replace(2, ROOT / "colossal_llama2" / "engine" / "adam.py", changed)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    started = [job.start(host, ALONE, "--max_steps", 2, **variables, RANK=str(host - 1)) for host in (1, 2)]
    for process, output in started:
        assert process.wait(START_SECONDS) == 2, output()
        line = [line for line in output().splitlines() if ": error: " in line]
        assert len(line) == 1 and "Traceback" not in output(), output()
        assert "the code of colossal_llama2: node2 has " in line[0] and "(engine/adam.py differs)" in line[0]
    assert not job.save_dir.exists()


def test_an_interface_that_does_not_exist_is_refused_on_all_hosts(job):
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}
    first, output = job.start(1, ALONE, "--max_steps", 2, **variables, RANK="0")
    second, other = job.start(2, ALONE, "--max_steps", 2, **variables, RANK="1", GLOO_SOCKET_IFNAME="eth9")
    assert second.wait(60) == 2 and first.wait(60) == 1, output() + other()
    line = "GLOO_SOCKET_IFNAME=eth9: node2 has no network interface eth9, it has eth0, lo; name one of them"
    assert line in other() and line in output() and "Traceback" not in output() + other()
