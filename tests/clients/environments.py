"""Python environments of clients, one for each, with the packages that requirements/clients/ pins."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from colossal_llama2.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
# What all of the pinned packages run with. Which build of it, for CPUs or a GPU, is up to the machine.
TORCH = "torch==2.13.0"
STAMP = "installed.sha256"


def python_of(client: str, folder: Path) -> Path:
    """The Python of a client's environment, which is made if it is not there or the pins have changed.

    Raises:
        UserError: uv is not installed.
        RunError: a package cannot be installed.
    """
    pins = ROOT / "requirements" / "clients" / f"{client}.txt"
    home = folder / client
    python, stamp = home / "bin" / "python", home / STAMP
    wanted = hashlib.sha256(TORCH.encode() + pins.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise UserError("uv is not installed; run pip install uv")
    _run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)])
    install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    _run([*install, TORCH])
    _run([*install, "--no-deps", "-r", str(pins)])
    stamp.write_text(wanted)
    return python


def _run(words: Sequence[str]) -> None:
    process = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    if process.returncode:
        raise RunError(f"{' '.join(words)} ended with exit code {process.returncode}: {process.stderr[-2000:]}")
