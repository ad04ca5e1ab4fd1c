"""The process of a part, with all that it starts: begun, asked whether it has ended, killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from tests import fork_server
from tests.fork_server import ROOT

LAUNCHER_VARIABLES = fork_server.launcher.NAMES


class Process(Protocol):
    """A process that `start` or `fork` began."""

    def poll(self) -> int | None:
        """Its exit code, 128 and the signal's number if a signal ended it; None while it runs."""

    def kill(self) -> None:
        """End it and its children at once."""

    @property
    def text(self) -> str:
        """What it has printed: stdout, then stderr."""


class Starter(Protocol):
    """Begins a process: `start` or `fork`."""

    def __call__(self, command: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> Process:
        """
        Args:
            command: arguments of Python.
            folder: new; gets the files of the process's output.
            environment: variables besides those of this process.
        """


class _Started:
    def __init__(self, command: tuple[str, ...], folder: Path, environment: Mapping[str, str]):
        folder.mkdir(parents=True)
        self._files = (folder / "stdout", folder / "stderr")
        own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        with self._files[0].open("wb") as output, self._files[1].open("wb") as errors:
            # A session of its own is a process group that can be killed whole, compilers included.
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**own, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        code = self._process.poll()
        return 128 - code if code is not None and code < 0 else code

    def kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    @property
    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self._files)


class _Forked:
    def __init__(self, command: tuple[str, ...], folder: Path, environment: Mapping[str, str]):
        folder.mkdir(parents=True)
        self._command = fork_server.start(command, folder, env={**os.environ, **environment})

    def poll(self) -> int | None:
        return self._command.poll()

    def kill(self) -> None:
        self._command.kill()

    @property
    def text(self) -> str:
        return f"{self._command.output}\n{self._command.errors}"


def start(command: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> Process:
    """A new Python process, as a user would start it."""
    return _Started(command, folder, environment)


def fork(command: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> Process:
    """A fork of a process that has imported the libraries, which saves seconds on a CPU. It cannot use a GPU."""
    return _Forked(command, folder, environment)
