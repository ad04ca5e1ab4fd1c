"""Print what the quick start's last model answers: to dialogues that it was trained on, and to new questions.

    python examples/quickstart_answers.py --learned_file quickstart/learned.jsonl --new_file quickstart/new.jsonl

Reads two files that inference_example.py --output_file wrote.
"""

import json
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.storage.input_files import check_regular
from colossal_llama2.terminal_text import visible_line

# Of each text, in columns of a terminal: the table has 80.
WIDEST = 28


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_answers.py",
        "Print the answers of the quick start's last model as a table.",
        "  python examples/quickstart_answers.py --learned_file quickstart/learned.jsonl \\\n"
        "      --new_file quickstart/new.jsonl",
    )
    parser.add_argument("--learned_file", metavar="FILE", required=True, help="answers to dialogues of its training")
    parser.add_argument("--new_file", metavar="FILE", required=True, help="answers to questions that are new to it")
    return parser


def columns_of(text: str) -> int:
    """How many columns a terminal needs for a text: two for each wide character."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def fitted(text: str, width: int) -> str:
    """A text in exactly this many columns, cut or with spaces behind it."""
    text = visible_line(text)
    if columns_of(text) > width:
        while columns_of(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns_of(text))


def rows_of(path: Path, kind: str) -> list[tuple[str, str, str, bool | None]]:
    """(kind, question, answer, is it the answer of the training) for each line; None for a new question."""
    rows = []
    check_regular(path)
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            answer = record["answer"].strip()
            is_right = answer == record["reference"].strip() if kind == "trained" else None
            rows.append((kind, record["messages"][-1]["content"], answer, is_right))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise errors.UserError(f"{path}: not the answers of inference_example.py to conversations; make it again")
    return rows


def table(rows: list[tuple[str, str, str, bool | None]]) -> list[str]:
    """The lines of the table, and a line that counts."""
    lines = [f"{'dialogue':<9} {fitted('question', WIDEST)} {fitted('answer', WIDEST)} as trained", "-" * 79]
    for kind, question, answer, is_right in rows:
        shown = {True: "yes", False: "no", None: "-"}[is_right]
        lines.append(f"{kind:<9} {fitted(question, WIDEST)} {fitted(answer, WIDEST)} {shown}")
    known = [is_right for *_, is_right in rows if is_right is not None]
    lines.append(f"{sum(known)} of {len(known)} trained dialogues are answered word for word.")
    return lines


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with errors.one_line_errors("quickstart_answers.py"):
        rows = rows_of(Path(args.learned_file), "trained") + rows_of(Path(args.new_file), "new")
        print("\n".join(table(rows)))
        for language, is_of_it in (("English", str.isascii), ("Chinese", lambda text: not text.isascii())):
            known = [is_right for _, question, _, is_right in rows if is_right is not None and is_of_it(question)]
            if known and not any(known):
                raise errors.RunError(f"no trained dialogue in {language} is answered word for word")


if __name__ == "__main__":
    main()
