"""Markdown from untrusted values: none of them is interpreted as markup, HTML or YAML."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from colossal_llama2.terminal_text import one_line

ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# Underscores inside a word are literal in GitHub's and the Hub's Markdown.
MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")

NOT_IN_CODE = re.compile(r"[`<>&|]")


class Markup(str):
    """Text that is already Markdown."""


def plain(value: Any) -> Markup:
    """A value as one line of literal text."""
    if isinstance(value, Markup):
        return value
    text = one_line(str(value)).translate(ENTITIES)
    return Markup(MARKUP.sub(r"\\\g<0>", text))


def code(value: Any) -> Markup:
    """A value in a code span, or as `plain` text if it has characters that cannot be escaped in one."""
    text = one_line(str(value))
    return plain(text) if not text.strip() or NOT_IN_CODE.search(text) else Markup(f"`{text}`")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Markup]]) -> str:
    """A table; cells that are not `Markup` become `plain`."""
    lines: list[list[str]] = [list(map(plain, columns)), ["---"] * len(columns)]
    lines += [list(map(plain, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_matter(values: dict[str, Any]) -> str:
    """YAML between two lines of dashes; texts must have one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def represent_str(self, text: str) -> Any:
            return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "<" in text else None)

    Dumper.add_representer(str, Dumper.represent_str)
    # Without line breaks in values, no part of a value can look like the end of the front matter.
    text = yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    # Viewers without support for front matter render it as Markdown, which may contain HTML.
    return "---\n" + text.replace("<", "\\x3C") + "---"
