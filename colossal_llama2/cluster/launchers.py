"""How each launcher is started, and how to find out which hosts' parts of a launch have ended.

colossalai   one `colossalai run`, which reaches the hosts by its own ssh connections
torchrun     torchrun on each host, started over OpenSSH
slurm        one `srun`, which starts train.py once per GPU; Slurm itself ends all when one fails
"""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from colossal_llama2.cluster import environment, hostfile, job_processes, ssh
from colossal_llama2.cluster.hostfile import Host
from colossal_llama2.cluster.launch_output import LaunchOutput
from colossal_llama2.cluster.on_host import SILENT_SECONDS
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.terminal_text import one_line

# Works in every login shell: what it needs comes through its input.
FROM_LOGIN_SHELL = (
    "exec sh -c 'IFS= read -r folder && IFS= read -r python && "
    'cd "$folder" && exec "$python" -m colossal_llama2.cluster.on_host\''
)
GUARD = [sys.executable, "-m", "colossal_llama2.cluster.on_host"]
# Slurm's commands wait longer for a controller that is away.
SLURM_SECONDS = 60
SLURM_ENDS_IT = re.compile(r"Invalid job id|already completing", re.I)


@dataclass
class Plan:
    """What to launch and where.

    Attributes:
        hosts: the hosts, the first of which is that of rank 0.
        per_host: processes on each.
        port: where rank 0 or torchrun listens.
        words: the script and its arguments.
        mark: the value of MARK of every process of this launch.
        here: which of the hosts is this one; None if the launch starts from another host. Found once: names are not
            looked up again during the run, in which the name service may fail.
        max_restarts: how often torchrun starts the ranks again.
        pass_environment: names of further variables for the hosts.
        timeout_seconds: how long hosts wait for each other.
    """

    hosts: Sequence[Host]
    per_host: int
    port: int
    words: Sequence[str]
    mark: str
    here: Host | None = None
    max_restarts: int = 0
    pass_environment: str = ""
    timeout_seconds: float = 600.0

    def other_destinations(self) -> list[str]:
        """What ssh takes for each host but this one."""
        return [host.destination for host in self.hosts if host != self.here]


@dataclass
class Launch:
    """A launcher that was started.

    Attributes:
        plan: what was launched.
        processes: the processes that were started here, with the host of each, or "" for all hosts.
        output: what the launcher's output has revealed.
        reports: what to report before the start.
    """

    plan: Plan
    output: LaunchOutput
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    reports: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Start the launcher."""
        raise NotImplementedError

    def ended(self) -> dict[str, int]:
        """The exit codes of the hosts whose parts have ended, as far as it can be known."""
        return {host: process.returncode for host, process in self.processes.items() if process.poll() is not None}

    def signal_ranks(self, number: int) -> bool:
        """Pass a signal on to the ranks. Returns whether any got it."""
        if job_processes.signal_here(self.plan.mark, number, only_ranks=True):
            return True
        others = self.plan.other_destinations()
        return len(job_processes.signal_hosts(others, self.plan.mark, number, only_ranks=True)) < len(others)

    def give_sign_of_life(self) -> None:
        """Called every SIGN_SECONDS."""

    def close(self) -> None:
        """Remove what `start` has made."""

    def _start(self, host: str, command: Sequence[str], variables: dict[str, str], *, piped: bool) -> subprocess.Popen:
        # In a session of its own: Ctrl+C reaches the watching process alone, which passes it on.
        self.processes[host] = subprocess.Popen(
            command,
            env=variables | {job_processes.MARK: self.plan.mark},
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return self.processes[host]


class GuardedLaunch(Launch):
    """Its processes run under on_host, which ends what it has started when this process ends, however it does."""

    def give_sign_of_life(self) -> None:
        """An empty line for each host."""
        for process in self.processes.values():
            self._write(process, "\n")

    def close(self) -> None:
        """End the connections: what is left on the hosts ends."""
        for process in self.processes.values():
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    @staticmethod
    def _write(process: subprocess.Popen, text: str) -> bool:
        try:
            assert process.stdin is not None
            process.stdin.write(text.encode())
            process.stdin.flush()
        except (OSError, ValueError):
            # It has ended: its exit code says why.
            return False
        return True


def _task(plan: Plan, command: Sequence[str], variables: dict[str, str], *, is_here: bool) -> str:
    """The first line of on_host's input. On this host, a launch that is silent is only suspended (Ctrl+Z)."""
    task = {
        "command": command,
        "environment": variables,
        "silent_seconds": None if is_here else SILENT_SECONDS,
        "save_seconds": plan.timeout_seconds,
    }
    return json.dumps(task)


