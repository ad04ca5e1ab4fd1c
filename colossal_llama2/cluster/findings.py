"""What is wrong with the hosts of a job, by their reports: one line for each fault, with its cure.

A fault is named once, where it begins. A host without a report is not compared, and what follows from another fault is
left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_llama2.cluster.hostfile import is_loopback
from colossal_llama2.cluster.survey import Probe, Question, Reply
from colossal_llama2.plurals import counted

# Files and locks carry times of several hosts.
ALLOWED_SKEW_SECONDS = 5.0
# Weights, fp32 weights and two moments of Adam, for a model stored in 2 bytes per weight.
CHECKPOINT_TO_MODEL = 7
# NCCL's buffers for the processes of a host. Containers have 64 MiB by default.
LEAST_SHARED_MEMORY = 1 << 30
GPU_IN_USE_MIB = 1024
GIB = 1 << 30
FEW = 3


@dataclass(frozen=True)
class Finding:
    """One line of the result. Errors prevent training or make it wrong; a warning needs a look."""

    kind: str
    text: str


def error(place: str, text: str) -> Finding:
    """A fault of a host."""
    return Finding("error", f"{place}: {text}")


def warning(place: str, text: str) -> Finding:
    """A doubt about a host."""
    return Finding("warning", f"{place}: {text}")


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
        lambda: _unfinished_parts(able),
        lambda: _same_names(able),
        lambda: _shells(able, question),
        lambda: _clocks(able),
        lambda: _software(able, question),
        lambda: _gpus(able, per_host),
        lambda: _paths(able, question),
        lambda: _save_folder(able, question, probe),
        lambda: _names_and_routes(able, replies, variables),
        lambda: _interfaces(able, variables),
        lambda: _port(able, replies, question),
    ]
    for check in checks:
        found += check()
    return found


def _part(reply: Reply, name: str) -> dict[str, Any]:
    """A part of a report; empty if it failed or did not end, which `_unfinished_parts` reports."""
    part = (reply.report or {}).get(name)
    return part if isinstance(part, dict) and "failed" not in part else {}


def _reachability(reply: Reply, question: Question) -> Iterator[Finding]:
    name, ssh, fabric = reply.host.name, reply.ssh_problem, reply.fabric_problem
    if ssh and fabric:
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


def _unfinished_parts(able: Sequence[Reply]) -> Iterator[Finding]:
    for reply in able:
        report = reply.report or {}
        for part, what in PARTS.items():
            if part not in report:
                yield error(
                    reply.host.name, f"{what} did not end in time; check there for a file system that hangs (df)"
                )
            elif isinstance(report[part], dict) and "failed" in report[part]:
                yield error(reply.host.name, f"{what} failed ({report[part]['failed']}); repeat it there by hand")


PARTS = {
    "port": "the check of MASTER_PORT",
    "host": "the check of the host",
    "software": "the check of the packages",
    "gpus": "the check of the GPUs",
    "paths": "reading model and data",
    "save_folder": "the check of --save_dir",
    "network": "the check of the network",
}


def _same_names(able: Sequence[Reply]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for reply in able:
        own = _part(reply, "host").get("name")
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
        part = _part(reply, "host")
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


def _software(able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    parts = {reply.host.name: _part(reply, "software") for reply in able}
    parts = {name: part for name, part in parts.items() if part}
    yield from _different({name: part["python"] for name, part in parts.items()}, "Python")
    for package in next(iter(parts.values()), {}).get("versions", ()):
        yield from _different({name: part["versions"].get(package) for name, part in parts.items()}, package)
    for name, part in parts.items():
        if part["torchrun"] is None and part["versions"].get("torch") is not None:
            yield error(
                name, "torchrun is not on PATH; activate the environment before the launch (source .venv/bin/activate)"
            )
    yield from _different_files(parts)


def _different(values: Mapping[str, str | None], what: str) -> Iterator[Finding]:
    """A line for each host with another version than most."""
    if len(set(values.values())) < 2:
        return
    usual = _most_common(list(values.values()))
    others = _some([name for name, value in values.items() if value == usual])
    for name, value in values.items():
        if value != usual:
            has = f"{what} {value}" if value else f"no {what}"
            yield error(
                name,
                f"has {has}, but {others} {usual or f'none of {what}'}; install requirements.txt again on each host",
            )


def _different_files(parts: Mapping[str, dict]) -> Iterator[Finding]:
    packages = {name: {**(part["package"] or {}), **part["scripts"]} for name, part in parts.items()}
    usual = _most_common([tuple(sorted(files.items())) for files in packages.values()])
    others = _some([name for name, files in packages.items() if tuple(sorted(files.items())) == usual])
    for name, files in packages.items():
        if not parts[name]["package"]:
            yield error(name, "Python does not find the package colossal_llama2 in this folder; copy all files there")
        elif usual is not None and tuple(sorted(files.items())) != usual:
            differing = sorted({key for key, _ in set(files.items()) ^ set(usual)})
            yield error(
                name,
                f"has another version of colossal_llama2 than {others} ({_some(differing)}); copy the same files to "
                "each host",
            )


def _gpus(able: Sequence[Reply], per_host: int | None) -> Iterator[Finding]:
    lists: dict[str, list] = {
        reply.host.name: _part(reply, "gpus")["list"] for reply in able if "list" in _part(reply, "gpus")
    }
    if not any(lists.values()):
        return
    counts = {name: len(rows) for name, rows in lists.items()}
    usual = _most_common(list(counts.values()))
    for name, count in counts.items():
        if per_host is not None and count < per_host:
            yield error(
                name,
                f"has {counted(count, 'GPU')} for {per_host} processes; set NPROC_PER_NODE, or check it (nvidia-smi)",
            )
        elif per_host is None and count != usual:
            yield warning(name, f"has {counted(count, 'GPU')}, but others {usual}; check it there (nvidia-smi)")
    filled = {name: rows for name, rows in lists.items() if rows}
    for column, what in ((0, "the GPU"), (1, "the driver")):
        kinds = {name: "+".join(sorted({row[column] for row in rows})) for name, rows in filled.items()}
        most = _most_common(list(kinds.values()))
        for name, kind in kinds.items():
            if kind != most:
                yield warning(name, f"{what} is {kind}, but {most} on others; the slowest decides, and NCCL may fail")
    for name, rows in filled.items():
        busy = [str(index) for index, row in enumerate(rows) if row[3].isdecimal() and int(row[3]) > GPU_IN_USE_MIB]
        if busy:
            yield warning(name, f"another program uses GPU {', '.join(busy)}; end it (nvidia-smi lists it)")
    for reply in able:
        shared = _part(reply, "host").get("shared_memory")
        if lists.get(reply.host.name) and shared is not None and shared < LEAST_SHARED_MEMORY:
            yield warning(
                reply.host.name,
                f"/dev/shm has {shared >> 20} MiB; start the container with --shm-size 1g or --ipc host",
            )


def _paths(able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    for path in question.paths:
        contents = {reply.host.name: _part(reply, "paths").get(path) for reply in able if path in _part(reply, "paths")}
        absent = [name for name, content in contents.items() if content is None]
        there = {name: content["files"] for name, content in contents.items() if content is not None}
        for name in absent:
            cure = "copy it to the same path on each host, or share the folder" if there else "check the flag"
            yield error(name, f"has no {path}; {cure}")
        keys = {name: _key(contents[name]) for name in there}
        usual = _most_common(list(keys.values()))
        model = next((name for name in there if keys[name] == usual), None)
        for name, files in there.items():
            if model is not None and keys[name] != usual:
                other = there[model]
                differing = sorted(file for file in {*files, *other} if files.get(file) != other.get(file))
                yield error(
                    name,
                    f"{path} differs from that on {model} ({_some(differing) or 'one of many files'}); copy it again",
                )


def _key(content: Any) -> str:
    return repr((sorted(content["files"].items()), content.get("rest")))


def _save_folder(able: Sequence[Reply], question: Question, probe: Probe | None) -> Iterator[Finding]:
    if probe is None:
        return
    if probe.problem:
        yield error("this host", f"--save_dir {question.save_dir}: cannot write to {probe.folder} ({probe.problem})")
        return
    parts = {reply.host.name: _part(reply, "save_folder") for reply in able}
    for name, part in parts.items():
        if part and not part["sees_probe"]:
            yield error(
                name,
                f"--save_dir {question.save_dir}: files that this host writes to {probe.folder} do not appear there; "
                "give a folder that all hosts share",
            )
        elif part and part["write_problem"]:
            yield error(
                name,
                f"--save_dir {question.save_dir}: cannot write to {probe.folder} ({part['write_problem']}); change its "
                "owner or rights there, or make room",
            )
    yield from _locks(parts, question)
    yield from _room(parts, able, question)


def _locks(parts: Mapping[str, dict], question: Question) -> Iterator[Finding]:
    unlocked = [name for name, part in parts.items() if part and part["sees_probe"] and part["flock"] != "held"]
    if unlocked:
        yield warning(
            _some(unlocked),
            f"--save_dir {question.save_dir}: locks of one host are not seen there, so two runs could write at a time; "
            "mount it with locks (NFS: without nolock, local_lock=none; Lustre: -o flock)",
        )
    owner = question.lock_owner
    if owner is None:
        return
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    states = [part["owner_alive"] for part in parts.values() if part and part["owner_alive"] is not None]
    place = f"--save_dir {question.save_dir}"
    if True in states:
        yield error(place, f"{who} is writing to it; wait until that run has ended, or stop it, or give another folder")
    elif False in states:
        yield warning(place, f".lock was left by {who}, which has died; the next run replaces it, or remove it by hand")
    else:
        yield warning(
            place, f".lock is of {who}, none of these hosts; if that run is dead, remove {question.save_dir}/.lock"
        )


def _room(parts: Mapping[str, dict], able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    sizes = [_part(reply, "paths").get(question.paths[0]) for reply in able[:1] if question.paths]
    needed = next((content["bytes"] for content in sizes if content), 0)
    for name, part in parts.items():
        if not part or part["free"] is None:
            continue
        free = part["free"]
        if free < needed:
            yield error(
                name,
                f"--save_dir {question.save_dir}: {free / GIB:.1f} GiB are free, less than the model's "
                f"{needed / GIB:.1f} GiB; make room",
            )
            return
        if free < CHECKPOINT_TO_MODEL * needed:
            yield warning(
                name,
                f"--save_dir {question.save_dir}: {free / GIB:.1f} GiB are free, about what one checkpoint takes "
                f"({CHECKPOINT_TO_MODEL * needed / GIB:.1f} GiB with the optimizer); make room, or use --keep_last",
            )
            return


def _names_and_routes(
    able: Sequence[Reply], replies: Sequence[Reply], variables: Mapping[str, str]
) -> Iterator[Finding]:
    if len(replies) < 2:
        return
    master = replies[0].host
    named = variables.get("GLOO_SOCKET_IFNAME")
    for reply in able:
        name, own, network = reply.host.name, _part(reply, "host"), _part(reply, "network")
        loopback = [address for address in own.get("addresses", ()) if is_loopback(address)]
        if loopback and not named:
            route = network.get("route")
            yield error(
                name,
                f"its own name {own['name']} has the address {loopback[0]}, which gloo would use; write its network "
                f"address before that name in /etc/hosts, or set GLOO_SOCKET_IFNAME={route[1] if route else 'eth0'}",
            )
        if own.get("name_problem") and not named:
            yield warning(
                name, f"its own name {own['name']} has no address ({own['name_problem']}); write it into /etc/hosts"
            )
        if network.get("master_problem"):
            yield error(
                name,
                f"cannot find {master.name} ({network['master_problem']}); write its address into /etc/hosts or DNS",
            )
        elif reply is not replies[0] and network and any(map(is_loopback, network["master_addresses"])):
            yield error(
                name, f"{master.name} has the address {network['master_addresses'][0]} there; correct /etc/hosts there"
            )


def _interfaces(able: Sequence[Reply], variables: Mapping[str, str]) -> Iterator[Finding]:
    for reply in able:
        network = _part(reply, "network")
        if not network:
            continue
        there = network["interfaces"]
        for variable, prefixes in (("GLOO_SOCKET_IFNAME", False), ("NCCL_SOCKET_IFNAME", True)):
            value = variables.get(variable, "")
            problem = _interface_problem(value, there, prefixes=prefixes)
            if problem:
                yield error(
                    reply.host.name,
                    f"{variable}={value}: {problem}; it has {', '.join(there)}; give one of every host, or unset it",
                )
        value = variables.get("NCCL_IB_HCA", "")
        adapters = network["adapters"]
        problem = _interface_problem(value, dict.fromkeys(adapters, "up"), prefixes=True, ports=True)
        if problem and variables.get("NCCL_IB_DISABLE", "0") != "1":
            has = f"it has {', '.join(adapters)}" if adapters else "it has no InfiniBand adapter"
            yield error(reply.host.name, f"NCCL_IB_HCA={value}: {problem}; {has}; give what ibstat lists, or unset it")
        locked = _part(reply, "host").get("locked_memory")
        if adapters and locked is not None and locked < GIB:
            yield warning(
                reply.host.name,
                f"locked memory is limited to {locked >> 10} KiB, too little for InfiniBand; ulimit -l unlimited",
            )


def _interface_problem(value: str, there: Mapping[str, str], *, prefixes: bool, ports: bool = False) -> str | None:
    """Why none of the interfaces that a variable selects can be used; None if one can, or if nothing is selected.

    Args:
        there: the interfaces of the host, and the state of each.
        prefixes: whether names are prefixes, as NCCL has them: `^` before the list excludes, `=` makes names exact.
        ports: whether `:PORT` may follow a name.
    """
    exact = not prefixes or value.startswith(("=", "^="))
    excludes = prefixes and value.startswith("^")
    words = [word.strip() for word in value.lstrip("^=").split(",") if word.strip()]
    if not words:
        return None
    if ports:
        words = [word.partition(":")[0] for word in words]

    def chosen(word: str) -> list[str]:
        return [name for name in there if (name == word if exact else name.startswith(word))]

    if excludes:
        left = [name for name in there if not any(name in chosen(word) for word in words)]
        return None if any(name != "lo" for name in left) else "it excludes every interface"
    found = [chosen(word) for word in words]
    # gloo opens all that it is given; NCCL uses what it finds.
    absent = [word for word, names in zip(words, found, strict=True) if not names]
    if absent and (not prefixes or not any(found)):
        return f"no {absent[0]} there"
    down = [name for names in found for name in names if there[name] == "down"]
    return f"{down[0]} is down" if down and len(down) == sum(map(len, found)) else None


def _port(able: Sequence[Reply], replies: Sequence[Reply], question: Question) -> Iterator[Finding]:
    if question.port is None or not replies or replies[0] not in able:
        return
    master = replies[0].host.name
    serving = _part(replies[0], "port")
    if serving.get("problem"):
        yield error(
            master,
            f"MASTER_PORT={question.port} cannot be used ({serving['problem']}); see who has it (ss -ltnp), or set "
            "another",
        )
        return
    for reply in able[1:] if serving else ():
        problem, network = _part(reply, "port").get("problem"), _part(reply, "network")
        leads_elsewhere = network.get("master_problem") or any(map(is_loopback, network.get("master_addresses", ())))
        if problem and not leads_elsewhere:
            yield error(
                reply.host.name,
                f"cannot connect to {master} on MASTER_PORT={question.port} ({problem}); open the ports between "
                "the hosts in the firewall",
            )


def _most_common(values: Sequence[Any]) -> Any:
    """The most frequent value, the first of several."""
    return Counter(values).most_common(1)[0][0] if values else None


def _some(names: Sequence[str]) -> str:
    """A few of the names, and how many there are besides."""
    shown = ", ".join(names[:FEW])
    return shown if len(names) <= FEW else f"{shown} and {len(names) - FEW} more"
