"""The figures of a model on a task, from the records of its items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from colossal_llama2.evaluation.task import BITS, Task


@dataclass(frozen=True)
class Score:
    """A mean over items, its standard error (None for a single item), and the number of items."""

    value: float
    error: float | None
    items: int


@dataclass(frozen=True)
class Result:
    """What a model reaches on a task.

    Attributes:
        metric: `task.ACCURACY` or `task.BITS`.
        num_fewshot: examples that were asked for before each question; None for a task without questions.
        score: over all items.
        subjects: of each subject, by name.
        parts: of a combined metric, its parts; empty for others.
        chance: the mean of what guessing reaches; None if there is none.
        tokens: of all prompts or texts.
        seconds: that computing them took, loading not counted.
        notes: counts of what was left out, dropped or cut.
        examples: the least and the most that a question has; None for a task without questions.
    """

    model: str
    task: str
    metric: str
    num_fewshot: int | None
    score: Score
    subjects: Mapping[str, Score]
    parts: Mapping[str, Score]
    chance: float | None
    tokens: int
    seconds: float
    notes: Mapping[str, int]
    examples: tuple[int, int] | None = None

    @property
    def shots(self) -> str:
        """How many examples the questions have, such as "5" or "3-5"; "" for a task without questions."""
        return "" if self.examples is None else "-".join(map(str, dict.fromkeys(self.examples)))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the prompts, those that were shared and computed once included, per second."""
        return self.tokens / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "tokens_per_second": round(self.tokens_per_second, 1)}


def result_of(model: str, task: Task, records: Sequence[Mapping[str, Any]]) -> Result:
    """The figures from the records of all items of a task."""
    # In the order of the items, so that sums do not depend on the order of the batches.
    records = sorted(records, key=lambda record: record["item"])
    score = _bits if task.metric == BITS else _accuracy
    by_subject: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_subject.setdefault(record["subject"], []).append(record)
    parts = [name for name in records[0] if name.startswith("is_correct_by_")]
    chances = [record["chance"] for record in records if "chance" in record]
    if task.metric != BITS and "logits" in records[0] and not chances and not parts:
        chances = [1 / len(record["logits"]) for record in records]
    shots = [record["examples"] for record in records if "examples" in record]
    return Result(
        model,
        task.name,
        task.metric,
        task.num_fewshot,
        score(records),
        {subject: score(some) for subject, some in by_subject.items()},
        {name.removeprefix("is_correct_"): _accuracy(records, name) for name in parts},
        math.fsum(chances) / len(chances) if chances else None,
        sum(record["tokens"] for record in records),
        round(math.fsum(record["seconds"] for record in records), 3),
        _notes(task, records),
        (min(shots), max(shots)) if shots else None,
    )


def _notes(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts of what was left out, dropped or cut, without those that are 0."""
    cut = max((record["new_tokens"] for record in records if record.get("is_cut")), default=0)
    counts = {
        "prompts with fewer examples": sum(bool(record.get("dropped_examples")) for record in records),
        "prompts cut in front": sum(bool(record.get("cut_tokens")) for record in records),
        f"answers cut at {cut} tokens": sum(bool(record.get("is_cut")) for record in records),
        "texts without a token to predict": sum(record.get("predicted") == 0 for record in records),
    }
    left_out = {f"items {reason}": count for reason, count in task.left_out.items()}
    return left_out | {noun: count for noun, count in counts.items() if count}


def _accuracy(records: Sequence[Mapping[str, Any]], name: str = "is_correct") -> Score:
    return share_of(sum(bool(record[name]) for record in records), len(records))


def share_of(right: float, count: int) -> Score:
    """The share of right items. The error is that of a mean: sqrt(p (1 - p) / (n - 1))."""
    share = right / count
    return Score(share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None, count)


def _bits(records: Sequence[Mapping[str, Any]]) -> Score:
    """All bits over all bytes. The error is that of a ratio of sums over texts (Cochran 1977, eq. 6.4)."""
    bits, size = math.fsum(record["bits"] for record in records), sum(record["bytes"] for record in records)
    count = len(records)
    if not size:
        return Score(math.nan, None, count)
    ratio = bits / size
    squares = math.fsum((record["bits"] - ratio * record["bytes"]) ** 2 for record in records)
    return Score(ratio, math.sqrt(squares * count / (count - 1)) / size if count > 1 else None, count)


def figures(result: Result, score: Score) -> tuple[str, str]:
    """A score and its error as people read them: percent, or bits per byte."""
    if result.metric == BITS:
        return f"{score.value:.4f}", "" if score.error is None else f"{score.error:.4f}"
    return f"{score.value:.1%}", "" if score.error is None else f"{score.error:.1%}"
