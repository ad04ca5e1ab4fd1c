"""What the command lines of benchmarks share: the parser, --smallest, --work_dir, and packages that they need."""

import argparse
import importlib.util
from pathlib import Path

from colossal_llama2 import errors
from colossal_llama2.cli.parser import CommandParser

SMALLEST_NOTE = "smallest form: checks that the command works; its figures mean nothing"


def benchmark_parser(documentation: str) -> CommandParser:
    """The parser of a benchmark whose docstring starts with a sentence and then has an indented example."""
    description, example = documentation.splitlines()[0], documentation.split("\n\n")[1].strip()
    return CommandParser(Path(example.split()[1]).name, description, f"  {example}")


def add_smallest(parser: CommandParser) -> None:
    """Define --smallest."""
    parser.add_argument(
        "--smallest", action="store_true", help="check in seconds that the command works; its figures mean nothing"
    )


def refuse_with_smallest(parser: CommandParser, args: argparse.Namespace, *names: str) -> None:
    """End with code 2 if --smallest is given with a flag that it replaces, which is None unless given."""
    given = [f"--{name}" for name in names if getattr(args, name) is not None]
    if args.smallest and given:
        parser.error(f"--smallest has a value of its own for {' and '.join(given)}; leave out one of them")


def print_note(args: argparse.Namespace) -> None:
    """With --smallest, print first of all what the figures are worth."""
    if args.smallest:
        print(SMALLEST_NOTE, flush=True)


def make_folder(parser: CommandParser, folder: Path) -> Path:
    """Make the folder of --work_dir, which is removed at the end and so must be new. Ends with code 2 if it is not.

    Returns:
        Its absolute path, since ranks start in another folder.
    """
    try:
        folder.mkdir()
    except OSError as error:
        parser.error(f"--work_dir {folder}: {error.strerror}; give a new folder in one that exists")
    return folder.absolute()


def package_folder(package: str, requirements: str = "requirements-dev.txt") -> Path:
    """Where the code of an installed package is, without importing it. Raises UserError if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise errors.UserError(
            f"{package.replace('_', '-')} is not installed; run: pip install --no-deps -r {requirements}"
        )
    return Path(found.origin).parent
