"""What is wrong with the hosts of a job, by their reports: one line for each fault, with its cure.

A fault is named once, where it begins. A host without a report is not compared, and what follows from another fault is
left out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from colossal_llama2.cluster.doctor.file_findings import paths_findings, save_folder_findings
from colossal_llama2.cluster.doctor.finding import Finding, error, part_of, warning
from colossal_llama2.cluster.doctor.network_findings import interfaces_findings, port_findings, route_findings
from colossal_llama2.cluster.doctor.software_findings import gpus_findings, software_findings
from colossal_llama2.cluster.doctor.survey import REPORT_SECONDS, Probe, Question, Reply

# Files and locks carry times of several hosts.
ALLOWED_SKEW_SECONDS = 5.0


def all_findings(
    replies: Sequence[Reply],
    question: Question,
    probe: Probe | None,
    variables: Mapping[str, str],
    per_host: int | None,
) -> list[Finding]:
    """All findings about the hosts.

    Args:
        variables: the environment that the processes are going to get.
        per_host: number of processes per host, if it is known.
    """
    found = [finding for reply in replies for finding in _reachability(reply, question)]
    able = [reply for reply in replies if reply.report is not None and "missing" not in reply.report]
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: _unfinished_parts(able, question),
        lambda: _same_names(able),
        lambda: _shells(able, question),
        lambda: _clocks(able),
        lambda: software_findings(able, per_host),
        lambda: gpus_findings(able, per_host),
        lambda: paths_findings(able, question),
        lambda: save_folder_findings(able, question, probe),
        lambda: route_findings(able, replies, variables),
        lambda: interfaces_findings(able, variables),
        lambda: port_findings(able, replies, question),
    ]
    for check in checks:
        found += check()
    return found


def _reachability(reply: Reply, question: Question) -> Iterator[Finding]:
    name, ssh, fabric = reply.host.name, reply.ssh_problem, reply.fabric_problem
    if not reply.needs_ssh and (ssh or fabric):
        yield warning(name, f"{ssh or fabric}; it is this host, so the launch itself does not need it")
    elif ssh and fabric:
        # The two word the same trouble differently.
        yield error(name, ssh)
    elif ssh:
        yield error(name, f"reached by fabric, but not by ssh: it {ssh}" if question.launcher == "colossalai" else ssh)
    elif fabric:
        yield error(
            name,
            f"reached by ssh, but not by fabric, which colossalai run uses: it {fabric}; or launch with "
            "LAUNCHER=torchrun",
        )
    elif reply.report is None and reply.problem:
        yield error(name, reply.problem)
    missing = (reply.report or {}).get("missing")
    if missing == "folder":
        yield error(
            name,
            f"has no folder {question.folder}; put the same files at the same path on each host, or share the folder",
        )
    elif missing == "python":
        yield error(
            name,
            f"has no {question.python}; install the same environment there at the same path, or share it",
        )


# What a part of the report is about.
PARTS = {
    "port": "the check of MASTER_PORT",
    "host": "the check of names and the login shell",
    "software": "the check of the packages",
    "gpus": "the check of the GPUs",
    "paths": "comparing model and data",
    "save_folder": "the check of --save_dir",
    "network": "the check of the network",
}
# What only takes long does not prevent training: many files, or slow answers of DNS.
MAY_BE_SLOW = ("host", "gpus", "paths", "network")


def _unfinished_parts(able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    for reply in able:
        report = reply.report or {}
        for part, what in PARTS.items():
            seconds = question.path_seconds if part == "paths" else REPORT_SECONDS
            if part not in report and part in MAY_BE_SLOW:
                cause = "the doctor without --quick takes more time" if part == "paths" else "look there for slow DNS"
                yield warning(reply.host.name, f"{what} took more than {seconds:g} s and was left out; {cause}")
            elif part not in report:
                yield error(
                    reply.host.name,
                    f"{what} did not end within {seconds:g} s; check there for a file system that hangs (df)",
                )
            elif isinstance(report[part], dict) and "failed" in report[part]:
                yield error(reply.host.name, f"{what} failed ({report[part]['failed']}); repeat it there by hand")


def _same_names(able: Sequence[Reply]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for reply in able:
        own = part_of(reply, "host").get("name")
        if own in first:
            yield error(
                reply.host.name,
                f"its own name is {own}, as on {first[own]}; remove one of the lines if both are one host, else give "
                "each a name of its own (hostnamectl set-hostname)",
            )
        elif own:
            first[own] = reply.host.name


def _shells(able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    for reply in able if question.launcher == "colossalai" else ():
        part = part_of(reply, "host")
        if part.get("shell_problem"):
            yield error(
                reply.host.name,
                f"the login shell {part['shell']} does not run what colossalai run sends ({part['shell_problem']}); "
                f"chsh -s /bin/bash {part['user']} there",
            )


def _clocks(able: Sequence[Reply]) -> Iterator[Finding]:
    for reply in able:
        skew = clock_skew(reply)
        if abs(skew) > ALLOWED_SKEW_SECONDS:
            direction = "ahead of" if skew > 0 else "behind"
            yield error(
                reply.host.name,
                f"its clock is {abs(skew):,.0f} s {direction} this host's; start chrony or ntpd on each host",
            )


def clock_skew(reply: Reply) -> float:
    """Seconds by which the host's clock is certainly ahead (or behind, if negative)."""
    report = reply.report or {}
    if "started" not in report or "ended" not in report:
        return 0.0
    return max(report["ended"] - reply.received, 0.0) + min(report["started"] - reply.sent, 0.0)
