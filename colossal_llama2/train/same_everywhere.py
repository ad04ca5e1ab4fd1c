"""Refuse a job whose ranks do not agree on the code, the software, the flags or the files that they read.

Each would train on, and the result would be wrong without an error: a host with an older checkout of this package, for
example, may use other defaults of the optimizer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import colossal_llama2
from colossal_llama2.dataset.read.prepared_data import dataset_fingerprints
from colossal_llama2.encoding.registry import fingerprint
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.task import task_fingerprint
from colossal_llama2.plurals import counted
from colossal_llama2.train.checkpointing.resuming import shown_shortly
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.settings.model_source import has_tokenizer

# Compared by content: a copy of the data may be in another place on each host.
FOLDER_FLAGS = ("dataset", "eval_dataset", "eval_tasks", "eval_prompts")
# Differences that a message names; more are counted.
MAX_NAMED = 3
HASH_DIGITS = 12
# Parts of a file of weights that are hashed, evenly spaced: training changes all of it.
SAMPLED_PARTS, PART_BYTES = 16, 1 << 16

Facts = dict[str, str]


def check_same_everywhere(config: TrainConfig) -> None:
    """Compare all ranks. Called on all of them.

    Raises:
        UserError: what differs, on which hosts, and the values; on all ranks.
    """
    import socket

    with collectives.all_or_none():
        files = package_files()
        own = {**_software(files), **_flags(config), **_inputs(config)}
    host = socket.gethostname()
    gathered = collectives.gather_values([host, own])
    hosts, facts = [host for host, _ in gathered], [found for _, found in gathered]
    problems = differences(hosts, facts)
    if not problems:
        return
    if len({found[CODE] for found in facts}) > 1:
        problems[0] += _differing_file(collectives.gather_values(files))
    more = f"; and {counted(len(problems) - MAX_NAMED, 'more difference')}" if len(problems) > MAX_NAMED else ""
    raise UserError(
        f"the ranks of this job differ, so it would not train one model: {'; '.join(problems[:MAX_NAMED])}{more}; "
        f"make it the same on all hosts"
    )


CODE = "the code of colossal_llama2"


def package_files() -> dict[str, str]:
    """The hash of each Python file of this package, by its path in it."""
    root = Path(colossal_llama2.__file__).parent
    paths = sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): _digest(path.read_bytes()) for path in paths}


def _software(files: dict[str, str]) -> Facts:
    import torch

    versions = {name: str(version) for name, version in run_metadata.versions().items() if name != "colossal_llama2"}
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return {CODE: _digest(json.dumps(files).encode()), **versions}


def _flags(config: TrainConfig) -> Facts:
    return {f"--{name}": json.dumps(value) for name, value in config.flags.items() if name not in FOLDER_FLAGS}


def _inputs(config: TrainConfig) -> Facts:
    """What identifies the model and the data. Of large files, only parts are read."""
    source = config.source
    prompts = [prompt.record() for prompt in config.evaluation.prompts]
    facts = {
        "config.json of --pretrained": _digest(Path(source.pretrained, "config.json").read_bytes()),
        "the weights that are loaded": _weights_digest(source.weights),
        "the prompts of --eval_prompts": _digest(json.dumps(prompts).encode()),
        "the items of --eval_tasks": _digest_of([task_fingerprint(task) for task in config.evaluation.tasks]),
        "the samples of --dataset": _digest_of(dataset_fingerprints(config.data.parts.paths)),
        "the samples of --eval_dataset": _digest_of(
            dataset_fingerprints([eval_set.path for eval_set in config.evaluation.sets])
        ),
    }
    if source.adapter is not None:
        facts["the adapter that is loaded"] = _weights_digest(source.adapter)
    if has_tokenizer(config.source.pretrained):
        facts["the tokenizer of --pretrained"] = fingerprint(config.source.pretrained)[:HASH_DIGITS]
    return facts


def _weights_digest(folder: str) -> str:
    """A hash of the names, sizes and some parts of a model's files of weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(SAMPLED_PARTS):
                file.seek(max(size - PART_BYTES, 0) * number // (SAMPLED_PARTS - 1))
                digest.update(file.read(PART_BYTES))
    return digest.hexdigest()[:HASH_DIGITS]


def differences(hosts: Sequence[str], facts: Sequence[Facts]) -> list[str]:
    """One clause for each fact that is not the same on all ranks, with the hosts of each value, the most common last.

    Args:
        hosts, facts: of each rank.
    """
    names = dict.fromkeys(name for found in facts for name in found)
    clauses = []
    for name in names:
        values = [found.get(name, "none") for found in facts]
        # Of equally common values, that of the lowest rank counts as the usual one.
        common = [value for value, _ in Counter(values).most_common()]
        if len(common) > 1:
            others = [f"{_hosts_of(value, hosts, values)} has {shown_shortly(value)}" for value in common[1:]]
            usual = f"{_hosts_of(common[0], hosts, values)} has {shown_shortly(common[0])}"
            clauses.append(f"{name}: {', '.join([*others, usual])}")
    return clauses


def _hosts_of(value: str, hosts: Sequence[str], values: Sequence[str]) -> str:
    """The hosts with that value; with the ranks, if a host has several values."""
    having = [rank for rank, other in enumerate(values) if other == value]
    split = {hosts[rank] for rank in having} & {hosts[rank] for rank, other in enumerate(values) if other != value}
    named = dict.fromkeys(f"rank {rank} on {hosts[rank]}" if hosts[rank] in split else hosts[rank] for rank in having)
    listed = list(named)
    return listed[0] if len(listed) == 1 else f"{listed[0]} (and {len(listed) - 1} more)"


def _differing_file(files: Sequence[dict[str, Any]]) -> str:
    """The first file that is not the same on all ranks."""
    for name in dict.fromkeys(name for found in files for name in found):
        if len({found.get(name) for found in files}) > 1:
            return f" ({name} differs)"
    return ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:HASH_DIGITS]


def _digest_of(words: Sequence[str]) -> str:
    return _digest(json.dumps(list(words)).encode())
