"""Launchers and what can happen to them on several hosts: the cells that `table` runs.

Each scenario is a new cluster, on which `bash train.sh` is started as a user starts it. Something is broken before or
during the run. It is measured how long the command takes from then on, and compared how it ends: exit code, the line
that names host and cause, and what is left behind. Final weights are compared with those of the undisturbed run.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.cluster.slurm import CGROUP, LINUXPROC, Slurm
from tests.cluster.slurm import missing as missing_of_slurm
from tests.cluster.workplace import FLAGS, variables

COLOSSALAI, TORCHRUN, SLURM = "colossalai", "torchrun", "slurm"
BOTH, ALL = (COLOSSALAI, TORCHRUN), (COLOSSALAI, TORCHRUN, SLURM)
# --dist_timeout and 30 s, in which each command has to end once something is broken.
LIMIT_SECONDS = 60.0
# From the start of a command to its first checkpoint, and to the end of an undisturbed run, on a busy machine.
START_SECONDS = 150.0
RUN_SECONDS = 240.0
RUN_NAME = "run"
ENVIRONMENT = Path(sys.prefix)
FAILING_SCRIPT = "import sys\nsys.exit(3)\n"
SLEEPING_SCRIPT = "import time\ntime.sleep(300)\n"


class Wrong(Exception):
    """What happened is not what was expected."""


@dataclass
class Job:
    """One command on a new cluster.

    Attributes:
        log: the file of its output.
        patience: factor of all limits, for a machine that has other work.
        slurm: Slurm on the hosts, if the launcher is slurm.
        nodes: on how many of the hosts Slurm runs the job.
        by_hand: with Slurm, train.sh within salloc, instead of sbatch.
    """

    launcher: str
    cluster: Cluster
    folder: Path
    log: Path
    more: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    slurm: Slurm | None = None
    nodes: int = 2
    process: subprocess.Popen | None = None
    patience: float = 1.0
    by_hand: bool = False

    def start(self) -> None:
        """Start the command on host 1."""
        given = variables(self.cluster.count, RUN_NAME=RUN_NAME, LAUNCHER=self.launcher, **self.more)
        command = ["bash", "train.sh", *FLAGS, *self.words]
        if self.slurm is not None:
            del given["NPROC_PER_NODE"], given["LAUNCHER"]
            given |= self.slurm.environment | {"VIRTUAL_ENV": str(ENVIRONMENT)}
            options = f"--nodes={self.nodes} --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1"
            if self.by_hand:
                given |= {"LAUNCHER": SLURM, "NPROC_PER_NODE": "1"}
                command = ["salloc", *options.split(), *command]
            else:
                output = ["--wait", f"--output={self.log}"]
                command = ["sbatch", *options.split(), *output, "train.sbatch", *FLAGS, *self.words]
        with self.log.open("ab") as log:
            self.process = self.cluster.popen(
                1, command, cwd=self.folder, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, pattern: str, seconds: float = START_SECONDS) -> None:
        """Wait until the output has a line. Raises Wrong if the command ends before, or takes too long."""
        end = time.monotonic() + seconds * self.patience
        while not re.search(pattern, self.text()):
            assert self.process is not None
            if self.process.poll() is not None:
                raise Wrong(f"ended with {self.process.returncode} before {pattern!r}")
            if time.monotonic() > end:
                raise Wrong(f"no {pattern!r} in {seconds:g} s")
            time.sleep(0.1)

    def end(self, seconds: float) -> int:
        """The exit code, as a shell has it. Raises Wrong if the command takes longer."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout=seconds * self.patience)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            raise Wrong(f"still running after {seconds:g} s") from None

    def kill_rank(self, host: int) -> None:
        """Kill the rank of a host."""
        os.kill(self.cluster.ranks(host)[0], signal.SIGKILL)

    def signal_launch(self, number: int) -> None:
        """Send a signal to the command that the user has started."""
        if self.slurm is not None and not self.by_hand:
            self.slurm.run("scancel", "--batch", f"--signal={signal.Signals(number).name[3:]}", "1")
            return
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if b"watch_launch" in words and str(self.folder).encode() in os.readlink(entry / "cwd").encode():
                    os.kill(int(entry.name), number)

    def weights(self) -> str:
        """A hash of the final model's weights. Raises Wrong if there are none."""
        files = sorted((self.folder / "runs" / "checkpoints" / RUN_NAME / "modeling").glob("*.safetensors"))
        if not files:
            raise Wrong("no final model")
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@dataclass(frozen=True)
class Scenario:
    """Something that happens.

    Attributes:
        name: its cell in the table.
        code: the exit code that is expected.
        line: a pattern that the output has to have.
        before: breaks something before the start.
        during: breaks something after the first checkpoint; None for a run that is left alone.
        after: what is done and compared when the command has ended.
        hosts: how many there are.
        spare: how many of them Slurm does not use at first.
        seconds: how long the command may take, from the start, or from `during` on.
        proctrack: how Slurm finds the processes of a job.
        same_weights: whether the final model is that of the undisturbed run.
        is_quick: whether it belongs to the short selection, which is the same on a slow machine.
    """

    name: str
    code: int
    line: str
    launchers: Sequence[str] = BOTH
    before: Callable[[Job], None] = lambda job: None
    during: Callable[[Job], None] | None = None
    after: Callable[[Job], None] = lambda job: None
    hosts: int = 2
    spare: int = 0
    seconds: float = LIMIT_SECONDS
    proctrack: str = LINUXPROC
    same_weights: bool = False
    is_quick: bool = False


