"""A process that has imported PyTorch, transformers and ColossalAI, and forks the commands of tests.

The imports take about 11 CPU seconds in each new process and milliseconds in a fork, so a test forks its commands
unless it tests the start of the process. A forked command works like a started one: it has its own arguments, working
directory, environment, output and exit code, and leaves nothing in the server. The processes that it starts as
sys.executable import everything themselves, unless it is given the program of tests/forked_python.py.

`run` starts the server of this test process on its first call. The server ends with the test process.
"""

import atexit
import gc
import json
import os
import shutil
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
# How long ranks may continue after one of them has failed. gloo reports a lost peer at once.
GRACE_SECONDS = 20.0
# Variables that the server's imports depend on, so a command cannot change them.
FIXED = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Of the server alone: else torch.utils.cpp_extension prints which CUDA toolkit it has found.
NO_TOOLKIT = {"CUDA_HOME": "", "CUDA_PATH": ""}
# Imported by commands while they run.
LATE_IMPORTS = (
    "colossalai.legacy",
    "colossal_llama2.dataset.write.prepare",
    "colossal_llama2.engine.llama_policy",
    "colossal_llama2.inference.run",
    "colossal_llama2.model.init_model",
    "colossal_llama2.tokenizer.init_tokenizer",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    # Reads sys.executable when it is imported. The processes that it starts need open files, so they are not forked.
    "multiprocessing.spawn",
    "PIL.ImageDraw",
    "PIL.ImageFont",
    "sentencepiece",
    "torch.distributed.run",
    "torch.testing",
    "torch.utils.cpp_extension",
)


class Command:
    """A forked command, as `start` returns it."""

    def __init__(self, request: dict[str, Any], folder: Path):
        self._folder = folder
        self._request = {**request, "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr")}
        answer = _server().ask({"do": "start", **self._request})
        self._number: int = answer["job"]
        # For each rank.
        self.pids: list[int] = answer["pids"]
        self.codes: list[int | None] = [None] * len(self.pids)

    @property
    def output(self) -> str:
        """What was written to stdout."""
        return Path(self._request["stdout"]).read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What was written to stderr."""
        return Path(self._request["stderr"]).read_text(errors="replace")

    def poll(self) -> int | None:
        """The largest exit code of all ranks, 137 for a killed one; None while one of them is running."""
        self.codes = _server().ask({"do": "poll", "job": self._number})["codes"]
        ended = [code if code >= 0 else 128 - code for code in self.codes if code is not None]
        return max(ended) if len(ended) == len(self.codes) else None

    def wait(self, timeout: float) -> int:
        """Return the exit code, when all ranks have ended by themselves.

        When one has failed, the others are killed if they are still running after GRACE_SECONDS.

        Raises:
            subprocess.TimeoutExpired: they had not ended after `timeout` seconds, and were killed.
        """
        start = time.monotonic()
        deadline, patience = start + timeout, None
        while (code := self.poll()) is None:
            now = time.monotonic()
            if patience is None and any(self.codes):
                patience = now + GRACE_SECONDS
            if now > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self._request["argv"], timeout, output=self.output, stderr=self.errors)
            if patience is not None and now > patience:
                self.kill()
            time.sleep(min(0.05, 0.002 + (now - start) / 50))
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal to the first rank."""
        os.kill(self.pids[0], number)

    def kill(self) -> None:
        """Kill the processes that are still running."""
        _server().ask({"do": "kill", "job": self._number})


def start(
    argv: Sequence[Any],
    folder: Path,
    *,
    ranks: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    forks_children: bool = False,
) -> Command:
    """Fork a command.

    Args:
        argv: a script and its arguments, or "-m", a module and its arguments.
        folder: gets the files of its output.
        ranks: processes of a job on this machine, with a launcher's variables; 0 for one process without them.
        env: the whole environment, that of this process if None; FIXED is added.
        forks_children: whether its sys.executable is the program of tests/forked_python.py.
    """
    words = [str(word) for word in argv]
    environment = {**(os.environ if env is None else env), **FIXED}
    request = {"argv": words, "ranks": ranks, "cwd": str(cwd), "env": environment, "forks_children": forks_children}
    return Command(request, folder)


def run(
    argv: Sequence[Any],
    *,
    ranks: int = 0,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    forks_children: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Fork a command and wait until it ends. The arguments are those of `start`.

    Returns:
        The exit code and the text output, that of ranks together.

    Raises:
        subprocess.TimeoutExpired: the command was still running after `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = start(argv, Path(folder), ranks=ranks, cwd=cwd, env=env, forks_children=forks_children)
        code = command.wait(timeout)
        return subprocess.CompletedProcess(list(argv), code, command.output, command.errors)


class _Server:
    """The other end: a process that reads requests from its stdin, one line each, and answers on its stdout."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=ROOT,
            env={**os.environ, **FIXED, **NO_TOOLKIT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the fork server has ended with code {self._process.wait()}"
        return json.loads(answer)


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
    # Otherwise each command's garbage collections would visit, and so copy, the objects of all libraries.
    gc.collect()
    gc.freeze()
    jobs: list[warm.Job] = []
    for line in requests:
        request = json.loads(line)
        if request["do"] == "start":
            if request["forks_children"]:
                request["python"] = str(_forked_python())
            jobs.append(_fork(request))
            answer = {"job": len(jobs) - 1, "pids": jobs[-1].pids}
        else:
            job = jobs[request["job"]]
            job.is_running()
            if request["do"] == "kill":
                job.kill()
            answer = {"codes": job.codes}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(request: dict[str, Any]) -> Any:
    from tests.faults import warm

    return warm.Job(
        lambda: _become(request),
        Path(request["stderr"]),
        output=Path(request["stdout"]),
        ranks=request["ranks"] or 1,
        is_launched=request["ranks"] > 0,
    )


@cache
def _forked_python() -> Path:
    """The program of tests/forked_python.py, whose server is another fork of this one."""
    from tests import forked_python
    from tests.faults import warm

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    program, address = folder / "python", folder / "socket"
    forked_python.write_program(program, address)
    # Before the fork, so that a program can connect at once.
    listener = forked_python.listen(address)

    def fork_child(request: dict[str, Any]) -> None:
        # The server's text streams were made for what its own descriptors were.
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        _become({**request, "env": {**request["env"], **FIXED}, "ranks": 0, "python": str(program)})

    warm.Job(lambda: forked_python.serve(listener, fork_child), folder / "log", is_launched=False)
    return program


def _become(request: dict[str, Any]) -> None:
    """Run the command in this process, which was forked for it."""
    import runpy

    sys.executable = request.get("python", sys.executable)
    placed = {name: os.environ[name] for name in launcher.NAMES if name in os.environ} if request["ranks"] else {}
    os.environ.clear()
    os.environ.update(request["env"], **placed)
    os.chdir(request["cwd"])
    argv = request["argv"]
    if argv[0] == "-u":
        del argv[0]
    sys.orig_argv = [sys.executable, *argv]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, request["cwd"])
        # runpy would run a module that is already imported a second time, and warn about it.
        sys.modules.pop(argv[1], None)
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        sys.path.insert(0, "")
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
