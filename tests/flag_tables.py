"""Writes docs/flags.md: the flags of every command, as tables made from the parsers.

    python -m tests.flag_tables --output docs/flags.md

tests/test_readme.py compares the committed page with the output of this script.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from colossal_llama2.cli import (
    cluster_flags,
    data_flags,
    evaluation_flags,
    inference_flags,
    tokenizer_flags,
    train_flags,
)
from colossal_llama2.cli.parser import CommandParser

INTRODUCTION = """\
# Flags

Written by `python -m tests.flag_tables --output docs/flags.md` from the parsers behind `--help`, so the two agree.
"-" in the column "default" means that the flag is off or not set. Flags cannot be abbreviated. For a misspelt flag, or
another tool's name such as `--learning_rate`, the error message names the right one.
"""
# The command as typed, its parser, and the command whose flags it shares, if there is one.
COMMANDS: dict[str, tuple[Callable[[], CommandParser], str | None]] = {
    "init_tokenizer.py": (tokenizer_flags.init_tokenizer_parser, None),
    "init_model.py": (tokenizer_flags.init_model_parser, None),
    "prepare_pretrain_dataset.py": (data_flags.prepare_pretrain_parser, None),
    "prepare_sft_dataset.py": (data_flags.prepare_sft_parser, "prepare_pretrain_dataset.py"),
    "train.py": (train_flags.train_parser, None),
    "train_sft.py": (train_flags.train_sft_parser, "train.py"),
    "inference_example.py": (inference_flags.inference_parser, None),
    "colossal_llama2.evaluation": (evaluation_flags.evaluation_parser, None),
    "colossal_llama2.model.merge_lora": (tokenizer_flags.merge_lora_parser, None),
    "colossal_llama2.tokenizer.mine_tokens": (tokenizer_flags.mine_tokens_parser, None),
    "colossal_llama2.tokenizer.compare": (tokenizer_flags.compare_parser, None),
    "colossal_llama2.tokenizer.convert_tiktoken": (tokenizer_flags.convert_tiktoken_parser, None),
    "colossal_llama2.dataset.inspect_data": (data_flags.inspect_data_parser, None),
    "colossal_llama2.train.verify": (train_flags.verify_parser, None),
    "colossal_llama2.train.faster_precision": (train_flags.faster_precision_parser, None),
    "colossal_llama2.train.doctor": (cluster_flags.doctor_parser, None),
    "colossal_llama2.train.selftest": (train_flags.selftest_parser, "train.py"),
}
TABLE_HEAD = ["| flag | default | meaning |", "|---|---|---|"]
# A command with more flags gets one table for each of its argument groups.
LONG = 25
DEFAULT_IN_HELP = re.compile(r" ?\(default: ([^()]*)\)$")


def page() -> str:
    """The whole of docs/flags.md."""
    return "\n".join([INTRODUCTION, *(section(command) for command in COMMANDS)])


def section(command: str) -> str:
    """One command and its flags; flags that it shares with another command are listed only if they differ."""
    make_parser, base = COMMANDS[command]
    parser = make_parser()
    groups = {group.title: dict(flag_rows(group.actions)) for group in parser.groups}
    lines = [f"## {command}", "", f"{parser.description}", ""]
    if base:
        rows = {name: row for group in groups.values() for name, row in group.items()}
        shared = dict(flag_rows(COMMANDS[base][0]().actions))
        same = [name for name in rows if shared.get(name) == rows[name]]
        names = "all flags" if shared.keys() <= rows.keys() else f"the flags {', '.join(f'`{name}`' for name in same)}"
        lines += [f"Accepts {names} of [{base}](#{anchor(base)}), and these, which are new or differ:", ""]
        groups = {"": {name: row for name, row in rows.items() if name not in same}}
    if sum(map(len, groups.values())) > LONG:
        for title, rows in groups.items():
            lines += [f"### {command}: {title}", "", *TABLE_HEAD, *rows.values(), ""] if rows else []
    else:
        lines += [*TABLE_HEAD, *(row for rows in groups.values() for row in rows.values()), ""]
    return "\n".join(lines)


def flag_rows(actions: Iterable[argparse.Action]) -> Iterator[tuple[str, str]]:
    """(longest spelling, table row) of each flag and positional argument, in the order of --help."""
    for action in actions:
        if action.dest != "help":
            names = action.option_strings or [action.metavar]
            cells = (", ".join(f"`{name}`" for name in names) + value_of(action), *default_and_meaning(action))
            yield max(names, key=len), f"| {' | '.join(cells)} |"


def value_of(action: argparse.Action) -> str:
    """The words after the flag on the command line, such as ` DIR ...`; "" for a switch or a positional argument."""
    if action.nargs == 0 or not action.option_strings:
        return ""
    words = (
        [str(choice) for choice in action.choices] if action.choices else [str(action.metavar or action.dest.upper())]
    )
    many = " ..." if action.nargs == "+" else ""
    return " " + r" \| ".join(word.replace("|", r" \| ") for word in words) + many


def default_and_meaning(action: argparse.Action) -> tuple[str, str]:
    """The default, "required" or "-", and the help text without its own mention of the default."""
    meaning = (action.help or "").replace("%%", "%").replace("|", r"\|")
    found = DEFAULT_IN_HELP.search(meaning)
    if found:
        return found[1] if " " in found[1] else f"`{found[1]}`", DEFAULT_IN_HELP.sub("", meaning)
    if action.required:
        return "required", meaning
    is_switch = action.nargs == 0
    return ("-" if is_switch or action.default is None else f"`{action.default}`"), meaning


def anchor(command: str) -> str:
    """The fragment that GitHub gives the heading of a command."""
    return re.sub(r"[^\w-]", "", command.lower())


def main(argv: list[str] | None = None) -> None:
    """Print the page, or write it to --output."""
    parser = argparse.ArgumentParser(prog="python -m tests.flag_tables", description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write; without it the page is printed")
    output = parser.parse_args(argv).output
    if output:
        output.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main()
