"""What an evaluation prints and writes: a table, a JSON file and a chart of its figures."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.charts.scores import Bar, draw_scores
from colossal_llama2.evaluation.results import Result, Score, figures
from colossal_llama2.logs import get_logger
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.tables import print_table
from colossal_llama2.task_names import BITS_PER_BYTE

HEAD = ("model", "task", "examples", "items", "metric", "score", "error", "tokens/s")
ALIGN = "llrrlrrr"


def print_results(results: Sequence[Result], *, by_subject: bool) -> None:
    """Print the table to stdout: a line for each model and task, and with `by_subject` one for each subject."""
    rows: list[Sequence[str]] = [HEAD]
    for result in results:
        rows.append(_row(result, result.task, result.score, speed=f"{result.tokens_per_second:,.0f}"))
        if by_subject and len(result.subjects) > 1:
            rows += [_row(result, f"  {name}", score) for name, score in result.subjects.items()]
    print_table(rows, align=ALIGN)
    for line in _notes(results):
        get_logger().info("%s", line)


def _row(result: Result, name: str, score: Score, speed: str = "") -> Sequence[str]:
    shots = "" if result.num_fewshot is None else str(result.num_fewshot)
    return (result.model, name, shots, f"{score.items:,}", result.metric, *figures(result, score), speed)


def _notes(results: Sequence[Result]) -> Iterator[str]:
    for result in results:
        where = f"{result.model}, {result.task}"
        if result.parts:
            parts = ", ".join(f"{name.replace('_', ' ')} {score.value:.1%}" for name, score in result.parts.items())
            yield f"{where}: right {parts}, either {result.score.value:.1%}"
        if result.chance is not None:
            yield f"{where}: chance is {result.chance:.1%}"
        for note, count in result.notes.items():
            yield f"{where}: {note}: {count:,}"


def write_results(results: Sequence[Result], output_file: Path, settings: dict[str, Any]) -> None:
    """Write FILE.json and FILE.png beside --output_file. A chart that cannot be drawn is logged, not fatal."""
    content = {"settings": settings, "results": [_without_nan(result.as_json()) for result in results]}
    replace_file(output_file.with_suffix(".json"), to_json(content).encode())
    draw_results(results, output_file.with_suffix(".png"))
    get_logger().info(f"written: {output_file.with_suffix('.json')}, {output_file.with_suffix('.png')}")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def draw_results(results: Sequence[Result], path: Path) -> None:
    """Draw bars with error bars: accuracies on the left, bits per byte on the right, a colour for each model."""
    bars = [
        # The axis has the metric's name already.
        Bar(
            result.model,
            result.task.removeprefix(f"{BITS_PER_BYTE} "),
            result.score.value,
            result.score.error or 0.0,
            result.metric,
            result.chance,
        )
        for result in results
        if not math.isnan(result.score.value)
    ]
    if bars:
        draw_scores(bars, path)