def write_hostfile(job: Job, *lines: str) -> None:
    """Replace the hostfile."""
    (job.folder / "hostfile").write_text("".join(f"{line}\n" for line in lines))


def address_without_host(job: Job) -> None:
    """The second host does not exist."""
    write_hostfile(job, "node1", "10.201.0.9")


def addresses_only(job: Job) -> None:
    """No name of a host can be resolved anywhere; line ends of Windows, comments and slots."""
    for host in range(1, job.cluster.count + 1):
        job.cluster.set_hosts(host, f"127.0.0.1 localhost\n127.0.1.1 {job.cluster.name(host)}\n")
    write_hostfile(job, *(f"{job.cluster.address(i)} slots=1 # host {i}\r" for i in range(1, job.cluster.count + 1)))


def port_in_use(job: Job) -> None:
    """Another process listens on the master port of the first host."""
    script = "import socket, time; s = socket.create_server(('', 30013)); time.sleep(100)"
    job.cluster.popen(1, [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(0.5)


def failing_script(job: Job) -> None:
    """The script ends with 3 on one host, and sleeps on the other."""
    job.more["CHECK_HOSTS"] = "no"
    for host, text in ((1, SLEEPING_SCRIPT), (2, FAILING_SCRIPT)):
        path = job.folder.parent / f"{job.log.stem}-{host}.py"
        path.write_text(text)
        job.cluster.replace(host, job.folder / "train.py", path)


def nothing_remains(job: Job) -> None:
    """No process of the run is left on any host that lives."""
    end = time.monotonic() + 15 * job.patience
    while any(job.cluster.ranks(host) for host in range(1, job.cluster.count + 1) if job.cluster.is_alive(host)):
        if time.monotonic() > end:
            raise Wrong("ranks are left")
        time.sleep(0.2)


def continues(job: Job) -> None:
    """The same command again continues the run, to the weights of the undisturbed one."""
    nothing_remains(job)
    job.start()
    if job.end(RUN_SECONDS):
        raise Wrong("the same command again failed")
    if not re.search(r"continuing the run .*\n(.*\n)*.*Resuming", job.text()):
        raise Wrong("the same command did not resume")


def one_host_continues(job: Job) -> None:
    """With the remaining host alone, the run continues from its checkpoint."""
    write_hostfile(job, "node1")
    shorter = Job(
        job.launcher,
        job.cluster,
        job.folder,
        job.log,
        job.more,
        [*job.words, "--max_steps", "30"],
        patience=job.patience,
    )
    shorter.start()
    if shorter.end(RUN_SECONDS) or "Resuming" not in shorter.text():
        raise Wrong("the remaining host did not continue")


def requeued(job: Job) -> None:
    """Slurm runs the job again, which continues by itself."""
    assert job.slurm is not None
    end = time.monotonic() + RUN_SECONDS * job.patience
    while job.slurm.state("1") not in ("COMPLETED", "FAILED"):
        if time.monotonic() > end:
            raise Wrong(f"the job is {job.slurm.state('1')}")
        time.sleep(0.5)
    if job.slurm.state("1") != "COMPLETED" or "Resuming" not in job.text():
        raise Wrong("the requeued job did not resume")


def kill_second_rank(job: Job) -> None:
    """kill -9 of the rank on host 2."""
    job.kill_rank(2)


SAVED = r"stopped: {} after step \d+, which is saved"
SCENARIOS = (
    Scenario("trains", 0, "Done: 64 steps", ALL, seconds=RUN_SECONDS, same_weights=True, is_quick=True),
    Scenario("trains on 4 hosts", 0, "Done: 32 steps", ALL, hosts=4, seconds=RUN_SECONDS),
    Scenario(
        "addresses only, CRLF, slots",
        0,
        "Done: 64 steps",
        (COLOSSALAI,),
        addresses_only,
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario("no such host", 2, "error: 10.201.0.9: does not answer", before=address_without_host),
    Scenario("key refused", 2, "node2: refuses this user's key", before=lambda job: job.cluster.authorize(2, False)),
    Scenario("folder empty", 2, "node2: .*colossal_llama2", ALL, lambda job: job.cluster.hide(2, job.folder)),
    Scenario("no .venv", 2, "node2: has no .*python", ALL, lambda job: job.cluster.hide(2, ENVIRONMENT)),
    Scenario(
        "login shell tcsh",
        2,
        "node2: the login shell .*tcsh",
        (COLOSSALAI,),
        lambda job: job.cluster.set_shell(2, "/usr/bin/tcsh"),
    ),
    Scenario(
        "login shell tcsh",
        0,
        "Done: 64 steps",
        (TORCHRUN,),
        lambda job: job.cluster.set_shell(2, "/usr/bin/tcsh"),
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario("port in use", 2, "30013", before=port_in_use),
    Scenario(
        "script fails on one host",
        3,
        "train.sh: error: node2: rank 1 ended with exit code 3",
        before=failing_script,
        after=nothing_remains,
        seconds=LIMIT_SECONDS + 60,
    ),
    Scenario(
        "rank killed",
        137,
        "rank 1 on node2 died|node2: rank 1",
        during=kill_second_rank,
        after=continues,
        same_weights=True,
    ),
    Scenario(
        "rank killed, requeued",
        0,
        "exit code 137, after the checkpoint .*; requeueing job 1",
        (SLURM,),
        during=kill_second_rank,
        after=requeued,
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario(
        "rank killed, MAX_RESTARTS=2",
        0,
        "Done: 64 steps",
        (TORCHRUN,),
        before=lambda job: job.more.update(MAX_RESTARTS="2"),
        during=kill_second_rank,
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario(
        "cable out", 1, "error: rank 1 on node2 died", during=lambda job: job.cluster.cut(2), after=one_host_continues
    ),
    Scenario(
        "cable out, started on another host",
        1,
        "error: rank 1 on node3 died",
        before=lambda job: write_hostfile(job, "node2", "node3"),
        during=lambda job: job.cluster.cut(3),
        hosts=3,
    ),
    Scenario("host off", 1, "error: rank 1 on node2 died", during=lambda job: job.cluster.kill(2), is_quick=True),
    Scenario(
        "train.sh killed",
        137,
        "",
        during=lambda job: job.signal_launch(signal.SIGKILL),
        after=continues,
        same_weights=True,
    ),
    Scenario(
        "SIGTERM",
        143,
        SAVED.format("SIGTERM"),
        ALL,
        during=lambda job: job.signal_launch(signal.SIGTERM),
        after=nothing_remains,
        is_quick=True,
    ),
    Scenario(
        "SIGINT",
        130,
        SAVED.format("SIGINT"),
        ALL,
        # In a batch job, the shell makes its script ignore SIGINT.
        lambda job: setattr(job, "by_hand", True),
        during=lambda job: job.signal_launch(signal.SIGINT),
        after=nothing_remains,
    ),
    Scenario(
        "SIGUSR1",
        0,
        SAVED.format("SIGUSR1"),
        during=lambda job: job.signal_launch(signal.SIGUSR1),
        after=nothing_remains,
    ),
    Scenario(
        "SIGUSR1, requeued",
        0,
        "requeueing job 1",
        (SLURM,),
        during=lambda job: job.signal_launch(signal.SIGUSR1),
        after=requeued,
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario(
        "host off, requeued on another",
        0,
        "Done: 64 steps",
        (SLURM,),
        hosts=3,
        spare=1,
        during=lambda job: job.cluster.kill(2),
        seconds=RUN_SECONDS,
        same_weights=True,
    ),
    Scenario(
        "SIGUSR1, requeued (cgroup)",
        0,
        "requeueing job 1",
        (SLURM,),
        during=lambda job: job.signal_launch(signal.SIGUSR1),
        after=requeued,
        seconds=RUN_SECONDS,
        proctrack=CGROUP,
        same_weights=True,
    ),
)


class Cells:
    """Runs cells of the table, from any thread.

    Args:
        folder: for the logs.
        workplace: what each cell gets a copy of.
        patience: factor of all limits.
    """

    def __init__(self, folder: Path, workplace: Path, patience: float) -> None:
        self._folder, self._workplace, self._patience = folder, workplace, patience
        # The weights of the undisturbed run, which is begun first.
        self._undisturbed: Future[str] = Future()

    def run(self, launcher: str, scenario: Scenario) -> list[str]:
        """Run a scenario. Returns its row: launcher, scenario, outcome, seconds and exit code."""
        if reason := missing(launcher, scenario):
            return [launcher, scenario.name, f"skipped: {reason}", "", ""]
        name = f"{launcher}-{re.sub(r'[^a-zA-Z0-9]+', '-', scenario.name)}"
        folder = self._folder / f"{name}-work"
        shutil.copytree(self._workplace, folder, symlinks=True)
        outcome, seconds, code = "as expected", 0.0, ""
        slurm: Slurm | None = None
        started = time.monotonic()
        with Cluster(scenario.hosts) as cluster:
            log = self._folder / f"{name}.log"
            # Of an earlier attempt.
            log.unlink(missing_ok=True)
            shutil.rmtree(self._folder / f"{name}-slurm", ignore_errors=True)
            if (launcher, scenario) == first_cell() and self._undisturbed.done():
                self._undisturbed = Future()
            job = Job(launcher, cluster, folder, log, patience=self._patience, nodes=scenario.hosts - scenario.spare)
            try:
                if launcher == SLURM:
                    job.slurm = slurm = Slurm(cluster, self._folder / f"{name}-slurm", scenario.proctrack)
                seconds, code = self._follow(scenario, job)
            except Exception as error:
                outcome, seconds = f"WRONG: {error or repr(error)}", seconds or time.monotonic() - started
                print(f"--- the end of {log.name}:\n{job.text()[-3000:]}\n---", file=sys.stderr, flush=True)
            finally:
                if (launcher, scenario) == first_cell() and not self._undisturbed.done():
                    self._undisturbed.set_exception(Wrong("there is no undisturbed run to compare with"))
        if slurm is not None:
            slurm.close()
        shutil.rmtree(folder, ignore_errors=True)
        return [launcher, scenario.name, outcome, f"{seconds:.1f}", code]

    def _follow(self, scenario: Scenario, job: Job) -> tuple[float, str]:
        write_hostfile(job, *(job.cluster.name(i) for i in range(1, job.cluster.count + 1)))
        scenario.before(job)
        started = time.monotonic()
        job.start()
        if scenario.during is not None:
            job.wait_for(r"Saved .*step-10\b")
            started = time.monotonic()
            scenario.during(job)
        code = job.end(scenario.seconds)
        seconds = time.monotonic() - started
        if code != scenario.code:
            raise Wrong(f"exit code {code}, not {scenario.code}")
        if not re.search(scenario.line, job.text()):
            raise Wrong(f"no line {scenario.line!r}")
        scenario.after(job)
        if scenario.same_weights:
            self._compare(job, is_first=(job.launcher, scenario) == first_cell())
        return seconds, str(code)

    def _compare(self, job: Job, *, is_first: bool) -> None:
        weights = job.weights()
        if is_first:
            self._undisturbed.set_result(weights)
        elif weights != self._undisturbed.result(timeout=RUN_SECONDS * self._patience):
            raise Wrong("other weights than those of the undisturbed run")


def missing(launcher: str, scenario: Scenario) -> str | None:
    """What a cell needs and this machine lacks; None if it can run."""
    if launcher == SLURM and (reason := missing_of_slurm(scenario.proctrack)):
        return reason
    return "needs tcsh" if "tcsh" in scenario.name and not shutil.which("tcsh") else None


def first_cell() -> tuple[str, Scenario]:
    """The undisturbed run."""
    return SCENARIOS[0].launchers[0], SCENARIOS[0]


def chosen(launcher: str | None, word: str, *, quick: bool) -> list[tuple[str, Scenario]]:
    """The cells of the table. The first is the undisturbed run, if others are compared with it."""
    cells = [(name, scenario) for scenario in SCENARIOS for name in scenario.launchers]
    found = [cell for cell in cells if (launcher or cell[0]) == cell[0] and word in cell[1].name]
    if quick:
        found = [cell for cell in found if cell[1].is_quick]
    if cells[0] not in found and any(scenario.same_weights for _, scenario in found):
        found.insert(0, cells[0])
    return found
