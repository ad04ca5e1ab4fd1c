"""Typing mistakes on the command line that argparse would misread, each reported with what to type instead.

Argparse does not see them: to it, "–lr" pasted from a web page is a value, the True of `--use_flash_attn True` is a
stray word, and "None" is the name of a folder. Only the spelling is checked here; typed values are checked by their
type. A value is never rejected if a file of that name exists.
"""

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from colossal_llama2.cli import flag_names
from colossal_llama2.cli.flag_definitions import FlagParser

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
QUOTES = "\u201c\u201d\u201e\u201f\u2018\u2019\u201a\u201b\u00ab\u00bb\u300c\u300d\uff02\uff07"
WIDE_COMMAS = re.compile("[\uff0c\u3001\u060c]")
ON, OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
NOTHING = ("none", "null", "nil")
# How other shells continue a line.
CONTINUATIONS = {"^": "Windows' cmd", "`": "PowerShell"}
# Numbers that argparse accepts as a value despite the hyphen, and all numbers.
PLAIN_NUMBER = re.compile(r"-(\d+|\d*\.\d+)")
NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|-inf|-nan", re.ASCII | re.IGNORECASE)
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/].*|\\\\.+|\.{1,2}\\.*")


class Given(NamedTuple):
    """A flag of the command line and the words after it, up to the next flag.

    `attached` is the value of --flag=value.
    """

    flag: str
    action: argparse.Action
    attached: str | None
    words: list[str]


def check_words(words: Sequence[str], parser: FlagParser) -> None:
    """Raise ValueError with the first mistake in the words of a command line, up to "--"."""
    words = list(words[: words.index("--")]) if "--" in words else list(words)
    if "-h" in words or "--help" in words:
        return
    for before, word in zip(["", *words], words, strict=False):
        if _is_text(before, parser):
            _check_text(before, word, parser)
        else:
            _check_word(word, parser)
    # Positional arguments may also follow the value of a flag.
    free = sum(not action.option_strings for action in parser.actions)
    leading, flags = split(words, parser)
    _check_leading(leading, free, parser)
    free -= len(leading)
    for given in flags:
        if given.action.nargs == 0:
            _check_switch(given)
        else:
            free -= _check_values(given, free)


def split(words: Sequence[str], parser: FlagParser) -> tuple[list[str], list[Given]]:
    """The words before the first flag, and the flags with their words, as argparse reads them."""
    leading: list[str] = []
    flags: list[Given] = []
    for word in words:
        flag, sign, value = word.partition("=")
        action = parser.by_spelling.get(flag) if word.startswith("-") else None
        if action is not None:
            flags.append(Given(flag, action, value if sign else None, []))
        elif flags:
            flags[-1].words.append(word)
        else:
            leading.append(word)
    return leading, flags


def repeated_lists(words: Sequence[str], parser: FlagParser) -> list[str]:
    """One sentence for each list flag that is given more than once: argparse drops all but the last list."""
    counts: dict[str, list[Given]] = {}
    for given in split(words, parser)[1]:
        if given.action.nargs == "+" or takes_commas(given.action):
            counts.setdefault(given.action.dest, []).append(given)
    return [
        f"{uses[-1].flag} is given {len(uses)} times; only the last one is used: {_typed(uses[-1])}"
        for uses in counts.values()
        if len(uses) > 1
    ]


def _typed(given: Given) -> str:
    return shlex.join([given.attached] if given.attached is not None else given.words)


def takes_commas(action: argparse.Action) -> bool:
    """Whether the value of a flag is a comma-separated list."""
    return "," in str(action.metavar)


def is_path(action: argparse.Action) -> bool:
    """Whether the value of a flag names a file or a folder."""
    return action.type is None and action.choices is None and action.metavar not in (None, "TEXT")


# One word by itself.


def _is_text(flag: str, parser: FlagParser) -> bool:
    """Whether any word after a flag is its value, whatever it looks like."""
    action = parser.by_spelling.get(flag)
    return action is not None and action.metavar == "TEXT"


def _check_text(flag: str, word: str, parser: FlagParser) -> None:
    """Check a text. To argparse, a single word with a leading hyphen is a flag, unless it is a number."""
    is_flag = word.partition("=")[0] in parser.by_spelling
    if word[:1] == "-" and len(word) > 1 and " " not in word and not is_flag and not PLAIN_NUMBER.fullmatch(word):
        raise ValueError(f"{flag}: write a text that begins with a hyphen as {shlex.quote(f'{flag}={word}')}")


