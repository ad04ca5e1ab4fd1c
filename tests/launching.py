"""Ranks that run many training commands one after the other, and the distance of what they trained."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT


def launch(
    folder: Path, specs: list[dict], worker: str = "train_worker.py", *, ranks: int = 2, timeout: float = 840
) -> None:
    """Run the commands on the ranks of one job, with a limit on its time (seconds). AssertionError if it fails."""
    process = attempt(folder, specs, worker, ranks=ranks, timeout=timeout)
    assert process.returncode == 0, process.stderr[-6000:]


def attempt(
    folder: Path, specs: list[dict], worker: str = "train_worker.py", *, ranks: int, timeout: float
) -> subprocess.CompletedProcess:
    """The same for commands that may fail. Raises subprocess.TimeoutExpired, with no process left behind."""
    (folder / "jobs.json").write_text(json.dumps(specs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command += [str(ROOT / "tests" / worker), str(folder / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # The launcher ends its ranks, which are not in its process group.
            process.terminate()
            process.communicate(timeout=60)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def free_port() -> int:
    """A port that no process of this machine listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def distance(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the expected weights."""
    difference = sum(float((weights[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
