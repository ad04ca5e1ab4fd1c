"""A process that has imported PyTorch, transformers and ColossalAI, and forks the commands of tests.

The imports take about 11 CPU seconds in each new process and milliseconds in a fork, so a test forks its commands
unless the start of the process is what it tests. A forked command works as a started one does: it has its own
arguments, working directory, environment, output and exit code, and nothing of it is left in the server.

`run` starts the server of this test process on its first call. The server ends with the test process.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from colossal_llama2 import launcher

ROOT = Path(__file__).resolve().parents[1]
# How long ranks may go on after one of them has failed. gloo reports a lost peer at once.
GRACE_SECONDS = 20.0
# What the imports of the server depend on, so that a command cannot change it.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Imported by commands while they run.
LATE_IMPORTS = (
    "colossalai.legacy",
    "colossal_llama2.dataset.write.prepare",
    "colossal_llama2.inference.generation",
    "colossal_llama2.model.init_model",
    "colossal_llama2.tokenizer.init_tokenizer",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "sentencepiece",
    "torch.distributed.run",
    "torch.testing",
)


def run(
    argv: Sequence[Any],
    *,
    ranks: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Fork a command and wait for its end.

    Args:
        argv: a script and its arguments, or "-m", a module and its arguments.
        ranks: processes of a job on this machine, with a launcher's variables; 0 for one process without them.
        env: the whole environment, that of this process if None; FIXED is added.
        timeout: seconds.

    Returns:
        The exit code (the largest of all ranks, 137 for a killed one) and the text output, that of ranks together.

    Raises:
        subprocess.TimeoutExpired: the command was still running and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        request = {
            "argv": [str(word) for word in argv],
            "ranks": ranks,
            "cwd": str(cwd),
            "env": {**(os.environ if env is None else env), **FIXED},
            "stdout": str(output),
            "stderr": str(errors),
            "timeout": timeout,
        }
        code = _server().ask(request)
        texts = [path.read_text(errors="replace") for path in (output, errors)]
    if code is None:
        raise subprocess.TimeoutExpired(list(argv), timeout, output=texts[0], stderr=texts[1])
    return subprocess.CompletedProcess(list(argv), code, *texts)


class _Server:
    """The other end: a process that reads requests from its stdin, one line each, and answers on its stdout."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env={**os.environ, **FIXED},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> int | None:
        """The exit code of a command, None if it took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server has ended with code {self._process.wait()}"
        return json.loads(answer)["code"]


@cache
def _server() -> _Server:
    return _Server()


def _serve() -> None:
    from tests.faults import warm

    # Commands write to descriptors 1 and 2 and read descriptor 0.
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    warm.import_everything()
    for name in LATE_IMPORTS:
        __import__(name)
    # Else each command's collections would walk through, and so copy, the objects of all libraries.
    gc.collect()
    gc.freeze()
    for line in requests:
        request = json.loads(line)
        job = warm.Job(
            lambda request=request: _become(request),
            Path(request["stderr"]),
            output=Path(request["stdout"]),
            ranks=request["ranks"] or 1,
            is_launched=request["ranks"] > 0,
        )
        answers.write(json.dumps({"code": _exit_code(job, request["timeout"])}) + "\n")
        answers.flush()


def _exit_code(job: Any, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while job.is_running():
        if job.has_failed:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            break
        if time.monotonic() > deadline:
            job.kill()
            return None
        time.sleep(0.002)
    while job.is_running() and time.monotonic() < deadline:
        time.sleep(0.002)
    if job.is_running():
        job.kill()
    return job.exit_code


def _become(request: dict[str, Any]) -> None:
    """Run the command in this process, which was forked for it."""
    import runpy

    placed = {name: os.environ[name] for name in launcher.NAMES if name in os.environ} if request["ranks"] else {}
    os.environ.clear()
    os.environ.update(request["env"], **placed)
    os.chdir(request["cwd"])
    argv = request["argv"]
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, request["cwd"])
        # One that is imported already would be run a second time, of which runpy warns.
        sys.modules.pop(argv[1], None)
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
