"""Why a run may stop before its end: a signal, after which it saves.

    SIGTERM, SIGINT    save at the end of the current step, on all ranks, and end with code 143 or 130; an evaluation is
                       left unfinished, and a resumed run makes up for it
    SIGUSR1            the same, and end with code 0
    a second SIGINT    end at once, with code 130

A rank that is still on its way to the others, and so may wait for one that is dead, saves nothing and ends at once.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from colossal_llama2 import logs
from colossal_llama2.errors import Stopped
from colossal_llama2.launcher import place
from colossal_llama2.terminal_text import show_line
from colossal_llama2.train.run_folder import run_lock

# If several came, the first of these decides the exit code.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun kills what is left of a job so long after it was told to end.
TORCHRUN_SECONDS = 30.0
# How long a rank that waits for others inside a library may take to hear of a signal.
GRACE_SECONDS = 2.0


class NoSignals:
    """For programs that keep signals to themselves: none is ever received."""

    def meet(self) -> None:
        """Called when the ranks have met."""

    def begin(self) -> None:
        """Called before the first step."""

    def received(self) -> list[float]:
        """1 for each of SIGNALS that came to this process, 0 for the others."""
        return [0.0] * len(SIGNALS)


class StopSignals(NoSignals):
    """Notes the signals above inside a `with`, and before the process has met its partners raises Stopped at once.

    Ranks agree on what they noted when a step begins, or a batch of an evaluation: if one left by itself, the others
    would wait for it. A process without partners raises Stopped until its first step.

    A signal is noted by a thread, to which the system's handler writes its number: Python's own handlers wait while
    the main thread waits for other ranks, and a second SIGINT must not.
    """

    def __init__(self, *, has_partners: bool):
        self._has_partners, self._raises = has_partners, True
        self._counts = dict.fromkeys(SIGNALS, 0)

    def __enter__(self) -> "StopSignals":
        self._inlet, self._outlet = socket.socketpair()
        self._inlet.setblocking(False)
        self._outlet_before = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        self._handlers_before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        threading.Thread(target=self._note, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._raises = False
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outlet_before)
        # The thread reads the end of it, and ends.
        self._inlet.close()

    def meet(self) -> None:
        self._raises = not self._has_partners

    def begin(self) -> None:
        self._raises = False

    def received(self) -> list[float]:
        return [float(self._counts[number] > 0) for number in SIGNALS]

    def _handle(self, number, frame) -> None:
        if self._is_obeyed_at_once(number):
            raise Stopped(number, _early(number))

    def _is_obeyed_at_once(self, number: int) -> bool:
        # After SIGUSR1 the launcher would take this process for done, and leave the others waiting for it.
        return self._raises and number in SIGNALS and not (self._has_partners and number == signal.SIGUSR1)

    def _end_unheard(self, number: int) -> None:
        """End a process whose main thread is inside a library, which an exception does not reach, or which ate it."""
        if self._raises:
            if logs.is_first_rank():
                show_line(f"{Path(sys.argv[0]).name}: stopped: {_early(number)}", file=sys.stderr)
            run_lock.let_go()
            os._exit(Stopped(number, "").exit_code)

    def _note(self) -> None:
        with self._outlet:
            while numbers := self._outlet.recv(64):
                for number in numbers:
                    if number in self._counts:
                        self._counts[number] += 1
                    if self._counts[signal.SIGINT] > 1:
                        end_at_once()
                    if self._is_obeyed_at_once(number):
                        timer = threading.Timer(GRACE_SECONDS, self._end_unheard, (number,))
                        timer.daemon = True
                        timer.start()


def _early(number: int) -> str:
    return f"{signal.Signals(number).name} came before the first step; nothing was trained"


def end_at_once() -> NoReturn:
    """Leave without saving and without waiting for anybody."""
    if logs.is_first_rank():
        show_line("interrupted again: ended without saving; earlier checkpoints are whole", file=sys.stderr)
    run_lock.let_go()
    os._exit(128 + signal.SIGINT)


def agreed_signal(sums: Sequence[float]) -> signal.Signals | None:
    """The signal to obey, from the sums of what all ranks received; None if none came."""
    return next((number for number, count in zip(SIGNALS, sums, strict=True) if count), None)


def log_stop(number: signal.Signals, *, save_seconds: float | None) -> None:
    """Log that a signal is about to end the run, and what may go wrong. `save_seconds`: what the last save took."""
    run_lock.say_ending()
    logs.get_logger().info("%s: saving, then ending", number.name)
    is_hurried = number == signal.SIGTERM and place().launcher == "torchrun"
    if is_hurried and save_seconds is not None and save_seconds > TORCHRUN_SECONDS / 2:
        logs.get_logger().warning(
            "torchrun kills its processes %.0f s after SIGTERM, the last save took %.0f s; if this one is cut short, "
            "the checkpoint before it stays. SIGUSR1 to the ranks gives all the time that a save takes",
            TORCHRUN_SECONDS,
            save_seconds,
        )
