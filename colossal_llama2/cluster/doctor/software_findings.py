"""What differs in packages and GPUs of the hosts."""

from collections.abc import Iterator, Mapping, Sequence

from colossal_llama2.cluster.doctor.finding import Finding, error, most_common, part_of, warning
from colossal_llama2.cluster.doctor.survey import Reply
from colossal_llama2.plurals import counted, some

# NCCL's buffers for the processes of a host. Containers have 64 MiB by default.
LEAST_SHARED_MEMORY = 1 << 30
GPU_IN_USE_MIB = 1024


def software_findings(able: Sequence[Reply], per_host: int | None) -> Iterator[Finding]:
    """Versions and files of the package that differ, and commands that are missing."""
    parts = {reply.host.name: part_of(reply, "software") for reply in able}
    parts = {name: part for name, part in parts.items() if part}
    yield from _different({name: part["python"] for name, part in parts.items()}, "Python")
    for package in next(iter(parts.values()), {}).get("versions", ()):
        yield from _different({name: part["versions"].get(package) for name, part in parts.items()}, package)
    for name, part in parts.items():
        # A process that is started alone, such as by `python train.py`, needs none.
        needs_torchrun = per_host is not None or len(able) > 1
        if needs_torchrun and part["torchrun"] is None and part["versions"].get("torch") is not None:
            yield error(
                name, "torchrun is not on PATH; activate the environment before the launch (source .venv/bin/activate)"
            )
    yield from _different_files(parts)


def _different(values: Mapping[str, str | None], what: str) -> Iterator[Finding]:
    """A line for each host with another version than most."""
    if len(set(values.values())) < 2:
        return
    usual = most_common(list(values.values()))
    others = some([name for name, value in values.items() if value == usual])
    for name, value in values.items():
        if value != usual:
            has = f"{what} {value}" if value else f"no {what}"
            yield error(
                name,
                f"has {has}, but {others} {usual or f'none of {what}'}; install requirements.txt again on each host",
            )


def _different_files(parts: Mapping[str, dict]) -> Iterator[Finding]:
    packages = {name: {**(part["package"] or {}), **part["scripts"]} for name, part in parts.items()}
    usual = most_common([tuple(sorted(files.items())) for files in packages.values()])
    others = some([name for name, files in packages.items() if tuple(sorted(files.items())) == usual])
    for name, files in packages.items():
        if not parts[name]["package"]:
            yield error(name, "Python does not find the package colossal_llama2 in this folder; copy all files there")
        elif usual is not None and tuple(sorted(files.items())) != usual:
            differing = sorted({key for key, _ in set(files.items()) ^ set(usual)})
            yield error(
                name,
                f"has another version of colossal_llama2 than {others} ({some(differing)}); copy the same files to "
                "each host",
            )


def gpus_findings(able: Sequence[Reply], per_host: int | None) -> Iterator[Finding]:
    """Too few GPUs, different ones, and GPUs in use."""
    for reply in able:
        if "slow" in part_of(reply, "gpus"):
            yield warning(
                reply.host.name,
                f"nvidia-smi took more than {part_of(reply, 'gpus')['slow']:g} s; switch persistence mode on "
                "(nvidia-smi -pm 1)",
            )
    lists: dict[str, list] = {
        reply.host.name: part_of(reply, "gpus")["list"] for reply in able if "list" in part_of(reply, "gpus")
    }
    if not any(lists.values()):
        return
    counts = {name: len(rows) for name, rows in lists.items()}
    usual = most_common(list(counts.values()))
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
        most = most_common(list(kinds.values()))
        for name, kind in kinds.items():
            if kind != most:
                yield warning(name, f"{what} is {kind}, but {most} on others; the slowest decides, and NCCL may fail")
    for name, rows in filled.items():
        busy = [str(index) for index, row in enumerate(rows) if row[3].isdecimal() and int(row[3]) > GPU_IN_USE_MIB]
        if busy:
            yield warning(name, f"another program uses GPU {', '.join(busy)}; end it (nvidia-smi lists it)")
    for reply in able:
        shared = part_of(reply, "host").get("shared_memory")
        if lists.get(reply.host.name) and shared is not None and shared < LEAST_SHARED_MEMORY:
            yield warning(
                reply.host.name,
                f"/dev/shm has {shared >> 20} MiB; start the container with --shm-size 1g or --ipc host",
            )
