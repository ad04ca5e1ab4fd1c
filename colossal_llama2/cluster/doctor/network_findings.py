"""What is wrong with names, interfaces and the port between the hosts."""

from collections.abc import Iterator, Mapping, Sequence

from colossal_llama2.cluster.doctor.finding import GIB, Finding, error, part_of, warning
from colossal_llama2.cluster.doctor.survey import Question, Reply
from colossal_llama2.cluster.hostfile import is_loopback

# A host that serves and one that calls must have done so at the same time, at least for so long.
LEAST_SECONDS_TOGETHER = 1.0


def route_findings(able: Sequence[Reply], replies: Sequence[Reply], variables: Mapping[str, str]) -> Iterator[Finding]:
    """Names of hosts that lead to the wrong address."""
    if len(replies) < 2:
        return
    master = replies[0].host
    named = variables.get("GLOO_SOCKET_IFNAME")
    for reply in able:
        name, own, network = reply.host.name, part_of(reply, "host"), part_of(reply, "network")
        loopback = [address for address in own.get("addresses", ()) if is_loopback(address)]
        if loopback and not named:
            yield warning(
                name,
                f"its own name {own['name']} has the address {loopback[0]}; training looks for another itself, but "
                "other programs do not: write its network address before that name in /etc/hosts",
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


def interfaces_findings(able: Sequence[Reply], variables: Mapping[str, str]) -> Iterator[Finding]:
    """Interfaces and adapters that variables name and hosts do not have."""
    for reply in able:
        network = part_of(reply, "network")
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
        locked = part_of(reply, "host").get("locked_memory")
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


def port_findings(able: Sequence[Reply], replies: Sequence[Reply], question: Question) -> Iterator[Finding]:
    """A MASTER_PORT that is taken, or that other hosts do not reach."""
    if question.port is None or not replies or replies[0] not in able:
        return
    master = replies[0].host.name
    serving = part_of(replies[0], "port")
    if serving.get("problem"):
        yield error(
            master,
            f"MASTER_PORT={question.port} cannot be used ({serving['problem']}); see who has it (ss -ltnp), or set "
            "another",
        )
        return
    for reply in able[1:] if serving else ():
        problem, network = part_of(reply, "port").get("problem"), part_of(reply, "network")
        leads_elsewhere = network.get("master_problem") or any(map(is_loopback, network.get("master_addresses", ())))
        if not problem or leads_elsewhere:
            continue
        if _seconds_together(replies[0], reply) < LEAST_SECONDS_TOGETHER:
            cause = "ssh takes long to log in there or on that host; look for slow DNS (UseDNS no in sshd_config)"
            if question.launcher == "slurm":
                cause = "srun takes long to start there or on that host; look at the log of slurmd"
            asked = f"connect to {master} on MASTER_PORT={question.port}"
            yield warning(reply.host.name, f"could not be asked to {asked}, since {cause}")
        else:
            yield error(
                reply.host.name,
                f"cannot connect to {master} on MASTER_PORT={question.port} ({problem}); open the ports between "
                "the hosts in the firewall",
            )


def _seconds_together(first: Reply, second: Reply) -> float:
    """How long the first host served the port while the second tried to connect, by this host's clock."""
    spans = []
    for reply in (first, second):
        checked = part_of(reply, "port")
        ahead = (reply.report or {})["ended"] - reply.received
        spans.append((checked["from"] - ahead, checked["until"] - ahead))
    return min(until for _, until in spans) - max(begin for begin, _ in spans)
