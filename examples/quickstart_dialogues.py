"""Choose the few dialogues that the quick start's last stage learns by heart, and some questions that are new to it.

    python examples/quickstart_dialogues.py --sft_dir quickstart/data/sft \\
        --held_out_dir quickstart/data/held_out --output_dir quickstart/data/chat

Writes learned/dialogues.jsonl, {"messages": [...]} of one question and its answer each, half English and half Chinese,
and new/questions.jsonl, of the same form, with dialogues that no stage was trained on.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import positive_int
from colossal_llama2.storage.input_files import check_regular

LANGUAGES = ("en", "zh")
# A question and its answer fit into a line of the table.
LONGEST = {"en": 28, "zh": 14}


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_dialogues.py",
        "Choose the dialogues of the quick start's last stage.",
        "  python examples/quickstart_dialogues.py --sft_dir quickstart/data/sft \\\n"
        "      --held_out_dir quickstart/data/held_out --output_dir quickstart/data/chat",
    )
    parser.add_argument("--sft_dir", metavar="DIR", required=True, help="dialogues that were trained on: en, zh.jsonl")
    parser.add_argument("--held_out_dir", metavar="DIR", required=True, help="held-out text, with dialogues")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--learned", type=positive_int, default=4, help="dialogues of each language")
    parser.add_argument("--new", type=positive_int, default=1, help="new questions of each language")
    return parser


def lines_of(path: Path) -> list[str]:
    """The lines of a file. Raises UserError if it is missing."""
    check_regular(path)
    return path.read_text(encoding="utf-8").splitlines()


def trained_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The questions and answers of dialogues of two messages."""
    for line in lines_of(path):
        contents = [message["content"] for message in json.loads(line)["messages"]]
        if len(contents) == 2:
            yield contents[0], contents[1]


def held_out_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The same of held-out dialogues, which are documents of one message per line."""
    for line in lines_of(path):
        record = json.loads(line)
        contents = record["target"].split("\n")
        if record["category"] == "dialogue" and len(contents) == 2:
            yield contents[0], contents[1]


def chosen(pairs: Iterator[tuple[str, str]], language: str, count: int) -> list[tuple[str, str]]:
    """The first short pairs, each question once."""
    found: dict[str, str] = {}
    for question, answer in pairs:
        if max(len(question), len(answer)) <= LONGEST[language] and question not in found:
            found[question] = answer
        if len(found) == count:
            return list(found.items())
    raise errors.UserError(f"only {len(found)} short dialogues of {language}; give data with at least {count}")


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    """Write pairs as conversations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, answer in pairs:
            messages = [{"from": "human", "content": question}, {"from": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with errors.one_line_errors("quickstart_dialogues.py"):
        learned, new = [], []
        for language in LANGUAGES:
            learned += chosen(trained_pairs(Path(args.sft_dir, f"{language}.jsonl")), language, args.learned)
            new += chosen(held_out_pairs(Path(args.held_out_dir, f"{language}.jsonl")), language, args.new)
        write(Path(args.output_dir, "learned", "dialogues.jsonl"), learned)
        write(Path(args.output_dir, "new", "questions.jsonl"), new)
        print(f"{len(learned)} dialogues to learn, {len(new)} new questions: {args.output_dir}")


if __name__ == "__main__":
    main()
