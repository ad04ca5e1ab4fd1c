"""Which device, software and compilers does this machine have? A part of the run, in a process of its own."""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from tests.fork_server import ROOT
from tests.gpu.parts import Figures, print_figures

REQUIREMENTS = ("requirements.txt", "requirements-gpu.txt")
# Optional, and in no file of requirements.
OTHERS = ("apex",)


def main() -> None:
    """Print the facts about this machine."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.machine", description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder whose disk the run uses")
    parser.add_argument("--gpu", action="store_true", help="end with code 1 if PyTorch sees no GPU")
    args = parser.parse_args()
    facts = device()
    print_figures(**facts, **host(args.work_dir), packages=packages())
    if args.gpu and not facts["gpus"]:
        raise SystemExit("RuntimeError: PyTorch sees no GPU here; repair CUDA, or give --device cpu --small")


def device() -> Figures:
    """The GPU that PyTorch sees, or the CPU."""
    import torch

    facts: Figures = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    if not facts["gpus"]:
        return {**facts, "device": cpu_name()}
    free, total = torch.cuda.mem_get_info()
    return {
        **facts,
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "memory_bytes": total,
        "free_memory_bytes": free,
        "sdpa_flash": torch.backends.cuda.is_flash_attention_available(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def host(work_dir: Path) -> Figures:
    """The machine around the device."""
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version") + output_of(*_nvcc_of_cuda_home()))
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(work_dir).free,
        "nvcc": nvcc[1] if nvcc else None,
        "compiler": first_line("c++", "--version"),
    }


def _nvcc_of_cuda_home() -> list[str]:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return [str(Path(home, "bin", "nvcc")), "--version"]


def cpu_name() -> str:
    """The processor's name, as Linux gives it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def output_of(*command: str) -> str:
    """What a program prints to stdout; empty if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def first_line(*command: str) -> str | None:
    """The first line that a program prints, or None."""
    lines = output_of(*command).splitlines()
    return lines[0].strip() if lines else None


def packages() -> dict[str, list[str | None]]:
    """Installed version, None if there is none, and pinned version of each package that the requirements name."""
    text = "\n".join((ROOT / name).read_text() for name in REQUIREMENTS)
    pinned: dict[str, str | None] = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    return {name: [installed(name), pinned.get(name)] for name in (*pinned, *OTHERS)}


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown" if name in OTHERS and importlib.util.find_spec(name) else None


if __name__ == "__main__":
    main()
