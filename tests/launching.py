"""Two ranks that run many training commands one after the other, and the distance of what they trained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

import torch

from tests.conftest import ROOT


def launch(folder: Path, specs: List[dict], worker: str = "train_worker.py") -> None:
    """Run the commands on two ranks of one job, with a limit on its time."""
    (folder / "jobs.json").write_text(json.dumps(specs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / worker), str(folder / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840)
    assert process.returncode == 0, process.stderr[-6000:]


def distance(weights: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the expected weights."""
    difference = sum(float((weights[name] - expected[name]).square().sum()) for name in expected)
    return (difference / sum(float(value.square().sum()) for value in expected.values())) ** 0.5
