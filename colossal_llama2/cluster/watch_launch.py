"""Start a launcher, and end with its job: with the job's exit code, and one line that names host and cause.

    python -m colossal_llama2.cluster.watch_launch --launcher colossalai --hostfile hostfile --nproc_per_node 8 \\
        --master_port 30013 train.py --pretrained ...

`colossalai run` waits for each host in turn, without a timeout: it hangs if one cannot be reached, is cut off, or fails
before another one. torchrun exits with 1 whatever happened. So the launcher's output and processes are watched here.
When the part of one host has ended, the others get a moment to end as well; then all processes of the launch are ended,
on every host that answers.

SIGTERM, SIGINT and SIGUSR1 are passed on to the ranks, which save and end.
"""

import argparse
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO

from colossal_llama2 import errors
from colossal_llama2.cluster import hostfile, job_processes, launchers, ssh
from colossal_llama2.cluster.hostfile import HostfileError
from colossal_llama2.cluster.launch_output import LaunchOutput, RankFailure
from colossal_llama2.cluster.launchers import Launch, Plan
from colossal_llama2.cluster.on_host import SIGN_SECONDS
from colossal_llama2.errors import RunError, UserError, reason
from colossal_llama2.terminal_text import report_line, show_line

LOOK_SECONDS = 0.5
# How long the others may go on when the part of one host has ended: while ranks are alive here, which notice a lost
# partner themselves and write their reports, or if nothing has failed so far, and otherwise.
WITH_RANKS_SECONDS = 25.0
WITHOUT_RANKS_SECONDS = 5.0
# After this, processes that got SIGTERM get SIGKILL.
TERMINATE_SECONDS = 5.0
# How long output may arrive after the end.
OUTPUT_SECONDS = 3.0
# How long the ranks may take to appear, beyond the time that hosts wait for each other.
START_SECONDS = 15.0
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DEFAULT_TIMEOUT = 600.0
# What `colossalai run` prints in the end, also if a host failed.
FINISHED = "Training on All Nodes"


