"""Preparation of data on a Ray cluster of several hosts, of which some are lost.

    bash tests/cluster/run.sh --launcher ray                     # all
    bash tests/cluster/run.sh --launcher ray --only killed       # those whose names contain this
    bash tests/cluster/run.sh --launcher ray --ray_defaults      # to measure how soon Ray notices a loss by default

A head and three nodes are started with `ray start`, as a user starts them. Then prepare_pretrain_dataset.py prepares 17
units of 4 MiB. Something is broken while they are done. Its files are compared, byte for byte, with those of a run
without Ray, and the log has to name what was lost. All rows share the hosts; most of them restart Ray.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import tiny
from tests.cluster import hosts
from tests.cluster.hosts import PATH, Cluster
from tests.conftest import ROOT
from tests.preparing import contents, flags, settings, write_lines

HOSTS = 4
PORT = 6379
ADDRESS = f"{Cluster.address(1)}:{PORT}"
PYTHON = Path(sys.executable)
SITE = next(Path(path) for path in sys.path if path.endswith("site-packages"))
# 17 units of the size that a user has.
INPUT_BYTES = 64 << 20
UNITS_BEFORE = 5
READY_SECONDS = 120.0
START_ATTEMPTS = 3
# Ray's defaults notice a host without connection after a minute, and a head after another one.
HEALTH_CHECK_MILLISECONDS = 3000
RAY_SETTINGS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
ENVIRONMENT = {"PATH": f"{PYTHON.parent}:{PATH}", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
RAY_FOLDER = "/tmp/ray"
# How each line of a prepare command begins.
OURS = r"\d\d:\d\d:\d\d \| |prepare_pretrain_dataset\.py: error: "


class Wrong(Exception):
    """What happened is not what was expected."""


class RayHosts:
    """Ray on the hosts of a cluster.

    Args:
        folder: for logs; a new one.
        patience: factor of all limits.
        default_settings: whether Ray waits for lost hosts as long as it does by default.
    """

    def __init__(self, cluster: Cluster, folder: Path, patience: float, *, default_settings: bool = False) -> None:
        self.cluster, self._folder, self.patience = cluster, folder, patience
        self._environment = ENVIRONMENT.copy()
        if not default_settings:
            timeout = str(round(HEALTH_CHECK_MILLISECONDS * patience))
            self._environment |= RAY_SETTINGS | {"RAY_health_check_timeout_ms": timeout}
        self.head_cores: int | None = None
        folder.mkdir()
        for host in range(1, cluster.count + 1):
            # Ray's files of a node; hosts would otherwise share them.
            cluster.hide(host, RAY_FOLDER)

    def start(self, head_cores: int) -> None:
        """Start a head and the other nodes. Raises Wrong if they do not connect."""
        self.head_cores = head_cores
        self._start_hosts({1: ["--head", f"--port={PORT}", "--include-dashboard=false"]}, head_cores)
        self._start_hosts({host: [f"--address={ADDRESS}"] for host in range(2, self.cluster.count + 1)}, 1)

    def _start_hosts(self, words: dict[int, list[str]], cores: int) -> None:
        # On a busy machine it may fail: a node has 30 s to register, which no setting changes.
        for _ in range(START_ATTEMPTS):
            started = {host: self._start(host, *given, cores=cores) for host, given in words.items()}
            failed = [host for host, process in started.items() if process.wait()]
            if not failed:
                return
            for host in failed:
                self.kill_node(host)
            words = {host: words[host] for host in failed}
        raise Wrong(f"ray start failed: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Kill all of Ray, on all hosts that live."""
        for host in range(1, self.cluster.count + 1):
            if self.cluster.is_alive(host):
                self.kill_node(host)
        self.head_cores = None

    def kill_node(self, host: int) -> None:
        """Kill -9 of the raylet, the workers and everything else of Ray on a host."""
        end = time.monotonic() + 20 * self.patience
        while numbers := self._numbers(host):
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            if time.monotonic() > end:
                raise Wrong(f"processes of Ray stay on host {host}")
            time.sleep(0.05)

    def busy(self, host: int) -> list[int]:
        """Numbers of the workers on a host that do a task."""
        return [number for number, words in self.cluster.processes(host).items() if words[0] == "ray::do_unit"]

    def wait_for_nodes(self, address: str) -> None:
        """Wait until all nodes are registered."""
        # A node that was killed while it started may be registered for some seconds.
        script = (
            f"import ray, time; ray.init('{address}', logging_level='ERROR')\n"
            f"while sum(node['Alive'] for node in ray.nodes()) != {self.cluster.count}: time.sleep(0.2)"
        )
        self.cluster.run(1, [PYTHON, "-c", script], cwd="/", env=self._environment, timeout=60 * self.patience)

    @property
    def _log(self) -> Path:
        return self._folder / "ray-start.log"

    def _numbers(self, host: int) -> list[int]:
        return [
            number
            for number, words in self.cluster.processes(host).items()
            if re.search(r"\bray(let)?\b", " ".join(words)) and "prepare_pretrain" not in " ".join(words)
        ]

    def _start(self, host: int, *words: str, cores: int) -> subprocess.Popen:
        given = ["--num-cpus", str(cores), "--object-store-memory", "80000000", "--disable-usage-stats"]
        given += [f"--node-ip-address={Cluster.address(host)}"]
        # Daemons keep the streams that they are given.
        with self._log.open("ab") as log:
            return self.cluster.popen(
                host,
                [PYTHON.parent / "ray", "start", *words, *given],
                cwd="/",
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


@dataclass
class Preparation:
    """One prepare command, on a host.

    Attributes:
        output: its new folder.
        log: of stderr.
    """

    ray: RayHosts
    host: int
    output: Path
    log: Path
    words: list[str]
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the command."""
        with self.log.open("wb") as log:
            self.process = self.ray.cluster.popen(
                self.host,
                [PYTHON, ROOT / "prepare_pretrain_dataset.py", *self.words],
                cwd=ROOT,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for something that happens while the command runs."""
        assert self.process is not None
        end = time.monotonic() + READY_SECONDS * self.ray.patience
        while not condition():
            if self.process.poll() is not None:
                raise Wrong(f"ended with {self.process.returncode} before {what}")
            if time.monotonic() > end:
                raise Wrong(f"no {what} in {READY_SECONDS:g} s")
            time.sleep(0.02)

    def units(self) -> int:
        """How many units are done."""
        return len(list((self.output / "cache").glob("unit-*.json")))

    def stop_worker(self, host: int) -> int:
        """Stop a worker in the middle of a task, so that it cannot end before what follows. Returns its number."""
        found: list[int] = []

        def stopped() -> bool:
            for number in self.ray.busy(host):
                os.kill(number, signal.SIGSTOP)
                # Else it has just ended its task.
                if number in self.ray.busy(host):
                    found.append(number)
                    return True
                os.kill(number, signal.SIGCONT)
            return False

        self.wait_until(stopped, f"task on host {host}")
        return found[0]


def kill_node(job: Preparation) -> None:
    """kill -9 of the raylet and the worker of host 3, in the middle of a task."""
    job.stop_worker(3)
    job.ray.kill_node(3)


def cut_node(job: Preparation) -> None:
    """The cable of host 4 is out. Its worker goes on, and writes the files of its task when another has done so."""
    worker = job.stop_worker(4)
    job.ray.cluster.cut(4)
    os.kill(worker, signal.SIGCONT)


def kill_all_nodes(job: Preparation) -> None:
    """All nodes with cores are lost; the head lives."""
    for host in range(2, job.ray.cluster.count + 1):
        job.ray.kill_node(host)


def replace_numpy(ray: RayHosts) -> None:
    """Host 2 has another version of a package."""
    other = ray.cluster.home(2) / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0.0\n")
    ray.cluster.replace(2, _numpy_metadata(), other)


def restore_numpy(ray: RayHosts) -> None:
    """Undo it."""
    ray.cluster.run(2, ["umount", _numpy_metadata()], cwd="/")


def _numpy_metadata() -> Path:
    return next(SITE.glob("numpy-*.dist-info")) / "METADATA"


@dataclass(frozen=True)
class Row:
    """What happens to a preparation.

    Attributes:
        code: the exit code that is expected.
        lines: patterns that the log has to have.
        seconds: how long the command may take from `during` on, or from its start.
        host: where the command is started.
        head_cores: of the Ray head on host 1.
        before: breaks something before Ray is started.
        after: undoes it.
        during: breaks something when some units are done.
        ruins: whether Ray has to be started again afterwards.
        is_quick: whether it belongs to the short selection, which is the same on a slow machine.
    """

    name: str
    code: int
    lines: tuple[str, ...]
    seconds: float
    host: int = 1
    head_cores: int = 1
    before: Callable[[RayHosts], None] = lambda ray: None
    after: Callable[[RayHosts], None] = lambda ray: None
    during: Callable[[Preparation], None] | None = None
    ruins: bool = True
    is_quick: bool = False


REDONE = r"WARNING: \d+ tasks? lost with a worker or node of Ray, done again: (unit|part)-"
ROWS = (
    Row("4 nodes", 0, (r"\d+ tasks on 4 Ray nodes: node1 \d+, node2 \d+, node3 \d+, node4 \d+",), 120, ruins=False),
    Row(
        "node killed",
        0,
        (r"WARNING: the Ray node node3 \(10\.201\.0\.3\) is lost", REDONE, r"\d+ tasks on"),
        120,
        during=kill_node,
        is_quick=True,
    ),
    Row(
        "cable of a node out",
        0,
        (r"WARNING: the Ray node node4 \(10\.201\.0\.4\) is lost", REDONE, r"\d+ tasks on"),
        # A task that was on its way there is given to another node after 90 s.
        240,
        during=cut_node,
    ),
    Row(
        "all nodes killed",
        1,
        (r"error: the Ray cluster has had no node with a core for 60 s; .*continues where it stopped$",),
        120,
        head_cores=0,
        during=kill_all_nodes,
    ),
    Row(
        "head killed",
        1,
        (r"error: Ray('s head node does not answer| has ended).*continues where it stopped$",),
        120,
        host=2,
        during=lambda job: job.ray.kill_node(1),
    ),
    Row(
        "another numpy on a node",
        2,
        (r"error: Ray node node2: has numpy 1\.0\.0, but this machine numpy 2?\S+; install requirements\.txt",),
        120,
        before=replace_numpy,
        after=restore_numpy,
    ),
    # The last one, since the host stays off.
    Row(
        "host of the head off",
        1,
        (r"error: Ray('s head node does not answer| has ended).*continues where it stopped$",),
        180,
        host=2,
        during=lambda job: job.ray.cluster.kill(1),
    ),
)


class RayTable:
    """Runs rows on shared hosts.

    Args:
        folder: a new one, for input, output and logs.
    """

    def __init__(self, folder: Path, patience: float, *, default_settings: bool = False) -> None:
        self._folder, self._patience, self._default_settings = folder, patience, default_settings
        # Of an earlier attempt.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        documents = tiny.english_documents()
        text = ["\n".join(documents[number : number + 40]) for number in range(0, 2000, 40)]
        lines = [{"target": row, "category": f"topic-{number % 3}"} for number, row in enumerate(text)]
        copies = INPUT_BYTES // sum(len(row.encode()) for row in text) + 1
        write_lines(folder / "in" / "rows.jsonl", lines * copies)
        tiny.make_tokenizer(folder / "tokenizer")
        self._expected: dict[str, bytes] = {}

    def run(self, rows: tuple[Row, ...]) -> Iterator[list[str]]:
        """Yield name, outcome, seconds and exit code of each row."""
        with Cluster(HOSTS) as cluster:
            self._prepare_without_ray(cluster)
            ray = RayHosts(cluster, self._folder / "ray", self._patience, default_settings=self._default_settings)
            for row in rows:
                yield self._run_row(row, ray)

    def _prepare_without_ray(self, cluster: Cluster) -> None:
        output = self._folder / "local"
        words = [PYTHON, ROOT / "prepare_pretrain_dataset.py", *self._words(output), "--num_workers", "2"]
        done = cluster.run(1, words, cwd=ROOT, env=ENVIRONMENT, timeout=300 * self._patience)
        if done.returncode:
            raise Wrong(f"without Ray: {done.stderr[-2000:]}")
        self._expected = contents(output)

    def _words(self, output: Path) -> list[str]:
        keywords = settings([self._folder / "in"], self._folder / "tokenizer", output, max_length=256, bins=8)
        del keywords["num_workers"]
        return [str(word) for word in flags({**keywords, "eval_fraction": 0.05})]

    def _run_row(self, row: Row, ray: RayHosts) -> list[str]:
        stem = re.sub(r"[^a-z0-9]+", "-", row.name)
        output = self._folder / stem
        words = [*self._words(output), "--executor", "ray", "--ray_address", ADDRESS]
        job = Preparation(ray, row.host, output, self._folder / f"{stem}.log", words)
        outcome, seconds, code = "as expected", 0.0, ""
        try:
            if ray.head_cores != row.head_cores:
                ray.stop()
                row.before(ray)
                ray.start(row.head_cores)
                ray.wait_for_nodes(ADDRESS)
            seconds, code = self._follow(row, job)
        except Exception as error:
            outcome = f"WRONG: {' '.join(str(error or repr(error)).split())[-300:]}"
            text = job.log.read_text(errors="replace") if job.log.exists() else ""
            print(f"--- the end of {job.log.name}:\n{text[-3000:]}\n---", file=sys.stderr, flush=True)
        finally:
            if job.process is not None and job.process.poll() is None:
                job.process.kill()
            if row.ruins:
                ray.stop()
                row.after(ray)
                ray.cluster.restore(4)
            shutil.rmtree(output, ignore_errors=True)
        return [row.name, outcome, f"{seconds:.1f}", code]

    def _follow(self, row: Row, job: Preparation) -> tuple[float, str]:
        started = time.monotonic()
        job.start()
        assert job.process is not None
        if row.during is not None:
            job.wait_until(lambda: job.units() >= UNITS_BEFORE, f"{UNITS_BEFORE} units")
            started = time.monotonic()
            row.during(job)
        try:
            code = job.process.wait(timeout=row.seconds * self._patience)
        except subprocess.TimeoutExpired:
            raise Wrong(f"still running after {row.seconds:g} s") from None
        seconds = time.monotonic() - started
        text = job.log.read_text(errors="replace")
        if code != row.code:
            raise Wrong(f"exit code {code}, not {row.code}")
        if missing := [line for line in row.lines if not re.search(line, text, re.MULTILINE)]:
            raise Wrong(f"no line {missing[0]!r}")
        if strange := [line for line in text.splitlines() if not re.match(OURS, line)]:
            raise Wrong(f"a line that is not ours: {strange[0]!r}")
        self._check_left(job)
        if code == 1:
            self._continue_without_ray(job)
        if code != 2 and contents(job.output) != self._expected:
            raise Wrong("other files than without Ray")
        return seconds, str(code)

    def _check_left(self, job: Preparation) -> None:
        """No process of the command is left, and no worker has a task, except where it cannot be ended from here."""
        cluster = job.ray.cluster
        end = time.monotonic() + 30 * self._patience
        while True:
            left = [
                " ".join(words[:3])
                for host in range(1, cluster.count + 1)
                if cluster.is_alive(host)
                for words in cluster.processes(host).values()
                if words[0] in ("ray::do_unit", "ray::write_bin") or "prepare_pretrain" in " ".join(words)
            ]
            if not left:
                return
            if time.monotonic() > end:
                raise Wrong(f"processes are left: {left}")
            time.sleep(0.2)

    def _continue_without_ray(self, job: Preparation) -> None:
        """The same command without Ray continues where it stopped."""
        before = job.units()
        words = [PYTHON, ROOT / "prepare_pretrain_dataset.py", *self._words(job.output), "--num_workers", "2"]
        done = job.ray.cluster.run(job.host, words, cwd=ROOT, env=ENVIRONMENT, timeout=300 * self._patience)
        if done.returncode or "continuing the unfinished run" not in done.stderr or before < UNITS_BEFORE:
            raise Wrong(f"it did not continue: {done.stderr[-1000:]}")


def chosen(word: str, *, quick: bool) -> tuple[Row, ...]:
    """The rows whose names contain a word."""
    return tuple(row for row in ROWS if word in row.name and (row.is_quick or not quick))


def missing() -> str | None:
    """Why this cannot be run here; None if it can."""
    if reason := hosts.missing():
        return reason
    return None if (PYTHON.parent / "ray").exists() else "needs Ray (pip install --no-deps -r requirements-ray.txt)"
