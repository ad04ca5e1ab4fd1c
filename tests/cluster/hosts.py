"""Several hosts on one Linux machine: network namespaces with a host name, processes and an sshd of their own.

    with Cluster(2) as cluster:
        cluster.run(1, ["ssh", "node2", "hostname"])
        cluster.cut(2)

or from a shell, as the root user:

    python -m tests.cluster.hosts up 2        # node1 (10.201.0.1), node2, ...
    python -m tests.cluster.hosts run 1 ssh node2 hostname
    python -m tests.cluster.hosts cut 2       # take the network cable out; restore 2 puts it back
    python -m tests.cluster.hosts kill 2      # end the host and all of its processes
    python -m tests.cluster.hosts down

Each host has its own network, host name, processes, users, /etc/hosts, /run, /dev/shm, home folder and sshd on port 22.
All have the same ssh key, so each host reaches each by name and by address. They share all other files, as over NFS.

The namespaces have no names and belong to the hosts' processes alone. So they end with them, several clusters can exist
at a time, and nothing is left on the machine except the folder of the cluster, which `down` removes.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

NET = "10.201.0"
TOOLS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
}
# What makes a host a host of its own.
SEPARATE = "unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc".split()
PROBE = """
hostname probe
mount -t tmpfs tmpfs /run
ip link add switch type bridge
ip link add node type veth peer name eth0
"""
# They only bound failures: a busy machine may need a minute.
START_SECONDS = 120.0
# sshd is no child of this process, so the hosts' tools are found as a login would find them.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The first process of a host. It has the paths that must be the host's own, and ends only by SIGKILL; bash collects
# the processes that lose their parent.
FIRST_PROCESS = """
hostname "$1"
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
for name in hosts passwd; do mount --bind "$2/$name" "/etc/$name"; done
"$3" -D -E "$2/sshd.log" -f "$2/sshd_config" &
while :; do sleep 1000; done
"""
SSHD_CONFIG = """Port 22
HostKey {place}/host_key
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile {place}/sshd.pid
MaxStartups 100
MaxSessions 100
Subsystem sftp internal-sftp
"""
SSH_CONFIG = """Host *
    StrictHostKeyChecking accept-new
