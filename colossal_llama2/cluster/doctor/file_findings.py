"""What differs in model, data and --save_dir as the hosts see them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from colossal_llama2.cluster.doctor.finding import GIB, Finding, error, most_common, part_of, warning
from colossal_llama2.cluster.doctor.survey import Probe, Question, Reply
from colossal_llama2.plurals import some

# Weights, fp32 weights and two moments of Adam, for a model stored in 2 bytes per weight.
CHECKPOINT_TO_MODEL = 7


def paths_findings(able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    """Model or data that a host lacks, or has otherwise than most."""
    for path in question.paths:
        contents = {
            reply.host.name: part_of(reply, "paths").get(path) for reply in able if path in part_of(reply, "paths")
        }
        absent = [name for name, content in contents.items() if content is None]
        there = {name: content["files"] for name, content in contents.items() if content is not None}
        for name in absent:
            cure = "copy it to the same path on each host, or share the folder" if there else "check the flag"
            yield error(name, f"has no {path}; {cure}")
        keys = {name: _key(contents[name]) for name in there}
        usual = most_common(list(keys.values()))
        model = next((name for name in there if keys[name] == usual), None)
        for name, files in there.items():
            if model is not None and keys[name] != usual:
                other = there[model]
                differing = sorted(file for file in {*files, *other} if files.get(file) != other.get(file))
                yield error(
                    name,
                    f"{path} differs from that on {model} ({some(differing) or 'one of many files'}); copy it again",
                )


def _key(content: Any) -> str:
    return repr((sorted(content["files"].items()), content.get("rest")))


def save_folder_findings(able: Sequence[Reply], question: Question, probe: Probe | None) -> Iterator[Finding]:
    """A --save_dir that is not shared, not writable, locked, or too small."""
    if probe is None:
        return
    if probe.problem:
        yield error("this host", f"--save_dir {question.save_dir}: cannot write to {probe.folder} ({probe.problem})")
        return
    parts = {reply.host.name: part_of(reply, "save_folder") for reply in able}
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
            some(unlocked),
            f"--save_dir {question.save_dir}: locks of one host are not seen there, so two runs could write at a time; "
            "mount it with locks (NFS: without nolock, local_lock=none; Lustre: -o flock)",
        )
    owner = question.lock_owner
    if owner is None:
        return
    who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    states = [part["owner_alive"] for part in parts.values() if part and part["owner_alive"] is not None]
    place = f"--save_dir {question.save_dir}"
    if True in states and owner["ending"]:
        yield warning(place, f"{who} is saving before it ends; the next run waits for it")
    elif True in states:
        yield error(place, f"{who} is writing to it; wait until that run has ended, or stop it, or give another folder")
    elif False in states:
        yield warning(place, f".lock was left by {who}, which has died; the next run replaces it")
    else:
        yield warning(
            place,
            f".lock is of {who}, none of these hosts; if that run is dead, remove {question.save_dir}/.lock, so that "
            "the next one need not watch it for a sign of life",
        )


def _room(parts: Mapping[str, dict], able: Sequence[Reply], question: Question) -> Iterator[Finding]:
    sizes = [part_of(reply, "paths").get(question.paths[0]) for reply in able[:1] if question.paths]
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
