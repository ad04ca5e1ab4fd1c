"""Start one process per rank on the hosts, and report what each measured or where it stopped."""

import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from colossal_llama2.cluster import ssh
from colossal_llama2.cluster.doctor import survey
from colossal_llama2.cluster.doctor.exchange_worker import HOSTS, STAGES, WORKER_MARK
from colossal_llama2.cluster.doctor.finding import Finding, error, warning
from colossal_llama2.cluster.doctor.remote import SHELL, explained
from colossal_llama2.cluster.doctor.survey import Question
from colossal_llama2.cluster.hostfile import Host, is_this_host

WORKER = "colossal_llama2.cluster.doctor.exchange_worker"
# A link that is so many times slower than the median is reported.
SLOW_LINK = 5.0
# What decides the network of NCCL and gloo. PATH and the place of the package go with every script.
NETWORK_VARIABLES = ("NCCL_", "GLOO_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "UCX_")
# After the first rank has failed, others report their own fault if they have one.
AFTER_FAILURE_SECONDS = 2.0
LOOK_SECONDS = 0.05
# A rank that fails so long before the limit has found a fault; later ones have waited for another rank.
OWN_FAULT_SECONDS = 3.0
# What a rank has not done, by its last stage, and the cure.
NOT_DONE = {
    None: ("did not start", "run python -c 'import torch' there by hand"),
    "started": ("did not import torch", "if its disk is slow, give --dist_seconds more"),
    "imported": ("did not connect to {master} on MASTER_PORT={port}", "open that port in the firewall"),
    "met": ("did not connect to all others over gloo", "open all ports between the hosts, or set GLOO_SOCKET_IFNAME"),
    "joined": ("did not exchange data over gloo", "open all ports between the hosts, or set GLOO_SOCKET_IFNAME"),
    "gloo": (
        "did not exchange data over NCCL",
        "try NCCL_SOCKET_IFNAME, or NCCL_IB_DISABLE=1; NCCL_DEBUG=INFO shows more",
    ),
}


@dataclass
class Rank:
    """What is known of a rank.

    Attributes:
        number: its rank.
        stage: the last of STAGES that it reported; None before the first.
        figures: by stage, what it measured.
        problem: the error that ended it, and at what time.
    """

    number: int
    host: Host
    stage: str | None = None
    figures: dict[str, dict] = field(default_factory=dict)
    problem: str | None = None
    ended: float = 0.0

    def fail(self, problem: str) -> None:
        """Note why it ended."""
        self.problem, self.ended = problem, time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether it has reached the last stage."""
        return self.stage == STAGES[-1]


def exchange(
    hosts: Sequence[Host], question: Question, per_host: int, *, seconds: float, variables: Mapping[str, str]
) -> tuple[list[list[str]], list[Finding]]:
    """Run all ranks for at most `seconds`. Returns the rows of a table, empty if a rank failed, and the findings.

    Args:
        hosts: where; this host alone if there are none.
        variables: the environment, of which the network's variables are passed on.
    """
    places = list(hosts) or [Host(socket.gethostname())]
    ranks = [Rank(number, places[number // per_host]) for number in range(len(places) * per_host)]
    master = places[0].name if hosts else "localhost"
    passed = {name: value for name, value in variables.items() if name.startswith(NETWORK_VARIABLES)}
    passed |= {"MASTER_ADDR": master, "MASTER_PORT": str(question.port), "WORLD_SIZE": str(len(ranks))}
    # By which a rank finds its interface; the last one besides, where the first host is its own.
    passed[HOSTS] = f"{master} {places[-1].name}" if hosts else master
    end = time.monotonic() + seconds
    processes, threads = [], []
    try:
        for number, host in enumerate(places):
            script = _script(question, passed, number * per_host, per_host, seconds)
            process = _start(host if hosts and not is_this_host(host.name) else None)
            processes.append(process)
            of_host = ranks[number * per_host : (number + 1) * per_host]
            threads.append(threading.Thread(target=_follow, args=(process, script, ranks, of_host), daemon=True))
            threads[-1].start()
        _wait(ranks, end)
        faults = _faults(ranks, master, question.port, seconds, end)
        rows = [] if faults else _rows(ranks)
    finally:
        for process in processes:
            # On this host, all ranks; on others, the kernel ends them at the limit.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return rows, faults or _slow_links(ranks)


def _start(host: Host | None) -> subprocess.Popen:
    words = ["sh", "-s"] if host is None else ssh.command(host.destination, SHELL)
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def _script(question: Question, variables: Mapping[str, str], first: int, per_host: int, seconds: float) -> str:
    """A script for sh that starts the ranks of a host, and waits for them. They end by themselves at the limit."""
    lines = [*survey.entering(question), *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]
    for local_rank in range(per_host):
        lines.append(
            f"RANK={first + local_rank} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={per_host} "
            f"{shlex.quote(question.python)} -m {WORKER} {seconds:g} </dev/null &"
        )
    return "\n".join([*lines, "wait", ""])


def _follow(process: subprocess.Popen, script: str, ranks: Sequence[Rank], of_host: Sequence[Rank]) -> None:
    """Send a host its script, and note what its ranks report."""
    assert process.stdin and process.stdout and process.stderr
    last_words: list[str] = []
    errors = process.stderr
    reader = threading.Thread(target=lambda: last_words.extend(_text_lines(errors)), daemon=True)
    reader.start()
    with suppress(OSError):
        process.stdin.write(script.encode(errors="surrogateescape"))
        process.stdin.close()
    for line in _text_lines(process.stdout):
        if line.startswith(WORKER_MARK):
            with suppress(ValueError, KeyError, IndexError):
                note = json.loads(line.removeprefix(WORKER_MARK))
                rank = ranks[note["rank"]]
                if "problem" in note:
                    rank.fail(note["problem"])
                else:
                    rank.stage, rank.figures[note["stage"]] = note["stage"], note
    reader.join(1)
    trouble = "\n".join(last_words)
    for rank in of_host:
        if not rank.is_done and rank.problem is None:
            unreached = rank.stage is None and process.poll() not in (None, 0)
            what = explained(trouble, rank.host) if unreached else f"ended early ({(last_words or ['no message'])[-1]})"
            rank.fail(what)


def _text_lines(stream: IO[bytes]) -> Iterator[str]:
    return (line.decode(errors="replace").strip() for line in stream)


def _wait(ranks: Sequence[Rank], end: float) -> None:
    """Until all ranks are done, or one has failed and the others had time to report, or the time is over."""
    while time.monotonic() < end and not all(rank.is_done for rank in ranks):
        if any(rank.problem for rank in ranks):
            end = min(end, time.monotonic() + AFTER_FAILURE_SECONDS)
            if all(rank.is_done or rank.problem for rank in ranks):
                return
        time.sleep(LOOK_SECONDS)


def _faults(ranks: Sequence[Rank], master: str, port: int | None, seconds: float, end: float) -> list[Finding]:
    """The fault where it begins: the rank that failed first, or those that got least far while the others waited."""
    failed = [rank for rank in ranks if not rank.is_done]
    own = [rank for rank in failed if rank.problem and rank.ended < end - OWN_FAULT_SECONDS]
    if own:
        first = min(own, key=lambda rank: rank.ended)
        return [_fault(first, master, port, f" ({first.problem})")]
    order = (None, *STAGES)
    earliest = min((order.index(rank.stage) for rank in failed), default=0)
    return [
        _fault(rank, master, port, f" within {seconds:g} s") for rank in failed if order.index(rank.stage) == earliest
    ]


def _fault(rank: Rank, master: str, port: int | None, how: str) -> Finding:
    what, cure = NOT_DONE[rank.stage]
    what = what.format(master=master, port=port)
    return error(f"{rank.host.name}: rank {rank.number}", f"{what}{how}; {cure}")


def _slow_links(ranks: Sequence[Rank]) -> list[Finding]:
    """A warning for each rank that receives much slower than the others."""
    found = []
    for kind, name in (("gloo", "gloo"), ("nccl", "NCCL")):
        rates = [rank.figures.get(kind, {}).get("receive", 0.0) for rank in ranks]
        usual = statistics.median(rates)
        for rank, rate in zip(ranks, rates, strict=True):
            if rate * SLOW_LINK < usual:
                before = ranks[rank.number - 1].host.name
                text = f"receives {_rate(rate)} from {before} over {name}, others {_rate(usual)}"
                cure = "check cable, port speed (ethtool) and interface of both"
                found.append(warning(f"{rank.host.name}: rank {rank.number}", f"{text}; {cure}"))
    return found


def _rows(ranks: Sequence[Rank]) -> list[list[str]]:
    """For each rank and kind of network: interface, latency, and megabytes per second."""
    rows = [["rank", "host", "network", "interface", "latency", "all-reduce", "from the rank before"]]
    for rank in ranks:
        for kind in ("gloo", "nccl"):
            figures = rank.figures.get(kind, {})
            if "interface" in figures:
                rows.append(
                    [
                        str(rank.number),
                        rank.host.name,
                        kind.replace("nccl", "NCCL"),
                        figures["interface"],
                        f"{figures['latency'] * 1000:.2f} ms",
                        _rate(figures["all_reduce"]),
                        _rate(figures["receive"]) if figures["receive"] else "",
                    ]
                )
    return rows


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:,.1f} GB/s"
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