class ColossalaiLaunch(GuardedLaunch):
    """`colossalai run`."""

    _file: IO[str] | None = None
    _seen_agent = False

    def start(self) -> None:
        """Start `colossalai run` with a hostfile of names alone, and the environment that a command line may hold."""
        plan = self.plan
        lines = hostfile.launcher_lines("hostfile", plan.hosts, "colossalai")
        self._file = tempfile.NamedTemporaryFile("w", prefix="hostfile-", suffix=".txt")
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()
        passed = environment.for_command_line(os.environ, plan.pass_environment)
        self.reports = passed.reports()
        options = ["--nproc_per_node", str(plan.per_host), "--hostfile", self._file.name]
        # It joins the arguments with spaces for a shell.
        words = [shlex.quote(word) for word in plan.words]
        command = ["colossalai", "run", *options, "--master_port", str(plan.port), *words]
        if shutil.which("colossalai") is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "colossalai")
        process = self._start("", GUARD, passed.variables, piped=True)
        self._write(process, f"{_task(plan, command, {}, is_here=True)}\n")

    def ended(self) -> dict[str, int]:
        """Hosts that it has reported as failed, and this host once its torchrun is gone."""
        codes = {host.host: 1 if host.code is None else host.code for host in self.output.hosts.values()}
        # A lost connection says nothing about the ranks there.
        codes = {host: code for host, code in codes.items() if code != -1}
        agents = job_processes.Processes.of(self.plan.mark).agents
        self._seen_agent |= bool(agents)
        if self.plan.here is not None and self._seen_agent and not agents:
            codes.setdefault(self.plan.here.name, 0)
        return codes

    def close(self) -> None:
        """Also remove the hostfile."""
        super().close()
        if self._file is not None:
            self._file.close()


class TorchrunLaunch(GuardedLaunch):
    """torchrun on each host."""

    def start(self) -> None:
        """Start it on all hosts at once."""
        plan = self.plan
        variables = environment.for_hosts(os.environ) | {job_processes.MARK: plan.mark}
        for number, host in enumerate(plan.hosts):
            remote = host != plan.here
            start = ssh.command(host.destination, FROM_LOGIN_SHELL)
            if not remote:
                start = GUARD
            process = self._start(host.name, start, dict(os.environ), piped=True)
            task = _task(plan, self._command(number), variables, is_here=not remote)
            lines = [os.getcwd(), sys.executable, task] if remote else [task]
            self._write(process, "".join(f"{line}\n" for line in lines))

    def _command(self, number: int) -> list[str]:
        plan = self.plan
        options = [f"--nproc_per_node={plan.per_host}", f"--nnodes={len(plan.hosts)}"]
        first = plan.hosts[0].name
        seconds = max(int(plan.timeout_seconds), 1)
        if plan.max_restarts:
            # Only this kind starts the ranks of all hosts again when one has failed.
            options += ["--rdzv_backend=c10d", f"--rdzv_endpoint={first}:{plan.port}", f"--rdzv_id={plan.mark}"]
            options += [f"--rdzv_conf=is_host={int(number == 0)},join_timeout={seconds}"]
            options += [f"--max_restarts={plan.max_restarts}", f"--local_addr={plan.hosts[number].name}"]
        else:
            options += [f"--node_rank={number}", f"--master_addr={first}", f"--master_port={plan.port}"]
            options += [f"--rdzv_conf=timeout={seconds}"]
        return [sys.executable, "-m", "torch.distributed.run", *options, *plan.words]

    def signal_ranks(self, number: int) -> bool:
        """Through the connections that started the hosts' parts."""
        if job_processes.signal_here(self.plan.mark, number, only_ranks=True):
            return True
        running = [process for process in self.processes.values() if process.poll() is None]
        return any([self._write(process, f"{signal.Signals(number).name}\n") for process in running])