"""


def missing() -> str | None:
    """Why no cluster can be made here; None if it can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    absent = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=PATH) is None})
    if absent:
        return f"needs {', '.join(absent)} (apt-get install {' '.join(absent)})"
    attempt = subprocess.run(
        [*SEPARATE, "sh", "-ec", PROBE], env={"PATH": PATH}, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if attempt.returncode == 0:
        return None
    return f"this machine allows no hosts of namespaces ({' '.join(attempt.stderr.split())})"


class Cluster:
    """Hosts 1 to `count`, named node1, node2, ...; as a context manager, up inside and down after it.

    Args:
        count: number of hosts.
        folder: for the cluster's own files; a new temporary one by default. `down` removes it.
        outlive: whether the hosts stay when this process ends. Otherwise they end with it, even if it is killed.
    """

    def __init__(self, count: int, folder: Path | None = None, *, outlive: bool = False) -> None:
        self.count = count
        self.folder = folder or Path(tempfile.mkdtemp(prefix="cluster-"))
        self._outlive = outlive
        # Process numbers, as this machine counts them: under 0 the one that holds the network's switch.
        self._processes: dict[int, int] = {}

    def __enter__(self) -> "Cluster":
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @staticmethod
    def name(host: int) -> str:
        """The name of a host."""
        return f"node{host}"

    @staticmethod
    def address(host: int) -> str:
        """The address of a host."""
        return f"{NET}.{host}"

    def home(self, host: int) -> Path:
        """The home folder of a host's user."""
        return self._place(host) / "home"

    def _place(self, host: int) -> Path:
        return self.folder / self.name(host)

    def up(self) -> None:
        """Start all hosts, and return when ssh reaches each of them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _make_key(self.folder / "key", "cluster")
        self._processes[0] = self._start(["unshare", "--net", "sleep", "infinity"])
        _wait_until(lambda: not _same_network(self._processes[0], os.getpid()), "no network namespace")
        self._switch("ip", "link", "add", "switch", "up", "type", "bridge")
        for host in range(1, self.count + 1):
            self._write_files(host)
            self._start_host(host)
        known = "".join(f"{self.name(i)},{self.address(i)} {self._host_key(i)}\n" for i in range(1, self.count + 1))
        for host in range(1, self.count + 1):
            (self.home(host) / ".ssh" / "known_hosts").write_text(known)
            _wait_until(lambda host=host: self._answers(host), f"no sshd on {self.name(host)}")
        self.save()

    def down(self) -> None:
        """End all processes of all hosts and remove the cluster's folder. Does nothing if there is no cluster."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for process in self._processes.values():
            # Children of this process have to be collected; those of an earlier one are gone by themselves.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)
            _wait_until(lambda process=process: not Path(f"/proc/{process}").exists(), f"process {process} stays")
        self._processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def popen(
        self,
        host: int,
        command: Sequence[str | Path],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen:
        """Start a command on a host, in a folder, with the environment of a login and `env`.

        `options` are those of subprocess.Popen. To end the command and its children, `kill` the host, or signal the
        process group that `start_new_session=True` makes; the command itself is a child of the returned process.
        """
        words = self._enter(host, cwd) + ["env", "-i", *self._environment(host, env or {}), *map(str, command)]
        return subprocess.Popen(words, **options)

    def run(
        self,
        host: int,
        command: Sequence[str | Path],
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess:
        """Run a command as `popen` starts it. Returns its exit code and output, as text.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds. It and its process group are killed.
        """
        process = self.popen(
            host,
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def cut(self, host: int) -> None:
        """Take the host's network cable out: nothing arrives there or comes from there, and nobody is told."""
        self._switch("ip", "link", "set", self.name(host), "down")

    def restore(self, host: int) -> None:
        """Put the host's network cable back."""
        self._switch("ip", "link", "set", self.name(host), "up")

    def kill(self, host: int) -> None:
        """End the host and all of its processes at once, as a power failure does."""
        os.kill(self.process(host), signal.SIGKILL)

    def processes(self, host: int) -> dict[int, list[str]]:
        """The processes of a host, by number as this machine counts, with the words of their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and os.readlink(entry / "ns" / "pid") == self._processes_of(host):
                    words = (entry / "cmdline").read_bytes().decode(errors="replace")
                    found[int(entry.name)] = words.rstrip("\0").split("\0")
        return found

    def ranks(self, host: int) -> list[int]:
        """Numbers of the processes of train.py on a host, as this machine counts, without what they have started."""
        return sorted(
            number
            for number, words in self.processes(host).items()
            if "python" in words[0] and "train.py" in words[1:3]
        )

    def _processes_of(self, host: int) -> str:
        """What all processes of a host have in common."""
        return os.readlink(f"/proc/{self.process(host)}/ns/pid")

    def is_alive(self, host: int) -> bool:
        """Whether a host was not killed."""
        return Path(f"/proc/{self._processes[host]}/ns/pid").exists()

    def process(self, host: int) -> int:
        """Number of the host's first process, as this machine counts."""
        if host not in self._processes:
            raise KeyError(f"no host {host}")
        return self._processes[host]

    def stop_sshd(self, host: int) -> None:
        """From now on the host accepts no ssh connection; those that are open stay open."""
        number = (self._place(host) / "sshd.pid").read_text().strip()
        self.run(host, ["kill", number])

    def hide(self, host: int, folder: Path | str) -> None:
        """From now on the host sees an empty folder of its own at this path, as if it were not shared."""
        self._inside_mounts(host, 'mkdir -p "$1" && mount -t tmpfs tmpfs "$1"', str(folder))

    def replace(self, host: int, folder: Path | str, other: Path | str) -> None:
        """From now on the host sees another file or folder at this path."""
        self._inside_mounts(host, 'mount --bind "$2" "$1"', str(folder), str(other))

    def set_shell(self, host: int, shell: str) -> None:
        """Change the login shell of the host's user."""
        lines = (self._place(host) / "passwd").read_text().splitlines()
        first = [":".join([*line.split(":")[:6], shell]) if line.startswith("root:") else line for line in lines]
        # In place: a new file would not be seen through the mount.
        (self._place(host) / "passwd").write_text("\n".join(first) + "\n")

    def set_hosts(self, host: int, text: str) -> None:
        """Replace the host's /etc/hosts."""
        (self._place(host) / "hosts").write_text(text)

    def authorize(self, host: int, accepted: bool) -> None:
        """Whether the host's sshd accepts the cluster's key."""
        key = (self.folder / "key.pub").read_text() if accepted else ""
        (self.home(host) / ".ssh" / "authorized_keys").write_text(key)

    def save(self) -> None:
        """Write which processes belong to the cluster, for `load`."""
        processes = {str(key): [process, _started(process)] for key, process in self._processes.items()}
        record = {"count": self.count, "processes": processes}
        (self.folder / "cluster.json").write_text(json.dumps(record))

    @classmethod
    def load(cls, folder: Path) -> "Cluster":
        """The cluster that another process has made in a folder. Raises FileNotFoundError if there is none."""
        record = json.loads((folder / "cluster.json").read_text())
        cluster = cls(record["count"], folder)
        # A number may belong to another process by now.
        alive = {
            key: process for key, (process, started) in record["processes"].items() if _started(process) == started
        }
        cluster._processes = {int(key): process for key, process in alive.items()}
        return cluster

    def _write_files(self, host: int) -> None:
        """The files that only this host has: users, names of hosts, keys, and how sshd runs."""
        place, ssh = self._place(host), self.home(host) / ".ssh"
        ssh.mkdir(parents=True, mode=0o700)
        shutil.copy(self.folder / "key", ssh / "id_ed25519")
        for name in ("id_ed25519.pub", "authorized_keys"):
            shutil.copy(self.folder / "key.pub", ssh / name)
        (ssh / "config").write_text(SSH_CONFIG)
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        users = [[*user[:5], str(self.home(host)), "/bin/bash"] if user[0] == "root" else user for user in users]
        (place / "passwd").write_text("".join(":".join(user) + "\n" for user in users))
        names = [f"{self.address(i)} {self.name(i)}\n" for i in range(1, self.count + 1)]
        self.set_hosts(host, "127.0.0.1 localhost\n" + "".join(names))
        _make_key(place / "host_key", self.name(host))
        (place / "sshd_config").write_text(SSHD_CONFIG.format(place=place))

    def _start_host(self, host: int) -> None:
        sshd = shutil.which("sshd", path=PATH)
        words = ["bash", "-c", FIRST_PROCESS, "-", self.name(host), str(self._place(host)), str(sshd)]
        outer = self._start(SEPARATE + words)
        # `unshare` waits for its one child, the host's first process, and kills it when it is ended itself.
        self._processes[-host] = outer
        _wait_until(lambda: _children(outer), f"{self.name(host)} does not start")
        first = _children(outer)[0]
        self._processes[host] = first
        name = self.name(host)
        self._switch("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(first))
        self._switch("ip", "link", "set", name, "master", "switch", "up")
        self._in_network(first, "ip", "link", "set", "lo", "up")
        self._in_network(first, "ip", "address", "add", f"{self.address(host)}/24", "dev", "eth0")
        self._in_network(first, "ip", "link", "set", "eth0", "up")

    def _start(self, words: list[str]) -> int:
        if not self._outlive:
            words = ["setpriv", "--pdeathsig", "KILL", *words]
        log: IO[bytes]
        with (self.folder / "start.log").open("ab") as log:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env={"PATH": PATH}
            )
        # Its end is collected in `down`.
        process.returncode = 0
        return process.pid

    def _answers(self, host: int) -> bool:
        try:
            log = self.run(host, ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/22"], cwd="/", timeout=5)
        except subprocess.TimeoutExpired:
            return False
        return log.returncode == 0

    def _host_key(self, host: int) -> str:
        return " ".join((self._place(host) / "host_key.pub").read_text().split()[:2])

    def _environment(self, host: int, more: Mapping[str, str]) -> list[str]:
        login = {"HOME": str(self.home(host)), "USER": "root", "LOGNAME": "root", "SHELL": "/bin/bash"}
        return [f"{name}={value}" for name, value in ({"PATH": PATH, "LANG": "C.UTF-8"} | login | dict(more)).items()]

    def _enter(self, host: int, cwd: Path | str | None) -> list[str]:
        # --wdns: the folder as the host sees it. With --wd it would be on another mount than the same absolute path,
        # and renaming from one to the other would fail.
        separate = "--mount --net --uts --ipc --pid".split()
        return ["nsenter", "--target", str(self.process(host)), *separate, f"--wdns={cwd or os.getcwd()}", "--"]

    def _inside_mounts(self, host: int, script: str, *words: str) -> None:
        enter = ["nsenter", "--target", str(self.process(host)), "--mount", "--"]
        subprocess.run([*enter, "sh", "-c", script, "-", *words], check=True)

    def _switch(self, *words: str) -> None:
        self._in_network(self._processes[0], *words)

    @staticmethod
    def _in_network(process: int, *words: str) -> None:
        subprocess.run(["nsenter", "--target", str(process), "--net", "--", *words], check=True)


def _make_key(path: Path, comment: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], check=True)


def _children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _started(process: int) -> int | None:
    """When a process started, in the machine's own unit; None if it is gone."""
    try:
        # The name of the program, in parentheses, may contain spaces.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _same_network(first: int, second: int) -> bool:
    try:
        return os.readlink(f"/proc/{first}/ns/net") == os.readlink(f"/proc/{second}/ns/net")
    except FileNotFoundError:
        return True


def _wait_until(condition: Any, otherwise: str) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{otherwise} after {START_SECONDS:g} s")
        time.sleep(0.02)


def main() -> None:
    """Make a cluster in a folder, use it, or remove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.hosts", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "cluster")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("up").add_argument("host", type=int, help="number of hosts")
    for action in ("cut", "restore", "kill"):
        actions.add_parser(action).add_argument("host", type=int)
    run = actions.add_parser("run")
    run.add_argument("host", type=int)
    run.add_argument("words", nargs=argparse.REMAINDER)
    actions.add_parser("down")
    args = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    with contextlib.suppress(FileNotFoundError):
        if args.action in ("up", "down"):
            Cluster.load(args.folder).down()
    if args.action == "up":
        Cluster(args.host, args.folder, outlive=True).up()
    elif args.action == "run":
        sys.exit(Cluster.load(args.folder).popen(args.host, args.words).wait())
    elif args.action != "down":
        getattr(Cluster.load(args.folder), args.action)(args.host)


if __name__ == "__main__":
    main()
