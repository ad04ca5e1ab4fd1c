"""The outcome of a check: how many faults of a kind were survived, and what happened otherwise."""

import time
from dataclasses import dataclass, field


@dataclass
class Row:
    """One row of the table. `record` is called once per fault, with what is wrong or None."""

    name: str
    faults: int = 0
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def record(self, where: str, problem: str | None) -> None:
        self.faults += 1
        if problem is not None:
            self.problems.append(f"{where}: {problem}")
        self.seconds = time.monotonic() - self.began

    @property
    def is_survived(self) -> bool:
        return not self.problems and self.faults > 0

    def __str__(self) -> str:
        survived = f"{self.faults - len(self.problems)}/{self.faults}"
        return f"| {self.name} | {survived} | {self.seconds:.0f} s |"


HEADER = "| fault | survived | time |\n|---|---|---|"
