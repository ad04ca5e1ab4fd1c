"""Read settings from a file that --config_file wrote, as words for the same parser.

Every value is checked by the type and the choices of its flag, as on the command line. The words are put before those
of the command line, so the command line wins. A switch that the file turns on stays on.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.cli.flag_definitions import FlagParser
from colossal_llama2.cli.flag_names import nearest
from colossal_llama2.storage import json_input

FLAG = "--load_config"
# Entries of the file that are not flags: facts about the run, and which of the two commands wrote it.
NOT_FLAGS = {"versions", "total_steps", "world_size", "stage", "pad_token", "load_config", "run_id"}
COMMANDS = {"pretrain": "train.py", "sft": "train_sft.py"}


def named_file(words: Sequence[str]) -> str | None:
    """The file given with --load_config, the last one if there are several."""
    found = None
    for word, following in itertools.zip_longest(words, words[1:]):
        if word == "--":
            break
        if word == FLAG:
            found = following
        elif word.startswith(FLAG + "="):
            found = word.split("=", 1)[1]
    return found


def words_of(path: str, parser: FlagParser) -> list[str]:
    """The settings in a file as words of a command line.

    Raises:
        ValueError: the file, or an entry of it, is invalid; the message is complete.
    """
    where = f"{FLAG} {path}"
    content = _read(path, where)
    stage = content.get("stage")
    if stage is not None and stage != parser.get_default("stage"):
        raise ValueError(f"{where}: was written by {COMMANDS.get(stage, stage)}; give a file of {parser.prog}")
    actions = {action.dest: action for action in parser.actions if action.option_strings and action.dest != "help"}
    words: list[str] = []
    for name, value in content.items():
        if name in NOT_FLAGS or value is None and name in actions:
            continue
        if name not in actions:
            near = nearest(name, actions)
            raise ValueError(f"{where}: {name} is not a flag" + (f", did you mean {near}?" if near else ""))
        words += _words(actions[name], value, f"{where}: {name}")
    return words


def _read(path: str, where: str) -> dict[str, Any]:
    try:
        return json_input.read_object(Path(path))
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}; give a file that --config_file wrote")
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON as --config_file writes it ({error}); give a file that it wrote")


def _words(action: argparse.Action, value: Any, where: str) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {json.dumps(value)}, true or false allowed")
        return [flag] if value else []
    takes_many = action.nargs in ("+", "*")
    texts = [_text(entry, action, where) for entry in _entries(value, takes_many, where)]
    for text in texts:
        try:
            value = action.type(text) if callable(action.type) else text
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}")
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{where}: {text} given, {', '.join(map(str, action.choices))} allowed")
    # Joined by =, a value may begin with a hyphen.
    return [flag, *texts] if takes_many else [f"{flag}={texts[0]}"]


def _entries(value: Any, takes_many: bool, where: str) -> list[Any]:
    """The entries of a list; those of an object or a list of pairs become NAME=VALUE, as on the command line."""
    if not takes_many:
        if isinstance(value, (list, dict)):
            raise ValueError(f"{where} is {json.dumps(value)}, one value allowed")
        return [value]
    entries = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where} is {json.dumps(value)}, a list of values allowed")
    return ["=".join(map(str, entry)) if _is_pair(entry) else entry for entry in entries]


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[0], str)


def _text(value: Any, action: argparse.Action, where: str) -> str:
    """A plain value as one would type it; a flag without a type needs text in the file."""
    is_text = isinstance(value, str)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_text and (not is_number or (action.type is None and action.choices is None)):
        raise ValueError(f"{where} is {json.dumps(value)}, {'text' if action.type is None else 'a number'} allowed")
    return value if is_text else repr(value)
