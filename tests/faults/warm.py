"""Training commands in processes that are forked from one that has imported everything, so that they start quickly.

PyTorch, ColossalAI and transformers need seconds to import; a fork of a process that has done so needs milliseconds.
The parent opens no process group and computes nothing, since the threads of either would not exist in its children.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tests.conftest import ROOT
from tests.pictures import undrawn

PR_SET_PDEATHSIG = 1
END_SECONDS = 300.0


def import_everything() -> None:
    """Import what a training command needs, in this process."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="-1", TORCHINDUCTOR_COMPILE_THREADS="1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.path.insert(0, str(ROOT))
    with warnings.catch_warnings(record=True):
        import datasets
        import torch.distributed.optim
        import torch.utils.tensorboard
        from tensorboard.backend.event_processing import event_accumulator  # noqa: F401
        from transformers import LlamaForCausalLM, LlamaTokenizerFast  # noqa: F401
    from colossal_llama2.engine.patches import placeholders
    from colossal_llama2.train import run, verify  # noqa: F401

    with warnings.catch_warnings(record=True):
        placeholders.import_colossalai()

    torch.set_num_threads(1)
    datasets.disable_progress_bars()


class Job:
    """Forked processes of one command, one per rank, in a new process group. They die with their parent."""

    def __init__(
        self,
        body: Callable[[], None],
        log: Path,
        *,
        output: Path | None = None,
        ranks: int = 1,
        is_launched: bool = True,
    ):
        """
        Args:
            body: what each process does; SystemExit gives its exit code, as in a command.
            log: gets what they write to stderr.
            output: gets what they write to stdout, `log` if None.
            is_launched: whether they find a launcher's variables in their environment.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        for path in {log, output or log}:
            path.write_text("")
        port = _free_port()
        self.pids: list[int] = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                place = _launcher_variables(rank, ranks, port) if is_launched else {}
                _be_child(body, log, output or log, place, group=self.pids[0] if self.pids else 0)
            # Set in both processes, since either may be first.
            _set_group(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)
        self._codes: list[int | None] = [None] * ranks

    @property
    def output(self) -> str:
        """What the processes have written."""
        return self._log.read_text(errors="replace")

    def is_running(self) -> bool:
        """False when all processes have ended."""
        for index, pid in enumerate(self.pids):
            if self._codes[index] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                self._codes[index] = os.waitstatus_to_exitcode(status) if ended else None
        return None in self._codes

    @property
    def codes(self) -> list[int | None]:
        """The exit code of each process, as of the last call of `is_running`; None for one that was running."""
        return list(self._codes)

    @property
    def exit_code(self) -> int:
        """The largest exit code of all processes, which have ended; 137 for a killed one."""
        return max(code if code >= 0 else 128 - code for code in self._codes)

    def wait(self, seconds: float = END_SECONDS) -> int:
        """Return `exit_code` when all have ended; processes that take too long are killed."""
        deadline = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.005)
        if self.is_running():
            self.kill()
            raise AssertionError(f"still running after {seconds:g} s: {self.output}")
        return self.exit_code

    def kill(self) -> None:
        """Kill the complete process group at once."""
        try:
            os.killpg(self.pids[0], signal.SIGKILL)
        except ProcessLookupError:
            pass
        while self.is_running():
            time.sleep(0.001)

    def record_end(self, code: int) -> None:
        """For callers that have waited for the only process themselves."""
        self._codes[0] = code


def train(flags: Sequence[str], log: Path, *, ranks: int = 1, before: Callable[[], None] | None = None) -> Job:
    """Start train.py with these flags, without its picture; `before` is called in each process first."""

    def body() -> None:
        import train as script

        sys.argv = ["train.py", *map(str, flags)]
        if before is not None:
            before()
        with undrawn():
            script.main(sys.argv[1:])

    return Job(body, log, ranks=ranks)


def _launcher_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in names.items()}}


def _be_child(body, log: Path, output: Path, place: dict[str, str], *, group: int) -> None:
    """Never returns."""

    def in_group() -> None:
        os.setpgid(0, group)
        os.environ.update(place)
        body()

    streams = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in (output, log)]
    end_with(in_group, [0, *streams])


def end_with(body: Callable[[], None], streams: Sequence[int]) -> NoReturn:
    """Do `body` in this process, which was forked for it, with these descriptors as stdin, stdout and stderr, and end.

    The process dies with its parent.
    """
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _set_group(pid: int, group: int) -> None:
    try:
        os.setpgid(pid, group)
    except (ProcessLookupError, PermissionError):
        pass


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