class SlurmLaunch(Launch):
    """`srun`, in an allocation that exists."""

    def start(self) -> None:
        """Start one process for each GPU. They find their ranks in Slurm's variables (colossal_llama2/launcher.py)."""
        plan = self.plan
        options = [f"--nodes={len(plan.hosts)}", f"--ntasks={len(plan.hosts) * plan.per_host}"]
        options += [f"--ntasks-per-node={plan.per_host}", "--kill-on-bad-exit=1", "--export=ALL"]
        # By its name the step is found again.
        options += [f"--job-name={plan.mark}"]
        # Since Slurm 22.05 srun does not take it from the job: each task would get one CPU.
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
            options += [f"--cpus-per-task={cpus}"]
        variables = dict(os.environ) | {"MASTER_ADDR": plan.hosts[0].name, "MASTER_PORT": str(plan.port)}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            variables.pop(name, None)
        self._start("", ["srun", *options, sys.executable, *plan.words], variables, piped=False)

    def signal_ranks(self, number: int) -> bool:
        """By Slurm, to the tasks of the step alone.

        srun itself takes SIGTERM as an order to kill its tasks at once, and the first SIGINT as a question for their
        status.
        """
        steps = _answer_of_slurm(
            "squeue", "--noheader", "--steps", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%i %j"
        )
        named = (line.split(maxsplit=1) for line in steps.splitlines())
        step = next((words[0] for words in named if words[1:] == [self.plan.mark]), None)
        if step is None:
            return False
        try:
            _answer_of_slurm("scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", step)
        except RunError as error:
            # Slurm is ending the job, and has sent SIGTERM to all its processes itself.
            if not SLURM_ENDS_IT.search(str(error)):
                raise
        return True


def _answer_of_slurm(*command: str) -> str:
    """What one of Slurm's commands prints. Raises RunError if it fails, cannot be run, or takes too long."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{command[0]}: no answer within {SLURM_SECONDS} s") from error
    except OSError as error:
        raise RunError(f"{command[0]}: {error.strerror}") from error
    if asked.returncode:
        raise RunError(f"{command[0]}: {one_line(asked.stderr) or f'exit code {asked.returncode}'}")
    return asked.stdout


LAUNCHES: dict[str, type[Launch]] = {
    "colossalai": ColossalaiLaunch,
    "torchrun": TorchrunLaunch,
    "slurm": SlurmLaunch,
}


def check_port(first: Host, port: int) -> None:
    """Raise UserError if another process listens on the port. `first` is this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store binds it: what earlier connections left behind does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(f"MASTER_PORT {port} on {first.name}: {error.strerror}; set another MASTER_PORT") from error


def slurm_hosts() -> list[Host]:
    """The hosts of the present Slurm job. Raises UserError if this is not one."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "LAUNCHER=slurm, but this is not a Slurm job; submit it with sbatch train.sbatch "
            "(see train.example.sbatch), or run it in salloc"
        )
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    try:
        names = _answer_of_slurm("scontrol", "show", "hostnames", nodes).split()
    except RunError as error:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}: {error}; mend that, or submit the job again") from error
    if not names:
        raise UserError(f"SLURM_JOB_NODELIST={nodes}: scontrol names no host; submit the job again")
    return [Host(name) for name in names]
