"""Check the hosts of a job before it is launched: each fault as one line with its cure.

    python -m colossal_llama2.train.doctor --hostfile hostfile --nproc_per_node 8 \\
        train.py --pretrained llama-2-7b-zh --dataset arrow/part-00000 --save_dir runs/first

asks all hosts at once, over ssh and over fabric, the library of `colossalai run`, or by srun with --launcher slurm;
without --hostfile it checks this host alone. It prints a table of the hosts and ends with code 2 if there is an error,
else with 0. It imports no torch, and leaves nothing behind.

--dist also starts the processes and lets them exchange data, over gloo and over NCCL where GPUs are, for at most
--dist_seconds in all.

--quick is what train.sh runs before each launch: no table, and no contents of model and data are read, only names and
sizes. It takes one or two seconds on healthy hosts, 10 s if one does not answer, and at most 20 s, plus 0.1 s per host.
"""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from colossal_llama2 import errors, tables
from colossal_llama2.cli import cluster_flags
from colossal_llama2.cli.value_types import task_list
from colossal_llama2.cluster.doctor import survey, variables
from colossal_llama2.cluster.doctor.finding import GIB, Finding
from colossal_llama2.cluster.doctor.findings import all_findings
from colossal_llama2.cluster.doctor.survey import Probe, Question, Reply
from colossal_llama2.cluster.hostfile import (
    Host,
    HostfileError,
    check_slots,
    is_loopback,
    is_this_host,
    launcher_lines,
    read_and_resolve,
)
from colossal_llama2.cluster.launchers import slurm_hosts
from colossal_llama2.plurals import counted
from colossal_llama2.task_names import ICL
from colossal_llama2.terminal_text import show, show_line
from colossal_llama2.train.before_launch import PARSERS
from colossal_llama2.train.run_folder.file_names import LOCK_NAME
from colossal_llama2.train.run_folder.lock_record import read_record

# Configurations, tokenizers and manifests are smaller, weights and samples larger.
HASHED_BYTES = 8 << 20
# Without --quick, reading model and data may take longer than the rest of the report.
PATH_SECONDS = 120.0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, ask the hosts, and report."""
    args, given = parse(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    with errors.one_line_errors("doctor"):
        question = question_of(args, given)
        hosts = read_hosts(args)
        replies, found = examine(hosts, question, args.nproc_per_node)
        # train.sh reports itself which variables it withholds.
        if len(hosts) > 1 and args.launcher == "colossalai" and not args.quick:
            found += variables.findings(os.environ)
        if not args.quick:
            tables.print_table(table_rows(replies, found), align="l")
            sys.stdout.flush()
        found += checked_together(hosts, question, args, found)
        report(found, counted(max(len(hosts), 1), "host"), time.monotonic() - started)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace | None]:
    """The doctor's own flags, and those of the script whose name follows them, if there is one."""
    place = next((number for number, word in enumerate(argv) if word in PARSERS), len(argv))
    args = cluster_flags.doctor_parser().parse_args(argv[: place + 1])
    return args, PARSERS[args.script]().parse_args(argv[place + 1 :]) if args.script else None


def read_hosts(args: argparse.Namespace) -> list[Host]:
    """The hosts of --hostfile, or the nodes of the Slurm job, or none.

    Prints each mistake in the file on a line of its own and exits with 2. Raises UserError for flags that exclude each
    other.
    """
    if args.launcher == "slurm":
        return _without_this(_nodes(args))
    if args.hostfile is None:
        return []
    try:
        hosts = list(read_and_resolve(args.hostfile))
        launcher_lines(args.hostfile, hosts, _started_by(args))
        if args.nproc_per_node is not None:
            check_slots(args.hostfile, hosts, args.nproc_per_node)
    except HostfileError as error:
        for line in error.lines:
            show_line(f"doctor: error: {line}", file=sys.stderr)
        raise SystemExit(2) from error
    return _without_this(hosts)


def _nodes(args: argparse.Namespace) -> list[Host]:
    if args.hostfile is not None:
        raise errors.UserError("--hostfile has no effect with --launcher slurm, which checks the nodes of the job")
    if args.dist:
        raise errors.UserError(
            "--dist starts its processes over ssh, and --launcher slurm uses none; give --launcher torchrun and a "
            "--hostfile where the nodes reach each other by ssh, or leave --dist out"
        )
    return slurm_hosts()


def _without_this(hosts: list[Host]) -> list[Host]:
    """No hosts if this one is the only one: launchers need no connection to it."""
    return [] if len(hosts) == 1 and is_this_host(hosts[0].name) else hosts