def _check_word(word: str, parser: FlagParser) -> None:
    if word.endswith("\r"):
        raise ValueError(
            "a word ends with a carriage return: the script has Windows line endings; run: sed -i 's/\\r$//' SCRIPT"
        )
    if word in CONTINUATIONS:
        raise ValueError(f"{word} continues a line only in {CONTINUATIONS[word]}; in this shell, end the line with \\")
    flag = word.partition("=")[0]
    plain = "--" + flag.lstrip(DASHES + "-")
    is_dashed = flag != "" and flag[0] in DASHES and not os.path.exists(word)
    if is_dashed and (plain in parser.by_spelling or re.fullmatch(r"\W+[a-z]+(_[a-z]+)+", flag)):
        raise ValueError(
            f"{flag} begins with U+{ord(flag[0]):04X}, a dash that web pages substitute for two hyphens; type {plain}"
        )
    is_short = re.fullmatch(r"-[A-Za-z][\w-]+", flag) is not None
    if is_short and flag not in parser.by_spelling and plain in parser.by_spelling:
        raise ValueError(f"{flag} has one hyphen; type {plain}")
    # To argparse, a word with a space is a value.
    if word.startswith("--") and " " not in flag and flag not in parser.by_spelling:
        raise ValueError(flag_names.unknown_flag(flag, parser))


# Words that belong to no flag.


def _check_leading(words: Sequence[str], free: int, parser: FlagParser) -> None:
    """Check the words before the first flag; the command has `free` positional arguments."""
    for word in words[free:]:
        name, sign, value = word.partition("=")
        flag = f"--{name}"
        if flag in parser.by_spelling:
            raise ValueError(f"unexpected {word}; type {flag}{sign}{value}, with two hyphens")
        raise ValueError(f"unexpected {word}; a value must follow its flag, and flags begin with --")


def _check_switch(given: Given) -> None:
    """A flag without a value."""
    values = given.words[:1] if given.attached is None else [given.attached]
    if values and (given.attached is not None or values[0].lower() in (*ON, *OFF, *NOTHING)):
        is_off = values[0].lower() in (*OFF, *NOTHING)
        cure = f"leave {given.flag} out" if is_off else "give the flag alone"
        raise ValueError(f"{given.flag} takes no value, {values[0]!r} given; {cure}")


def _check_values(given: Given, free: int) -> int:
    """Check the values of a flag; at most `free` positional words may follow them. Returns how many do."""
    flag, action = given.flag, given.action
    words = given.words if given.attached is None else [given.attached, *given.words]
    if not words:
        raise ValueError(f"{flag} needs a value: {_usage(given)}")
    # Every text is a prompt.
    is_text = action.metavar == "TEXT"
    if words[0] == "=" and (len(words) > 1 or not is_text) or (given.attached == "" and len(words) > 1):
        raise ValueError(f"there is a space between {flag} and =; type {shlex.join([flag, *words[1:]])}")
    if words[0].startswith("=") and given.attached is None and not is_text:
        raise ValueError(f"there is a space between {flag} and =; type {flag}{words[0]}")
    stray = len(words) - 1 if action.nargs != "+" else 0
    if stray > max(free, 0):
        raise ValueError(_too_many(given, words))
    if is_text:
        return stray
    for word in words[: len(words) - stray]:
        if not word.strip():
            raise ValueError(
                f"{flag} has an empty value; check that the shell variable is set, and that no space follows "
                f"a \\ at the end of a line"
            )
        if action.option_strings and word.startswith("-") and given.attached is None:
            _check_dash(given, word)
        _check_value(given, word)
    return stray


def _check_dash(given: Given, word: str) -> None:
    """Refuse a value with a leading hyphen, which argparse would read as a flag, unless it is a plain number."""
    if PLAIN_NUMBER.fullmatch(word):
        return
    if NUMBER.fullmatch(word) and callable(given.action.type):
        try:
            given.action.type(word)
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{given.flag}: {error}")
    raise ValueError(
        f"{word} after {given.flag} begins with a hyphen but is not a flag; write such a value as {given.flag}={word}"
    )


