"""A part of the run: the process that it is, what it waits for, and how it ended."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# Begins the line in which a module of this folder prints its figures.
FIGURES_MARK = "figures: "

Figures = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One process with a time limit.

    Attributes:
        name: unique in a run.
        section: the section of the page that shows it.
        command: arguments of Python: a script, or "-m" and a module, and flags.
        seconds: time limit.
        read: turns what the process printed into figures. Raises ValueError if they are not there.
        needs: names of earlier parts that must have passed.
        is_alone: nothing runs beside it, since it measures speed or memory.
        environment: variables that its process has besides those of the run.
    """

    name: str
    section: str
    command: tuple[str, ...]
    seconds: float
    read: Callable[[str], Figures]
    needs: tuple[str, ...] = ()
    is_alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended.

    Attributes:
        status: PASSED, FAILED or SKIPPED.
        seconds: that its process ran.
        reason: why it failed or was skipped, in one line; empty if it passed.
        figures: what it measured, also of a failed part if it got that far.
        tail: the end of what its process printed.
    """

    status: str
    seconds: float = 0.0
    reason: str = ""
    figures: Figures = field(default_factory=dict)
    tail: str = ""


def print_figures(**figures: Any) -> None:
    """Print the figures of this process, for `printed_figures`."""
    print(FIGURES_MARK + json.dumps(figures), flush=True)


def printed_figures(text: str) -> Figures:
    """What `print_figures` printed. Raises ValueError if it printed nothing."""
    for line in reversed(text.splitlines()):
        if line.startswith(FIGURES_MARK):
            return json.loads(line.removeprefix(FIGURES_MARK))
    raise ValueError("its output has no line of figures")
