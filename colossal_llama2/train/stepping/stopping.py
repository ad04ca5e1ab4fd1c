"""Stop a run early on a signal, after saving.

    SIGTERM, SIGINT    save after the current step, on all ranks, and exit with code 143 or 130; an evaluation is
                       interrupted, and repeated when the run is resumed
    SIGUSR1            the same, and exit with code 0
    a second SIGINT    exit at once, with code 130

A rank that has not joined the others yet, and may be waiting for a dead one, saves nothing and exits at once.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from colossal_llama2 import logs
from colossal_llama2.errors import Stopped
from colossal_llama2.launcher import place
from colossal_llama2.terminal_text import report_line
from colossal_llama2.train.run_folder import run_lock

# If several signals came, the first of these decides the exit code.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun kills the processes of a job this long after it was asked to end.
TORCHRUN_SECONDS = 30.0
# How long a rank that is inside a library may take to react to a signal.
GRACE_SECONDS = 2.0


class NoSignals:
    """Receives no signals: for programs that handle signals themselves."""

    def meet(self) -> None:
        """Called when the ranks are connected."""

    def begin(self) -> None:
        """Called before the first step."""

    def received(self) -> list[float]:
        """1 for each of SIGNALS that this process received, 0 for the others."""
        return [0.0] * len(SIGNALS)


class StopSignals(NoSignals):
    """Records the signals above inside a `with`. Until the process has joined the others it raises Stopped at once.

    Ranks compare what they received at the start of each step, and of each batch of an evaluation: if one rank stopped
    on its own, the others would wait for it. A process without partners raises Stopped until its first step.

    A thread records the signals, whose numbers the system's handler writes to a socket. Python's own handlers do not
    run while the main thread waits for other ranks, and a second SIGINT must not be delayed.
    """

    def __init__(self, *, has_partners: bool):
        self._has_partners, self._raises = has_partners, True
        self._counts: dict[int, int] = dict.fromkeys(SIGNALS, 0)

    def __enter__(self) -> "StopSignals":
        self._inlet, self._outlet = socket.socketpair()
        self._inlet.setblocking(False)
        self._outlet_before = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        threading.Thread(target=self._count_signals, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._raises = False
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outlet_before)
        # The thread reads the end of the stream, and ends.
        self._inlet.close()

    def meet(self) -> None:
        self._raises = not self._has_partners

    def begin(self) -> None:
        self._raises = False

    def received(self) -> list[float]:
        return [float(self._counts[number] > 0) for number in SIGNALS]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends_at_once(number):
            raise Stopped(number, _early(number))

    def _ends_at_once(self, number: int) -> bool:
        # After SIGUSR1 the exit code is 0: the launcher would consider this process done, while the others wait for it.
        return self._raises and number in SIGNALS and not (self._has_partners and number == signal.SIGUSR1)

    def _end_process(self, number: int) -> None:
        """Exit, if the exception did not end the process: its main thread is in a library, which may have caught it."""
        if self._raises:
            if logs.is_first_rank():
                report_line(f"{Path(sys.argv[0]).name}: stopped: {_early(number)}")
            run_lock.release()
            os._exit(Stopped(number, "").exit_code)

    def _count_signals(self) -> None:
        with self._outlet:
            while numbers := self._outlet.recv(64):
                for number in numbers:
                    if number in self._counts:
                        self._counts[number] += 1
                    if self._counts[signal.SIGINT] > 1:
                        end_at_once()
                    if self._ends_at_once(number):
                        timer = threading.Timer(GRACE_SECONDS, self._end_process, (number,))
                        timer.daemon = True
                        timer.start()


def _early(number: int) -> str:
    return f"{signal.Signals(number).name} came before the first step; nothing was trained"


def end_at_once() -> NoReturn:
    """Exit without saving and without waiting for other ranks."""
    if logs.is_first_rank():
        report_line("interrupted again: exiting without saving; earlier checkpoints are complete")
    run_lock.release()
    os._exit(128 + signal.SIGINT)


def agreed_signal(sums: Sequence[float]) -> signal.Signals | None:
    """The signal to react to, from the sums of what all ranks received; None if there is none."""
    return next((number for number, count in zip(SIGNALS, sums, strict=True) if count), None)


def log_stop(number: signal.Signals, *, save_seconds: float | None) -> None:
    """Log that the run saves and ends, and whether there may be too little time. `save_seconds`: of the last save."""
    run_lock.mark_ending()
    logs.get_logger().info("%s: saving, then ending", number.name)
    is_hurried = number == signal.SIGTERM and place().launcher == "torchrun"
    if is_hurried and save_seconds is not None and save_seconds > TORCHRUN_SECONDS / 2:
        logs.get_logger().warning(
            "torchrun kills its processes %.0f s after SIGTERM, and the last save took %.0f s; if this save is "
            "interrupted, the checkpoint before it is kept. After SIGUSR1 to the ranks there is no time limit",
            TORCHRUN_SECONDS,
            save_seconds,
        )