class Watch:
    """One launch that is watched.

    Args:
        name: what its messages begin with.
    """

    def __init__(self, launch: Launch, name: str) -> None:
        self._launch, self._name = launch, name
        self._lock = threading.Lock()
        self._signals: list[int] = []
        self._passed_on: int | None = None
        self._finished_line = False
        self._latest_start = time.monotonic() + launch.plan.timeout_seconds + START_SECONDS
        self._has_not_met = False
        self._first_end: float | None = None
        self._seen_ranks = False
        self._ended_before_ranks = False
        self._is_done = threading.Event()

    def run(self) -> int:
        """Start the launcher, wait until the job is over, end what is left of it, and return the exit code."""
        for number in PASSED_ON:
            # nohup ignores SIGHUP: the launch outlives its terminal.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: self._signals.append(number))
        launch = self._launch
        try:
            launch.start()
            threading.Thread(target=self._give_signs_of_life, daemon=True).start()
            for line in launch.reports:
                self._report(line)
            pumps = [self._pump(*streams) for process in launch.processes.values() for streams in _streams(process)]
            while not self._is_over():
                self._wait_a_moment()
            # Not waited for without limit: a process on another host may hold them open.
            end = time.monotonic() + OUTPUT_SECONDS
            for pump in pumps:
                pump.join(timeout=max(0.0, end - time.monotonic()))
            ended = launch.ended()
            codes = [process.poll() for process in launch.processes.values()]
            code, cause = self._verdict(ended, codes)
            if code:
                self._end_everything()
            if cause:
                self._report(f"error: {cause}")
            return code
        finally:
            self._is_done.set()
            launch.close()

    def _give_signs_of_life(self) -> None:
        # In a thread: nothing that the watching waits for may make the hosts believe that they are cut off.
        while not self._is_done.wait(SIGN_SECONDS):
            self._launch.give_sign_of_life()

    def _wait_a_moment(self) -> None:
        running = next((process for process in self._launch.processes.values() if process.poll() is None), None)
        if running is not None:
            with suppress(subprocess.TimeoutExpired):
                running.wait(timeout=LOOK_SECONDS)

    def _is_over(self) -> bool:
        """Whether the launcher has ended, or has to be ended."""
        now = time.monotonic()
        while self._signals:
            # Without ranks there is nothing to save, unless they are just ending.
            if not self._pass_on(self._signals.pop(0)) and not self._seen_ranks:
                self._ended_before_ranks = True
                return True
        if all(process.poll() is not None for process in self._launch.processes.values()):
            return True
        with self._lock:
            ended = self._launch.ended()
        ranks = job_processes.Processes.of(self._launch.plan.mark).ranks
        if ranks:
            self._seen_ranks = True
        if ended and self._first_end is None:
            self._first_end = now
        if self._first_end is None:
            self._has_not_met = self._waits_for_ranks() and not self._seen_ranks and now > self._latest_start
            return self._has_not_met
        is_waiting = bool(ranks) or not any(ended.values())
        return now - self._first_end > (WITH_RANKS_SECONDS if is_waiting else WITHOUT_RANKS_SECONDS)

    def _waits_for_ranks(self) -> bool:
        """Whether ranks have to appear on this host. Slurm may let a step wait for its resources."""
        return not isinstance(self._launch, launchers.SlurmLaunch) and self._launch.plan.here is not None

    def _pass_on(self, number: int) -> bool:
        """Pass a signal on to the ranks. Returns whether there are any."""
        # The terminal was closed.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        name = job_processes.name_of(number)
        if job_processes.Processes.of(self._launch.plan.mark).ranks:
            self._seen_ranks = True
        if not self._seen_ranks and self._waits_for_ranks():
            self._passed_on = number
            return False
        try:
            were_signalled = self._launch.signal_ranks(number)
        except (RunError, OSError) as error:
            # The ranks go on, and the signal can be sent again.
            self._report(f"warning: {name}: not passed on to the ranks: {reason(error)}")
            return True
        self._passed_on = number
        if were_signalled:
            self._seen_ranks = True
            self._report(f"{name}: passed on to the ranks, which save and end")
        return were_signalled

    def _verdict(self, ended: dict[str, int], codes: Sequence[int | None]) -> tuple[int, str | None]:
        """The exit code of the job, and the line for it if it has failed."""
        root = self._launch.output.root_cause()
        if root is not None:
            stopped = root.exit_code in (128 + signal.SIGTERM, 128 + signal.SIGINT) and self._passed_on is not None
            return root.exit_code, None if stopped else self._reason_of(root)
        if self._passed_on is not None and self._ended_before_ranks:
            return 128 + self._passed_on, "ended before the ranks had started"
        # torchrun ends with 1 whatever the exit codes of the ranks are, srun with theirs.
        if self._passed_on is not None and 128 + self._passed_on in codes:
            return 128 + self._passed_on, None
        if self._has_not_met:
            return 1, self._why_not_met()
        failed = {host: code for host, code in ended.items() if code}
        if failed:
            host, code = next(iter(failed.items()))
            return self._code_of(code), self._cause_of(host, code)
        silent = [host.name for host in self._launch.plan.hosts if ended and host.name not in ended]
        if any(code is None for code in codes):
            lost = ", ".join(silent) or "the launcher"
            return 1, f"{lost}: still had not ended when the other hosts had; its connection may be lost"
        if any(codes):
            return self._code_of(next(code for code in codes if code)), self._cause_of("", 1)
        if isinstance(self._launch, launchers.ColossalaiLaunch) and not self._finished_line:
            return 1, "colossalai run ended without starting anything; its message is above"
        return 0, None

    def _reason_of(self, root: RankFailure) -> str:
        """Why a rank has failed: as it has reported it itself, or else as its partners or libraries have."""
        output = self._launch.output
        if root.message:
            return f"{root.host}: {root.message}"
        # A rank that ends with 1 in silence has ended because of another one, which a line of a rank names.
        if root.code == 1 and output.errors:
            return output.errors[0]
        hint = f" ({output.hints[0]})" if output.hints else ""
        return f"{root.host}: rank {root.rank} ended with exit code {root.exit_code}{hint}"

    def _why_not_met(self) -> str:
        plan = self._launch.plan
        return (
            f"no rank has started within --dist_timeout {plan.timeout_seconds:g} s; the hosts do not reach each other "
            f"at {plan.hosts[0].name}:{plan.port} (a firewall, or another address of that name there)"
        )

    @staticmethod
    def _code_of(code: int) -> int:
        return code if code > 0 else 128 - code

    def _cause_of(self, host: str, code: int) -> str:
        """Why the part of a host has failed, without a report of a rank."""
        output = self._launch.output
        where = f"{host}: " if host else ""
        failure = output.hosts.get(host)
        if failure is not None and not failure.was_connected:
            return f"{where}no ssh connection: {failure.reason} (ssh -o BatchMode=yes {host} true must work)"
        if isinstance(self._launch, launchers.TorchrunLaunch) and code == ssh.FAILED:
            return f"{where}no ssh connection, or it was lost (ssh -o BatchMode=yes {host} true must work)"
        if output.errors:
            return f"{where}{output.errors[0]}"
        if output.hints:
            return f"{where}{output.hints[0]}"
        return f"{where}ended with exit code {code}; the reason is above"

    def _end_everything(self) -> None:
        """End all processes of the launch, here and on each host that answers."""
        others: list[str] = []
        if not isinstance(self._launch, launchers.SlurmLaunch):
            others = self._launch.plan.other_destinations()
        for number in (signal.SIGTERM, signal.SIGKILL):
            # On all hosts at once. Who does not answer is not asked again.
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(self._signal, others, number)
                job_processes.signal_here(self._launch.plan.mark, number, only_ranks=False)
                end = time.monotonic() + TERMINATE_SECONDS
                processes = self._launch.processes.values()
                while time.monotonic() < end and any(process.poll() is None for process in processes):
                    time.sleep(LOOK_SECONDS)
            silent = asked.result()
            others = [host for host in others if host not in silent]
            if silent:
                self._report(f"warning: no answer from {', '.join(silent)}; processes of this launch may live on there")

    def _signal(self, others: list[str], number: int) -> list[str]:
        return job_processes.signal_hosts(others, self._launch.plan.mark, number, only_ranks=False)

    def _pump(self, source: IO[bytes], target: IO[bytes]) -> threading.Thread:
        thread = threading.Thread(target=self._copy, args=(source, target), daemon=True)
        thread.start()
        return thread

    def _copy(self, source: IO[bytes], target: IO[bytes]) -> None:
        for line in iter(lambda: source.readline(1 << 16), b""):
            # Whoever reads the output may be gone; the launcher must not notice.
            with suppress(OSError, ValueError):
                target.write(line)
                target.flush()
            text = line.decode(errors="replace")
            with self._lock:
                self._finished_line |= FINISHED in text
                # Slurm's tasks have no LOCAL_RANK, and none may be on this host.
                if isinstance(self._launch, launchers.SlurmLaunch) and not text.startswith("srun: "):
                    self._seen_ranks = True
                self._launch.output.read(text)

    def _report(self, text: str) -> None:
        # Its reader may have ended: Ctrl+C ends `tee` as well, and a closed terminal leaves nothing to write to.
        report_line(f"{self._name}: {text}")


