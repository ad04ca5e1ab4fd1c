"""The commands of a chat: lines that begin with a slash."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.cli.inference_flags import generation_flags
from colossal_llama2.errors import UserError, reason
from colossal_llama2.inference.console import notice
from colossal_llama2.inference.history import History, append_conversation
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.plurals import counted

UNSET = "none"


@dataclass
class ChatState:
    """What commands change: the settings and the conversation.

    `history` is None where prompts are continued one by one, without a conversation.
    """

    settings: GenerationSettings
    history: History | None
    is_over: bool = False


class Command(NamedTuple):
    """A command: its name and arguments as they are typed, what it does, its function, and if it needs a history."""

    usage: str
    help: str
    run: Callable[[ChatState, str], None]
    needs_history: bool = False


def run_command(state: ChatState, line: str) -> None:
    """Run a line that begins with a slash. A mistake in it is reported in one line, and changes nothing."""
    name, _, text = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        notice(f"unknown command {name}; /help lists the commands. A message may begin with a space and then a slash.")
    elif command.needs_history and state.history is None:
        notice(f"{name} needs a conversation; this model continues each line by itself")
    else:
        try:
            command.run(state, text.strip())
        except (UserError, OSError, ValueError) as error:  # a path with a zero byte is a ValueError
            problem = reason(error)
            notice(problem if problem.startswith(name) else f"{name}: {problem}")


def _help(state: ChatState, text: str) -> None:
    for command in COMMANDS.values():
        if state.history is not None or not command.needs_history:
            notice(f"{command.usage:<18} {command.help}")
    notice('A line that ends with \\ goes on in the next line; """ begins and ends a message of several lines.')
    notice("Ctrl-C stops an answer; at the prompt it clears the line, and twice it quits, as Ctrl-D does.")


def _quit(state: ChatState, text: str) -> None:
    state.is_over = True


def _system(state: ChatState, text: str) -> None:
    assert state.history is not None
    state.history.system_text = text or None
    notice("system text set" if text else "system text removed; the chat template may have one of its own")


def _reset(state: ChatState, text: str) -> None:
    assert state.history is not None
    count = len(state.history.exchanges)
    state.history.reset()
    kept = ", the system text is kept" if state.history.system_text is not None else ""
    notice(f"new conversation; {counted(count, 'exchange')} removed{kept}")


def _undo(state: ChatState, text: str) -> None:
    assert state.history is not None
    removed = state.history.undo()
    left = counted(len(state.history.exchanges), "exchange")
    notice("nothing to undo" if removed is None else f"the last question and its answer are removed; {left} left")


def _save(state: ChatState, text: str) -> None:
    assert state.history is not None
    if not text:
        raise UserError("give a file, such as /save chat.jsonl")
    if not state.history.exchanges:
        raise UserError("there is nothing to save yet")
    path = Path(os.path.expanduser(text))
    line = append_conversation(path, state.history.record())
    place = f"{path}, a new file" if line == 1 else f"line {line:,} of {path}; earlier lines are unchanged"
    notice(f"saved {counted(len(state.history.exchanges), 'exchange')} as {place}")


def _set(state: ChatState, text: str) -> None:
    flags = generation_flags()
    name, _, value = text.partition(" ")
    name = name.removeprefix("--")
    if not name:
        for known in flags:
            notice(f"{known} {_shown(getattr(state.settings, known))}")
        return
    if name not in flags:
        raise UserError(f"{name} is unknown; settings are {', '.join(flags)}")
    if not value:
        raise UserError(f"give a value, such as /set {name} {_shown(getattr(state.settings, name))}")
    parse = flags[name].type
    assert callable(parse)
    try:
        # Only a flag without a default can be unset.
        parsed: Any = None if value.lower() == UNSET and flags[name].default is None else parse(value.strip())
    except (argparse.ArgumentTypeError, ValueError) as error:
        # The types of flags name the cure on a command line.
        raise UserError(f"{name}: {error}".replace("give --", "type /set "))
    state.settings = replace(state.settings, **{name: parsed})
    notice(f"{name} {_shown(parsed)}")


def _shown(value: object) -> str:
    return UNSET if value is None else str(value)


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        Command("/system TEXT", "set the system text; without TEXT, remove it", _system, needs_history=True),
        Command("/reset", "begin a new conversation, with the same system text", _reset, needs_history=True),
        Command("/undo", "remove the last question and its answer", _undo, needs_history=True),
        Command("/save FILE", "append the conversation to a jsonl file", _save, needs_history=True),
        Command("/set NAME VALUE", "set temperature 0.7 and the like; /set alone lists all", _set),
        Command("/help", "list the commands", _help),
        Command("/quit", "end the chat", _quit),
    )
}
