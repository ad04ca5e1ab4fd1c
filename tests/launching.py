"""Training commands on several ranks, and the distance between trained weights."""

import json
import socket
import subprocess
from pathlib import Path

import torch

from tests import fork_server
from tests.conftest import ROOT


def launch(
    folder: Path, specs: list[dict], worker: str = "train_worker.py", *, ranks: int = 2, timeout: float = 240
) -> None:
    """Run commands one after the other, each in new processes, within `timeout` seconds each.

    The result of each is in <name>.json. If a command crashed, or was killed because it took too long, "error" has the
    end of its stderr, so that only the tests of that command fail.
    """
    for spec in specs:
        try:
            process = attempt(folder, spec, worker, ranks=ranks, timeout=timeout)
            crash = f"exit code {process.returncode}: {process.stderr[-6000:]}" if process.returncode else None
        except subprocess.TimeoutExpired as error:
            crash = f"had not ended after {timeout:g} s: {error.stderr[-6000:]}"
        if crash is not None:
            message = f"{spec['name']} crashed, {crash}"
            result = {"error": message, "log": [], "ranks": [[message, []]] * ranks}
            (folder / f"{spec['name']}.json").write_text(json.dumps(result))


def attempt(
    folder: Path, spec: dict, worker: str = "train_worker.py", *, ranks: int, timeout: float
) -> subprocess.CompletedProcess:
    """Run one command, which may fail. Raises subprocess.TimeoutExpired, with no process left behind."""
    job = folder / f"{spec['name']}.job"
    job.write_text(json.dumps(spec))
    return fork_server.run([ROOT / "tests" / worker, job], ranks=ranks, timeout=timeout)


def free_port() -> int:
    """A port that no process of this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def distance(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the expected weights."""
    difference = sum(float((weights[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
