"""The results in a model card: a table in its text, and `model-index` in its front matter, which hubs read.

https://huggingface.co/docs/hub/model-cards, "Evaluation Results". The rest of the card stays as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.results import Result, figures
from colossal_llama2.evaluation.task import ACCURACY
from colossal_llama2.logs import get_logger
from colossal_llama2.markdown import front_matter, table
from colossal_llama2.storage.files import replace_file
from colossal_llama2.storage.input_files import MIB, check_regular
from colossal_llama2.storage.output_paths import check_output_file
from colossal_llama2.terminal_text import one_line

CARD, FLAG = "README.md", "--write_card"
CARD_BYTES = 64 * MIB
BORDER, INDEX = "---", "model-index"
BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def check_card(model_path: str) -> None:
    """Raise a UserError unless the card of a model can be written, and read if there is one."""
    folder = Path(model_path)
    if not folder.is_dir():
        raise UserError(
            f"{FLAG}: --model_path {model_path} is not a local folder, so it has no card to write; leave it out"
        )
    check_output_file(folder / CARD, FLAG)
    _read(folder / CARD)


def write_card(folder: Path, results: Sequence[Result]) -> None:
    """Put the results of a model into its card. Raises as `check_card`, and OSError if it cannot be written."""
    path = folder / CARD
    replace_file(path, with_results(_read(path), results).encode())
    get_logger().info(f"written: the results, in {path}")


def _read(path: Path) -> str:
    if not path.exists():
        return ""
    check_regular(path, max_bytes=CARD_BYTES, allows_empty=True)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{FLAG}: {path} is not UTF-8 at byte {error.start + 1:,}; convert it")
    if len(_borders(text.split("\n"))) == 1:
        raise UserError(f"{FLAG}: {path}:1: its front matter does not end; correct it")
    if (BEGIN in text) != (END in text):
        raise UserError(f"{FLAG}: {path} has only one of {BEGIN} and {END}; correct it")
    if BEGIN in text and (text.count(BEGIN) > 1 or text.count(END) > 1 or text.index(END) < text.index(BEGIN)):
        raise UserError(f"{FLAG}: {path} must have {BEGIN} once, and behind it {END} once; correct it")
    return text


def _borders(lines: Sequence[str]) -> list[int]:
    """Where the front matter begins and ends; empty if there is none."""
    # Spaces behind a border and the carriage returns of Windows do not count.
    if lines[0].rstrip() != BORDER:
        return []
    return [place for place, line in enumerate(lines) if line.rstrip() == BORDER][:2]


def with_results(card: str, results: Sequence[Result]) -> str:
    """The text of a card with these results, which replace those of an earlier evaluation."""
    # Not splitlines, which would also change other separators and carriage returns.
    lines = card.split("\n")
    matter: list[str] = []
    if borders := _borders(lines):
        _, end = borders
        matter, lines = lines[1:end], lines[end + 1 :]
    new = front_matter({INDEX: [model_index(results)]}).splitlines()[1:-1]
    head = "\n".join([BORDER, *_without_entry(matter, INDEX), *new, BORDER])
    body = "\n".join(lines).strip("\r\n")
    if BEGIN in body:
        before, after = body.partition(BEGIN)[0], body.partition(END)[2]
        body = f"{before}{_section(results)}{after}"
    else:
        body = f"{body}\n\n{_section(results)}".strip("\r\n")
    return f"{head}\n\n{body}\n"


def _without_entry(lines: Sequence[str], key: str) -> list[str]:
    """The lines of YAML without a top-level entry."""
    kept, is_inside = [], False
    for line in lines:
        if line.rstrip()[:1] not in (" ", "-", ""):
            is_inside = line.partition(":")[0].strip("\"'") == key
        if not is_inside:
            kept.append(line)
    return kept


def model_index(results: Sequence[Result]) -> dict[str, Any]:
    """The entry of a model: its name, and a result for each task."""
    return {
        "name": one_line(results[0].model),
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": one_line(result.task.partition(" ")[0]), "name": one_line(_named(result))},
                "metrics": [{"type": result.metric.replace(" ", "_"), "value": _value(result)}],
            }
            for result in results
        ],
    }


def _named(result: Result) -> str:
    return f"{result.task} ({result.shots}-shot)" if result.shots else result.task


def _value(result: Result) -> float:
    """Percent, as model cards have accuracies, or bits per byte."""
    return round(result.score.value * 100, 2) if result.metric == ACCURACY else round(result.score.value, 4)


def _section(results: Sequence[Result]) -> str:
    columns = ["task", "items", "metric", "score", "standard error"]
    rows = [
        [_named(result), f"{result.score.items:,}", result.metric, *figures(result, result.score)] for result in results
    ]
    return f"{BEGIN}\n## Evaluation on tasks\n\n{table(columns, rows)}\n{END}"
