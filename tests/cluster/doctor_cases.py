"""The doctor on a good cluster and on broken ones: each fault has to be named by exactly one line.

bash tests/cluster/run.sh --launcher doctor               # all, about 2 s each
bash tests/cluster/run.sh --launcher doctor --only tcsh   # those whose names contain this
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import PATH, Cluster
from tests.conftest import ROOT

PORT = 30013
# By name or by address, the way users write them.
HOSTS = ("node1", "node2", "10.201.0.3")
FLAGS = "train.py --pretrained model --dataset zh=arrow/part-00000 --save_dir runs/first".split()
VENV = Path(sys.executable).parent
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))


@dataclass
class Place:
    """A cluster with a folder for the launch, and what a case may change.

    Attributes:
        variables: added to the environment of the doctor.
        flags: replaces the doctor's own flags.
    """

    cluster: Cluster
    folder: Path
    scratch: Path
    variables: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)

    def other(self, path: Path, content: str) -> None:
        """On host 2, this file has another content."""
        file = self.scratch / path.name
        file.write_text(content)
        self.cluster.replace(2, path, file)

    def shell(self, host: int, command: str) -> None:
        """Run a command on a host; it must succeed."""
        done = self.cluster.run(host, ["bash", "-c", command])
        assert done.returncode == 0, done.stderr

    def hosts_file(self, host: int, *, own: str) -> None:
        """Write the host's /etc/hosts with another address for itself."""
        lines = [f"{own if i == host else Cluster.address(i)} node{i}" for i in range(1, len(HOSTS) + 1)]
        self.cluster.set_hosts(host, "\n".join(["127.0.0.1 localhost", *lines, ""]))

    def background(self, host: int, program: str) -> None:
        """Start a Python program on a host, and wait until it has printed a line."""
        words = [sys.executable, "-c", program]
        process = self.cluster.popen(host, words, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline()


@dataclass(frozen=True)
class Case:
    """One broken cluster: how it is broken, and the one line that is expected.

    Attributes:
        is_quick: whether it belongs to the short selection of tests/cluster/run.sh.
    """

    name: str
    breaks: Callable[[Place], object]
    expected: str
    kind: str = "error"
    is_quick: bool = False


def break_ssh_library(place: Place) -> None:
    """host 2 accepts only a key exchange that OpenSSH has and paramiko has not."""
    sshd = shutil.which("sshd", path=PATH)
    config = place.cluster.folder / "node2" / "sshd_config"
    place.cluster.stop_sshd(2)
    place.shell(2, f"sleep 0.2; {sshd} -f {config} -oKexAlgorithms=sntrup761x25519-sha512@openssh.com")


def change_host_key(place: Place) -> None:
    """The known key of host 2 is that of host 3."""
    path = place.cluster.home(1) / ".ssh" / "known_hosts"
    lines = path.read_text().splitlines()
    key = next(line.split(" ", 1)[1] for line in lines if line.startswith("node3"))
    path.write_text("".join((f"node2,10.201.0.2 {key}" if line.startswith("node2") else line) + "\n" for line in lines))


def lock_folder(place: Place, pid: int) -> None:
    """runs/first has a lock of a process on host 2."""
    (place.folder / "runs" / "first").mkdir(parents=True)
    text = f'{{"host": "node2", "pid": {pid}, "since": "2026-01-01 00:00:00"}}'
    (place.folder / "runs" / "first" / ".lock").write_text(text)


HOLDER = """
import fcntl, json, os, time
lock = open("runs/first/.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
json.dump({"host": "node2", "pid": os.getpid(), "since": "noon"}, lock)
lock.flush()
print("up", flush=True)
time.sleep(60)
"""


def hold_folder(place: Place) -> None:
    """A process on host 2 holds the lock of runs/first."""
    (place.folder / "runs" / "first").mkdir(parents=True)
    place.background(2, HOLDER)


def write_hostfile(place: Place, text: str) -> None:
    """Replace the hostfile."""
    (place.folder / "hostfile").write_text(text)


SERVER = f"import socket, time; s = socket.create_server(('', {PORT})); print('up', flush=True); time.sleep(60)"
MOUNT_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'
# Answers from this port to host 2 get lost.
DROP = f"ip rule add to 10.201.0.2 ipproto tcp sport {PORT} blackhole"
# Host 2 reaches ssh and MASTER_PORT of the others, but none of the ports that gloo chooses, as behind a firewall.
DROP_GLOO = "ip rule add ipproto tcp dport 30014-65534 sport 30014-65534 to 10.201.0.0/24 blackhole"
SLOW = "tc qdisc add dev eth0 root tbf rate 20mbit burst 64kb latency 50ms"
CASES = (
    Case("good", lambda p: None, "", is_quick=True),
    Case(
        "good, CRLF and slots", lambda p: write_hostfile(p, "\ufeffnode1 slots=1\r\nnode2\r\n# x\r\n10.201.0.3\r\n"), ""
    ),
    Case("host off", lambda p: p.cluster.kill(2), "node2: does not answer within 5 s"),
    Case("cable out", lambda p: p.cluster.cut(2), "node2: does not answer within 5 s"),
    Case("no sshd", lambda p: p.cluster.stop_sshd(2), "node2: accepts no connection on ssh's port (.*refused.*)"),
    Case("no sshd here", lambda p: p.cluster.stop_sshd(1), "node1: accepts no .*this host, so", "warning"),
    Case(
        "key refused",
        lambda p: p.cluster.authorize(2, False),
        "node2: refuses this user's key .*ssh-copy-id node2",
        is_quick=True,
    ),
    Case("tcsh", lambda p: p.cluster.set_shell(2, "/usr/bin/tcsh"), "node2: the login shell /usr/bin/tcsh .*chsh"),
    Case(
        "no login",
        lambda p: p.cluster.set_shell(2, "/usr/sbin/nologin"),
        "node2: has a login shell that refuses logins",
    ),
    Case(
        "host key changed",
        change_host_key,
        "node2: reached by fabric, but not by ssh: it has an unknown or changed host key",
    ),
    Case("fabric only", break_ssh_library, "node2: reached by ssh, but not by fabric, .* LAUNCHER=torchrun"),
    Case(
        "no folder", lambda p: p.cluster.hide(2, p.folder.parent), "node2: has no folder .*/place; put the same files"
    ),
    Case("no venv", lambda p: p.cluster.hide(2, VENV), "node2: has no .*/bin/python"),
    Case(
        "other package version",
        lambda p: p.other(ROOT / "colossal_llama2" / "engine" / "adam.py", "# other betas\n"),
        "node2: has another version of colossal_llama2 than node1, 10.201.0.3 .engine/adam.py.",
    ),
    Case(
        "other torch",
        lambda p: p.other(next(SITE.glob("torch-*.dist-info")) / "METADATA", "Name: torch\nVersion: 2.4.0\n"),
        "node2: has torch 2.4.0, but node1, 10.201.0.3 2.",
    ),
    Case(
        "Debian's own name",
        lambda p: p.hosts_file(2, own="127.0.1.1"),
        "node2: its own name node2 has the address 127.0.1.1; training looks for another itself",
        "warning",
    ),
    Case("one name twice", lambda p: p.shell(3, "hostname node2"), "10.201.0.3: its own name is node2, as on node2"),
    Case(
        "port in use",
        lambda p: p.background(1, SERVER),
        f"node1: MASTER_PORT={PORT} cannot be used .Address already in",
    ),
    Case(
        "port blocked",
        lambda p: p.shell(1, DROP),
        f"node2: cannot connect to node1 on MASTER_PORT={PORT} .timed out.",
    ),
    Case(
        "save_dir apart",
        lambda p: p.cluster.hide(2, p.folder / "runs"),
        "node2: --save_dir runs/first: files .* do not",
    ),
    Case(
        "save_dir read-only",
        lambda p: p.shell(2, MOUNT_READ_ONLY.replace("$0", str(p.folder / "runs"))),
        "node2: --save_dir runs/first: cannot write to .*Read-only file system",
    ),
    Case(
        "other model", lambda p: p.other(p.folder / "model" / "config.json", "{}"), "node2: model differs .*config.json"
    ),
    Case("no data", lambda p: p.cluster.hide(2, p.folder / "arrow"), "node2: has no arrow/part-00000; copy it"),
    Case("locked by a run", hold_folder, "--save_dir runs/first: process .* on node2 since noon is writing to it"),
    Case("lock of a dead run, its process number in use", lambda p: lock_folder(p, 1), ".*which has died", "warning"),
    Case("lock of a dead run", lambda p: lock_folder(p, 99999), "--save_dir runs/first: .lock was left by", "warning"),
    Case(
        "no such interface",
        lambda p: (
            p.variables.update(GLOO_SOCKET_IFNAME="eth0"),
            p.shell(3, "ip link set eth0 down; ip link set eth0 name eth1; ip link set eth1 up"),
        ),
        "10.201.0.3: GLOO_SOCKET_IFNAME=eth0: no eth0 there; it has lo, eth1",
    ),
    Case(
        "one host twice",
        lambda p: write_hostfile(p, "node1\nnode2\n10.201.0.2\n"),
        "hostfile:3: 10.201.0.2 and node2 of",
    ),
    Case("unknown host", lambda p: write_hostfile(p, "node1\nnode9\n"), "hostfile:2: this host cannot find node9"),
    Case(
        "variable with a quote",
        lambda p: p.variables.update(NCCL_DEBUG_FILE='a"b'),
        "NCCL_DEBUG_FILE: a shell would",
    ),
    Case("secret", lambda p: p.variables.update(HF_TOKEN="abc"), "HF_TOKEN: colossalai run by hand", "warning"),
    Case("dist", lambda p: p.flags.extend(["--dist", "--dist_seconds", "60"]), ""),
    Case(
        "dist, Debian's own name",
        lambda p: (p.flags.extend(["--dist", "--dist_seconds", "60"]), p.hosts_file(1, own="127.0.1.1")),
        "node1: its own name node1 has the address 127.0.1.1; training looks for another itself",
        "warning",
    ),
    Case(
        "dist, slow link",
        lambda p: (p.flags.extend(["--dist", "--dist_seconds", "60"]), p.shell(2, SLOW)),
        "10.201.0.3: rank 2: receives .* from node2 over gloo, others .*; check cable",
        "warning",
    ),
    Case(
        "dist, ports blocked",
        lambda p: (p.flags.extend(["--dist", "--dist_seconds", "45"]), p.shell(2, DROP_GLOO)),
        "node2: rank 1: ",
    ),
)


def make_place(cluster: Cluster, folder: Path) -> Place:
    """Write a folder with the scripts, a hostfile, and files that stand for a model and data."""
    place = folder / "shared" / "place"
    place.mkdir(parents=True)
    scratch = folder / "scratch"
    scratch.mkdir()
    for name in ("train.py", "train_sft.py", "colossal_llama2"):
        (place / name).symlink_to(ROOT / name)
    for name, content in {"model/config.json": b'{"a": 1}', "model/model.safetensors": bytes(1 << 20)}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    (place / "arrow" / "part-00000").mkdir(parents=True)
    (place / "arrow" / "part-00000" / "data-00000.arrow").write_bytes(os.urandom(1 << 16))
    (place / "runs").mkdir()
    (place / "hostfile").write_text("".join(f"{name}\n" for name in HOSTS))
    return Place(cluster, place, scratch)


def run_case(case: Case, patience: float = 1.0) -> list[str]:
    """Break a new cluster, and ask the doctor.

    Returns name, seconds, exit code, the lines of the doctor, and what is not as expected; empty if all is well.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="doctor-")))
        place = make_place(stack.enter_context(Cluster(len(HOSTS))), folder)
        case.breaks(place)
        before = sorted(map(str, folder.rglob("*")))
        words = [sys.executable, "-m", "colossal_llama2.train.doctor", "--hostfile", "hostfile"]
        begin = time.monotonic()
        done = place.cluster.run(
            1,
            [*words, "--nproc_per_node", "1", "--master_port", str(PORT), *place.flags, *FLAGS],
            cwd=place.folder,
            env={"PATH": f"{VENV}:{PATH}", "OMP_NUM_THREADS": "1", **place.variables},
            timeout=60 * patience,
        )
        seconds = time.monotonic() - begin
        left = sorted(set(map(str, folder.rglob("*"))) - set(before))
    lines = [line for line in done.stderr.splitlines() if not re.match(r"doctor: \d+ hosts?: ", line)]
    wrong = _wrong(case, done, lines) or (f"left behind: {left}" if left else "")
    return [case.name, f"{seconds:.1f}", str(done.returncode), " / ".join(lines) or done.stdout.splitlines()[-1], wrong]


def _wrong(case: Case, done: subprocess.CompletedProcess, lines: list[str]) -> str:
    """What is not as the case expects; "" if all is."""
    if done.returncode != (2 if case.expected and case.kind == "error" else 0):
        return f"exit code {done.returncode}"
    if "Traceback" in done.stderr + done.stdout:
        return "a traceback"
    if not case.expected:
        return "lines, where none is expected" if lines else ""
    if len(lines) != 1 or not re.search(f"^doctor: {case.kind}: {case.expected}", lines[0]):
        return f"not the one line {case.expected!r}"
    return ""


def missing(case: Case) -> str | None:
    """What a case needs and this machine lacks; None if it can run."""
    return "needs tcsh" if case.name == "tcsh" and not shutil.which("tcsh") else None
