"""What runs on a node of a Ray cluster: one task, after a check that the node can do it like all others.

This package is sent to the nodes, but what it imports is theirs, and so are the folders.
"""

import functools
import hashlib
import importlib.metadata
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.dataset.layout.locks import RefusedError
from colossal_llama2.dataset.layout.output_folder import WORK_PLAN_FILE
from colossal_llama2.errors import RunError, reason

# They decide the token ids, the order of samples, or the bytes of the files. Ray itself compares Python and Ray.
PACKAGES = ("datasets", "jinja2", "kitoken", "numpy", "orjson", "pyarrow", "sentencepiece", "tokenizers")

# NFS may show a file that was just written, or a new version of it, to other machines so much later.
SHARED_SECONDS = 90.0


class Expected(NamedTuple):
    """What a node must have in common with the machine of the command.

    Attributes:
        versions: (package, version) of each of PACKAGES; None if it is not installed.
        plan: the SHA-256 of the work plan in the cache, which shows that the folders are shared.
    """

    versions: tuple[tuple[str, str | None], ...]
    plan: str | None


def expected_here(cache_dir: str) -> Expected:
    """What this machine has."""
    return Expected(tuple((name, _version(name)) for name in PACKAGES), _plan(cache_dir))


def run_on_node(function: Callable, task: Any, expected: Expected, claim: Path) -> tuple[str, Any]:
    """The name of this node, and `function(task)`.

    Args:
        claim: a new file for the id of this node, from which the driver learns where the task is.

    Raises:
        RefusedError: other packages are installed here, or the folders are not shared. What is prepared so far stays.
        RunError: the operating system reported an error; the message names the node.
    """
    check_node(expected, task.cache_dir)
    try:
        claim.write_text(_node_id())
        return socket.gethostname(), function(task)
    except OSError as error:
        raise RunError(f"Ray node {socket.gethostname()}: {reason(error)}")


# Once in each worker process.
@functools.cache
def check_node(expected: Expected, cache_dir: str) -> None:
    """Raise RefusedError unless this node has what is expected."""
    node = f"Ray node {socket.gethostname()}"
    end = time.monotonic() + SHARED_SECONDS
    while (is_other := _plan(cache_dir) != expected.plan) and time.monotonic() < end:
        time.sleep(0.5)
    if is_other:
        raise RefusedError(
            f"{node}: does not see the files in {cache_dir}; mount the folders of the input, the tokenizer and the "
            "output there at the same paths, or start Ray without this node"
        )
    for name, version in expected.versions:
        if _version(name) != version:
            raise RefusedError(
                f"{node}: has {_described(name, _version(name))}, but this machine {_described(name, version)}; "
                "install requirements.txt again on each node, or start Ray without this node"
            )


def claimed_by(claim: Path) -> str | None:
    """The id of the node that does a task; None if none has begun."""
    try:
        return claim.read_text() or None
    except OSError:
        return None


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def _described(name: str, version: str | None) -> str:
    return f"no {name}" if version is None else f"{name} {version}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plan(cache_dir: str) -> str | None:
    try:
        return hashlib.sha256(Path(cache_dir, WORK_PLAN_FILE).read_bytes()).hexdigest()
    except OSError:
        return None
