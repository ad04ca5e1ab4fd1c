"""One line of the doctor's result, and what all checks of reports share."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colossal_llama2.cluster.doctor.survey import Reply

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the result. Errors prevent training or make it wrong; a warning needs a look."""

    kind: str
    text: str


def error(place: str, text: str) -> Finding:
    """A fault of a host."""
    return Finding("error", f"{place}: {text}")


def warning(place: str, text: str) -> Finding:
    """A doubt about a host."""
    return Finding("warning", f"{place}: {text}")


def part_of(reply: Reply, name: str) -> dict[str, Any]:
    """A part of a report; empty if it failed or did not end, which is reported by itself."""
    part = (reply.report or {}).get(name)
    return part if isinstance(part, dict) and "failed" not in part else {}


def most_common(values: Sequence[Any]) -> Any:
    """The most frequent value, the first of several."""
    return Counter(values).most_common(1)[0][0] if values else None