def _too_many(given: Given, words: list[str]) -> str:
    """The message about extra words after the single value of a flag."""
    flag, rest = given.flag, " ".join(words[1:])
    blank = [word for word in words[1:] if not word.strip()]
    if blank:
        return (
            f"a blank word follows {flag} {words[0]}; a \\ that continues a line must be its last character, with no "
            f"space after it"
        )
    if words[1] in ("\\", "/"):
        return f"unexpected {words[1]} after {flag} {words[0]}; a \\ continues a line only as its last character"
    if takes_commas(given.action):
        entries = [part.strip() for word in words for part in word.split(",") if part.strip()]
        return f"{flag} takes one comma-separated list without spaces; type {flag} {shlex.quote(','.join(entries))}"
    if any(word[:1] and word[0] in QUOTES or word[-1:] and word[-1] in QUOTES for word in words):
        plain = " ".join(words).strip(QUOTES)
        return (
            f"{flag} has typographic quotes, which the shell does not treat as quotes; type {flag} {shlex.quote(plain)}"
        )
    if given.action.metavar == "TEXT" or os.path.exists(" ".join(words)):
        return f"unexpected {rest}; quote a value that has spaces: {flag} {shlex.quote(' '.join(words))}"
    return f"unexpected {rest}; {flag} takes one value, {words[0]}; quote a value that has spaces"


# Values.


def _check_value(given: Given, word: str) -> None:
    flag, action = given.flag, given.action
    if action.choices is not None:
        return
    if word.lower() in NOTHING and not os.path.exists(word) and action.type is not str:
        wanted = "give its value" if action.required else f"leave {flag} out"
        raise ValueError(f'{flag} is {word!r}, which means "no value" only in Python; {wanted}')
    has_paths = is_path(action) or action.nargs == "+" or takes_commas(action)
    if not has_paths or os.path.exists(word):
        return
    if word[0] in QUOTES or word[-1] in QUOTES:
        raise ValueError(
            f"{flag} {word} has typographic quotes, which the shell does not treat as quotes; type "
            f"{flag} {shlex.quote(word.strip(QUOTES))}"
        )
    if word[0] in "\"'" and word[-1] == word[0] and len(word) > 2:
        raise ValueError(f"{flag} {word} contains literal quotes; remove one pair of quotes")
    if WINDOWS_PATH.fullmatch(word):
        raise ValueError(f"{flag} {word} is a Windows path; give a path of this system, such as /mnt/c/folder")
    if takes_commas(action) and WIDE_COMMAS.search(word):
        raise ValueError(f"{flag} {word} has non-ASCII commas; type {flag} {shlex.quote(WIDE_COMMAS.sub(',', word))}")
    if action.nargs == "+":
        _check_list(given, word)
    for part in word.split(",") if takes_commas(action) else [word]:
        _check_path(flag, part, in_list=part != word)


def _check_path(flag: str, path: str, *, in_list: bool) -> None:
    full = os.path.expanduser(path)
    # For an unknown user, ~name stays as it is: an ordinary file name.
    if full != path and not os.path.exists(path):
        where = "after a comma" if in_list else "after ="
        raise ValueError(f"{flag}: the shell does not expand ~ {where} or in quotes; give {path} as {full}")
    if re.match(r"\$\{?\w", path):
        raise ValueError(f"{flag} {path} is a variable that the shell did not expand; use double quotes, or none")
    if path != path.strip() and not in_list:
        raise ValueError(f"{flag} {path!r} begins or ends with a blank; type {flag} {shlex.quote(path.strip())}")


def _check_list(given: Given, word: str) -> None:
    """Check a word of a flag with several values; NAME=DIR is accepted if its folder exists."""
    if os.path.exists(word.partition("=")[2]):
        return
    parts = [part for part in re.split(r"[,;]\s*", word) if part]
    # A name may hold a comma.
    if "=" in str(given.action.metavar) and not all("=" in part for part in parts):
        return
    if len(parts) > 1 or word.endswith(","):
        raise ValueError(
            f"{given.flag} takes values separated by spaces, not commas; type {given.flag} {_joined(parts)}"
        )
    parts = word.split()
    if len(parts) > 1 and all(os.path.exists(part) for part in parts):
        raise ValueError(f"{given.flag} has all its values in one pair of quotes; type {given.flag} {_joined(parts)}")


def _joined(parts: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, parts))


def _usage(given: Given) -> str:
    choices = given.action.choices
    value = "{" + ",".join(map(str, choices)) + "}" if choices is not None else given.action.metavar or "VALUE"
    return f"{given.flag} {value}" + (" ..." if given.action.nargs == "+" else "")
