"""Print the quick start's results: one row a stage, and where everything lies.

    python examples/quickstart_table.py --results_file quickstart/results.json

Reads what quickstart_evaluate.py wrote, and each stage's speed from its TensorBoard logs.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors
from colossal_llama2.cli.parser import CommandParser

SPEED_TAG = "Tokens per Second"
LANGUAGES = {"en": "English", "neutral": "neutral English", "zh": "Chinese"}


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_table.py",
        "Print the quick start's results as a table.",
        "  python examples/quickstart_table.py --results_file quickstart/results.json",
    )
    parser.add_argument("--results_file", metavar="FILE", required=True, help="what quickstart_evaluate.py wrote")
    return parser


def tokens_per_second(tensorboard_dir: str | None) -> float | None:
    """The median speed in the TensorBoard logs under a folder; None if there are none."""
    if tensorboard_dir is None:
        return None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    speeds: list[float] = []
    for folder in sorted({file.parent for file in Path(tensorboard_dir).rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        if SPEED_TAG in events.Tags()["scalars"]:
            speeds += [event.value for event in events.Scalars(SPEED_TAG)]
    return statistics.median(speeds) if speeds else None


def aligned(rows: list[list[str]], *, left_columns: int = 1) -> str:
    """Rows as text columns: the first ones to the left, the others to the right, a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = zip(row, widths, strict=True)
        cells = [f"{cell:{'<' if index < left_columns else '>'}{width}}" for index, (cell, width) in enumerate(padded)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def measured_languages(entries: list[dict]) -> dict[str, str]:
    """The names of the languages that every stage was measured on, by code."""
    return {code: name for code, name in LANGUAGES.items() if all(code in entry["languages"] for entry in entries)}


def stage_table(entries: list[dict]) -> str:
    """One row a stage: losses in bits per UTF-8 byte, tokens per character, tokens per second."""
    codes = list(measured_languages(entries))
    header = ["stage", *(f"{code} bits/byte" for code in codes), *(f"{code} tokens/char" for code in codes), "tokens/s"]
    rows = [header]
    for entry in entries:
        figures = [entry["languages"][code] for code in codes]
        speed = tokens_per_second(entry["tensorboard_dir"])
        rows.append(
            [entry["stage"]]
            + [f"{figure['bits_per_byte']:.3f}" for figure in figures]
            + [f"{figure['tokens_per_character']:.3f}" for figure in figures]
            + ["n/a" if speed is None else f"{speed:,.0f}"]
        )
    return aligned(rows)


def changes(entries: list[dict]) -> str:
    """What the new pieces and the training changed in each language, from the first stage to the last."""
    first, last = entries[0]["languages"], entries[-1]["languages"]
    rows = [["", "tokens/char before", "after", "bits/byte first stage", "last stage", "change"]]
    for code, name in measured_languages(entries).items():
        before, after = first[code], last[code]
        rows.append(
            [
                name,
                f"{before['tokens_per_character']:.3f}",
                f"{after['tokens_per_character']:.3f}",
                f"{before['bits_per_byte']:.3f}",
                f"{after['bits_per_byte']:.3f}",
                f"{after['bits_per_byte'] / before['bits_per_byte'] - 1:+.1%}",
            ]
        )
    return aligned(rows)


def places(entries: list[dict]) -> str:
    """Where each stage's model, TensorBoard logs and settings lie."""
    rows = [["stage", "model", "TensorBoard logs", "settings"]]
    for entry in entries:
        paths = (entry["model_path"], entry["tensorboard_dir"], entry["config_file"])
        rows.append([entry["stage"], *(path or "-" for path in paths)])
    return aligned(rows, left_columns=len(rows[0]))


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with errors.one_line_errors("quickstart_table.py"):
        file = Path(args.results_file)
        if not file.is_file():
            raise errors.UserError(f"--results_file {file} does not exist; quickstart_evaluate.py writes it")
        entries = json.loads(file.read_text(encoding="utf-8"))
        print("Held-out loss and tokens after each stage (speed: median over the stage, all ranks)\n")
        print(stage_table(entries), changes(entries), places(entries), sep="\n\n")


if __name__ == "__main__":
    main()