def _streams(process: subprocess.Popen) -> list[tuple[IO[bytes], IO[bytes]]]:
    assert process.stdout is not None and process.stderr is not None
    return [(process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer)]


def dist_timeout(words: Sequence[str]) -> float:
    """The value of --dist_timeout among a script's arguments, the last of which counts; its default if it has none."""
    value = DEFAULT_TIMEOUT
    for place, word in enumerate(words):
        text = word.removeprefix("--dist_timeout=") if "=" in word else "".join(words[place + 1 : place + 2])
        if word.startswith("--dist_timeout"):
            with suppress(ValueError):
                value = float(text)
    return value


def parser() -> argparse.ArgumentParser:
    """The launcher's flags, then the script and its own flags."""
    flags = argparse.ArgumentParser(prog="watch_launch", description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--launcher", choices=launchers.LAUNCHES, default="colossalai")
    flags.add_argument("--hostfile", default="hostfile", help="not for slurm, which has the hosts of its job")
    flags.add_argument("--nproc_per_node", type=int, required=True, help="processes on each host")
    flags.add_argument("--master_port", type=int, default=30013, help="a free port of the first host")
    flags.add_argument("--max_restarts", type=int, default=0, help="for torchrun: how often ranks are started again")
    flags.add_argument("--pass_environment", default="", help="names of further variables for the hosts")
    flags.add_argument("--name", default="watch_launch", help="what messages begin with")
    flags.add_argument("words", nargs=argparse.REMAINDER, help="the script and its arguments")
    return flags


def cure_of(program: str) -> str:
    """What to do if a launcher's program is missing."""
    if program == "ssh":
        return "install OpenSSH's client (apt-get install openssh-client)"
    if program == "colossalai":
        return "activate the virtual environment (source .venv/bin/activate)"
    return "Slurm's commands must be on PATH on the first node of the job"


def plan_of(args: argparse.Namespace) -> Plan:
    """What to launch. Raises UserError for mistakes in the hostfile, the port, or flags that do not fit."""
    if args.max_restarts < 0:
        raise UserError(f"MAX_RESTARTS is {args.max_restarts}; give a whole number from 0 on")
    if args.max_restarts and args.launcher != "torchrun":
        raise UserError(f"MAX_RESTARTS={args.max_restarts} needs LAUNCHER=torchrun; {args.launcher} starts ranks once")
    if args.launcher == "slurm":
        hosts = launchers.slurm_hosts()
    else:
        hosts = list(hostfile.read_and_resolve(args.hostfile))
        hostfile.check_slots(args.hostfile, hosts, args.nproc_per_node)
        hostfile.launcher_lines(args.hostfile, hosts, "ssh" if args.launcher == "torchrun" else args.launcher)
    if not 0 < args.master_port <= hostfile.MAX_PORT:
        raise UserError(f"MASTER_PORT is {args.master_port}; give a port from 1 to {hostfile.MAX_PORT}")
    here = next((host for host in hosts if hostfile.is_this_host(host.name)), None)
    if here == hosts[0]:
        launchers.check_port(here, args.master_port)
    return Plan(
        hosts=hosts,
        per_host=args.nproc_per_node,
        port=args.master_port,
        words=args.words,
        mark=secrets.token_hex(8),
        here=here,
        max_restarts=args.max_restarts,
        pass_environment=args.pass_environment,
        timeout_seconds=dist_timeout(args.words),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Launch a script, and exit with the code of its job."""
    args = parser().parse_args(argv)
    with errors.one_line_errors(args.name):
        try:
            plan = plan_of(args)
        except HostfileError as error:
            for line in error.lines:
                show_line(f"{args.name}: error: {line}", file=sys.stderr)
            raise SystemExit(2) from error
        launch = launchers.LAUNCHES[args.launcher](plan, LaunchOutput())
        try:
            code = Watch(launch, args.name).run()
        except FileNotFoundError as error:
            raise UserError(f"no {error.filename} on PATH; {cure_of(error.filename)}") from error
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
