"""Runs of train.py in separate processes, which a test signals or kills while they train."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import fork_server
from tests.conftest import ROOT

START_SECONDS = 150.0
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


class Run:
    """One job in a separate session; `launcher` precedes train.py, empty for a single process.

    `environment` is added to that of this process.
    """

    process: subprocess.Popen | fork_server.Command

    def __init__(
        self,
        folder: Path,
        flags: list[str],
        launcher: list[str] | None = None,
        *,
        environment: dict[str, str] | None = None,
    ):
        words = self._prepare(folder, flags)
        command = [*(launcher or [sys.executable]), *words]
        # `colossalai run` starts torchrun by its name.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", **(environment or {})}
        self._log = folder / "log"
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                command, env={**os.environ, **own}, stderr=output, stdout=output, start_new_session=True
            )

    def _prepare(self, folder: Path, flags: list[str]) -> list[str]:
        """Create the folder; returns train.py and its flags."""
        self.save_dir = folder / "save_dir"
        folder.mkdir(parents=True, exist_ok=True)
        places = {"--save_dir": self.save_dir, "--tensorboard_dir": folder / "tb", "--config_file": folder / "config"}
        return [str(ROOT / "train.py"), *flags, *(str(word) for pair in places.items() for word in pair)]

    @property
    def output(self) -> str:
        """What the job has written to stdout and stderr."""
        return self._log.read_text()

    def wait_for(self, checkpoint: str) -> None:
        """Return when a checkpoint is complete."""
        deadline = time.monotonic() + START_SECONDS
        while not (self.save_dir / checkpoint).is_dir():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def pid_of(self, rank: int) -> int:
        """The process of a rank, among all that the launcher started."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self._is_rank(entry, rank):
                return int(entry.name)
        raise AssertionError(f"no rank {rank}: {self.output}")

    def _is_rank(self, entry: Path, rank: int) -> bool:
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes()
        except OSError:
            return False
        return f"RANK={rank}".encode() in environment and os.fsencode(self.save_dir) in words

    def end(self, seconds: float = 60.0) -> int:
        """The exit code, when the job has ended by itself."""
        try:
            return self.process.wait(seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """End all of the job's processes, including those in sessions that torchrun created."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and any(self._is_rank(entry, rank) for rank in range(2)):
                os.kill(int(entry.name), signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class ForkedRun(Run):
    """A job whose ranks are forked from a process that has imported the libraries; no launcher waits for them.

    With 0 ranks it is one process, with no launcher's variables but those of `environment`.
    """

    def __init__(self, folder: Path, flags: list[str], ranks: int, *, environment: dict[str, str] | None = None):
        words = self._prepare(folder, flags)
        self._log = folder / "stderr"
        self.process = fork_server.start(words, folder, ranks=ranks, env={**os.environ, **(environment or {})})

    def pid_of(self, rank: int) -> int:
        """The process of a rank."""
        return self.process.pids[rank]

    def code_of(self, rank: int) -> int | None:
        """The exit code of a rank, negative if a signal ended it; None while it is running."""
        self.process.poll()
        return self.process.codes[rank]

    def kill(self) -> None:
        """End all ranks."""
        self.process.kill()