def question_of(args: argparse.Namespace, given: argparse.Namespace | None) -> Question:
    """What the hosts are asked, by the flags of the doctor and those given to the script."""
    question = survey.here(_started_by(args))
    question = dataclasses.replace(
        question, port=args.master_port, hash_bytes=0 if args.quick else HASHED_BYTES, scripts=list(PARSERS)
    )
    if not args.quick:
        question = dataclasses.replace(question, path_seconds=PATH_SECONDS)
    if given is None:
        return question
    paths = [given.pretrained, *map(_without_name, given.dataset), *map(_without_name, given.eval_dataset or ())]
    paths += [given.load_checkpoint] if given.load_checkpoint else []
    paths += [path for _, path in task_list(given.eval_tasks or ICL) if path]
    save_dir = Path(given.save_dir)
    return dataclasses.replace(
        question, paths=list(dict.fromkeys(paths)), save_dir=save_dir, lock_owner=lock_owner(save_dir)
    )


def _started_by(args: argparse.Namespace) -> str:
    """What starts the first process on another host."""
    return "ssh" if args.launcher == "torchrun" else str(args.launcher)


def _without_name(given: str) -> str:
    """PATH of NAME=PATH; an existing folder with "=" in its name is a path."""
    name, sign, path = given.partition("=")
    return path if sign and "/" not in name and not Path(given).exists() else given


def lock_owner(save_dir: Path) -> dict | None:
    """Who holds, or held, the lock of --save_dir; None if there is none that can be read."""
    try:
        with open(save_dir / LOCK_NAME, "rb") as file:
            record = read_record(file.fileno())
    except OSError:
        return None
    if record is None:
        return None
    names = ("host", "pid", "since", "ending", "kernel", "processes")
    return {name: getattr(record, name) for name in names}


def examine(hosts: Sequence[Host], question: Question, per_host: int | None) -> tuple[list[Reply], list[Finding]]:
    """Ask all hosts, or this one if there are none, and compare what they report."""

    def ask(probe: Probe | None) -> list[Reply]:
        return survey.ask_all(hosts, question, probe) if hosts else [survey.ask_here(question, probe)]

    probe = None
    if question.save_dir is None:
        replies = ask(None)
    else:
        with survey.probe_file(question.save_dir) as probe:
            replies = ask(probe)
    found = all_findings(replies, question, probe, os.environ, per_host)
    return replies, found


def checked_together(
    hosts: Sequence[Host], question: Question, args: argparse.Namespace, found: Sequence[Finding]
) -> list[Finding]:
    """With --dist, start a process per rank and print what they measure. Not after an error."""
    if not args.dist:
        return []
    if any(finding.kind == "error" for finding in found):
        return [Finding("warning", "--dist was not tried; correct the errors first")]
    from colossal_llama2.cluster.doctor import exchange

    rows, faults = exchange.exchange(
        hosts, question, args.nproc_per_node or 1, seconds=args.dist_seconds, variables=os.environ
    )
    if rows:
        show("")
        tables.print_table(rows, align="llllr")
        sys.stdout.flush()
    return faults


def table_rows(replies: Sequence[Reply], found: Sequence[Finding]) -> list[list[str]]:
    """A row for each host, with what it reported."""
    rows = [["host", "result", "Python", "torch", "colossalai", "GPUs", "interface", "free"]]
    for reply in replies:
        report = reply.report or {}
        mine = [finding.kind for finding in found if finding.text.startswith(f"{reply.host.name}: ")]
        result = "error" if "error" in mine else "warning" if mine else "ok"
        software, network = report.get("software", {}), report.get("network", {})
        versions = software.get("versions", {})
        free = (report.get("save_folder") or {}).get("free")
        rows.append(
            [
                reply.host.name,
                result,
                software.get("python", ""),
                versions.get("torch") or "",
                versions.get("colossalai") or "",
                _gpus_cell(report.get("gpus", {}).get("list")),
                _interface(network),
                f"{free / GIB:,.0f} GiB" if free is not None else "",
            ]
        )
    return _without_empty_columns(rows)


def _interface(network: dict) -> str:
    """The interface that leads to the first host; "" for a host alone."""
    address, name = network.get("route") or ("", None)
    return "" if is_loopback(address) or name is None else name


def _gpus_cell(gpus: list | None) -> str:
    if not gpus:
        return "" if gpus is None else "none"
    return f"{len(gpus)} {gpus[0][0].removeprefix('NVIDIA ').partition('-')[0]}"


def _without_empty_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    kept = [number for number in range(len(rows[0])) if any(row[number] for row in rows[1:])]
    return [[row[number] for number in kept] for row in rows]


def report(found: Sequence[Finding], hosts: str, seconds: float) -> None:
    """Print all findings, errors first, and a summary. Exits with 2 if there is an error."""
    for kind in ("error", "warning"):
        for finding in found:
            if finding.kind == kind:
                show_line(f"doctor: {kind}: {finding.text}", file=sys.stderr)
    count = {kind: sum(finding.kind == kind for finding in found) for kind in ("error", "warning")}
    summary = ", ".join(counted(number, kind) for kind, number in count.items() if number) or "no fault found"
    show_line(f"doctor: {hosts}: {summary} ({seconds:.1f} s)", file=sys.stderr if count["error"] else sys.stdout)
    if count["error"]:
        raise SystemExit(2)


if __name__ == "__main__":
    main()
