"""Run parts in their order, each within its time limit and all within that of the run, whatever becomes of any."""

import itertools
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.parts import FAILED, PASSED, SKIPPED, Figures, Outcome, Part
from tests.gpu.processes import Process, Starter

TAIL_CHARACTERS = 4000
REASON_CHARACTERS = 300
POLL_SECONDS = 0.05
# A part that has less time left is not started.
LEAST_SECONDS = 5.0
ERROR_LINE = re.compile(r"(\w+\.)*\w*(Error|Exception)\b|\w[\w.]*: error\b|.*\bnot equal: ")

Outcomes = dict[str, Outcome]


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        deadline: of the whole run, by time.monotonic().
        beside: number of parts that may run at a time if none of them must be alone.
    """

    deadline: float
    beside: int = 1


@dataclass
class _Running:
    part: Part
    process: Process
    began: float
    limit: float

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class Schedule:
    """The parts of a run: which wait, which are running, and how the others ended."""

    def __init__(self, parts: Sequence[Part], *, limits: Limits, starter: Starter, folder: Path):
        """
        Args:
            folder: gets a folder for each part, with the files of its output.
        """
        self._waiting, self._running = list(parts), list[_Running]()
        self._limits, self._starter, self._folder = limits, starter, folder
        self._numbers = itertools.count()
        self.outcomes: Outcomes = {}

    def run(self, report: Callable[[Part, Outcome], None]) -> Outcomes:
        """Run all parts; `report` is called for each as it ends or is skipped."""
        try:
            while self._waiting or self._running:
                for part, outcome in itertools.chain(self._ended(), self._skipped()):
                    self.outcomes[part.name] = outcome
                    report(part, outcome)
                while (part := self._next()) is not None:
                    self._start(part)
                time.sleep(POLL_SECONDS)
        finally:
            for running in self._running:
                running.process.kill()
        return self.outcomes

    def _ended(self) -> Iterator[tuple[Part, Outcome]]:
        for running in list(self._running):
            code = running.process.poll()
            if code is None and running.seconds < running.limit:
                continue
            if code is None:
                running.process.kill()
            self._running.remove(running)
            yield running.part, _outcome(running, code)

    def _skipped(self) -> Iterator[tuple[Part, Outcome]]:
        """What cannot start any more, and then what needs it, since parts come after those that they need."""
        for part in list(self._waiting):
            reason = self._why_skipped(part)
            if reason is not None:
                self._waiting.remove(part)
                yield part, Outcome(SKIPPED, reason=reason)

    def _why_skipped(self, part: Part) -> str | None:
        for name in part.needs:
            if name in self.outcomes and self.outcomes[name].status != PASSED:
                verb = "failed" if self.outcomes[name].status == FAILED else "was skipped"
                return f'it needs "{name}", which {verb}'
        if self._limits.deadline - time.monotonic() < LEAST_SECONDS:
            return "the time of the run was over"
        return None

    def _next(self) -> Part | None:
        """The first part that can start now. None is started before one that only waits to be alone."""
        for part in self._waiting:
            if not all(name in self.outcomes for name in part.needs):
                continue
            if part.is_alone:
                return None if self._running else part
            is_full = len(self._running) >= self._limits.beside
            return None if is_full or any(running.part.is_alone for running in self._running) else part
        return None

    def _start(self, part: Part) -> None:
        self._waiting.remove(part)
        process = self._starter(part.command, self._folder / f"part-{next(self._numbers)}", part.environment)
        now = time.monotonic()
        self._running.append(_Running(part, process, now, min(part.seconds, self._limits.deadline - now)))


def _outcome(running: _Running, code: int | None) -> Outcome:
    """How a part ended whose process has this exit code, or was killed if None."""
    part, text, seconds = running.part, running.process.text, running.seconds
    figures, unread = _figures(part, text)
    if code is None and running.limit < part.seconds:
        status, reason = SKIPPED, f"the time of the run was over after {seconds:.0f} s of this part"
    elif code is None:
        status, reason = FAILED, f"it had not ended after {part.seconds:g} s, and was killed"
    elif code > 128:
        status, reason = FAILED, f"it was ended by {_signal_name(code - 128)}"
    elif code:
        status, reason = FAILED, reason_in(text) or f"it ended with exit code {code} and printed nothing"
    elif unread is not None:
        status, reason = FAILED, unread
    else:
        status, reason = PASSED, ""
    return Outcome(status, seconds, reason, figures, text[-TAIL_CHARACTERS:])


def _figures(part: Part, text: str) -> tuple[Figures, str | None]:
    """The figures, or none and why they could not be read."""
    try:
        return part.read(text), None
    except (ValueError, OSError) as error:
        return {}, f"no figures: {error}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def reason_in(text: str) -> str:
    """The last line that reads like an error, otherwise the last line; empty if nothing was printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or [""])[-1][:REASON_CHARACTERS]
