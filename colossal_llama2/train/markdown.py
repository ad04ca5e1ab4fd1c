"""Markdown of values that anyone may have chosen: none of them is taken for markup, HTML or YAML."""

import re
from typing import Any, Dict, Iterable, List, Sequence, Union

from colossal_llama2.terminal_text import one_line

ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# Underscores inside a word mean nothing in GitHub's and the Hub's Markdown.
MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")


class Markup(str):
    """Text that is Markdown already."""


def plain(value: Any) -> Markup:
    """A value as one line of text that reads as it is."""
    if isinstance(value, Markup):
        return value
    text = one_line(str(value)).translate(ENTITIES)
    return Markup(MARKUP.sub(r"\\\g<0>", text))


def code(value: Any) -> Markup:
    """A value between as many backticks as it needs; not for a table, where a | would end the cell."""
    text = one_line(str(value))
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    blank = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(f"{fence}{blank}{text}{blank}{fence}")


def table(columns: Sequence[str], rows: Iterable[Sequence[Union[str, Markup]]]) -> str:
    """A table; cells that are not `Markup` are made `plain`."""
    lines: List[List[str]] = [list(map(plain, columns)), ["---"] * len(columns)]
    lines += [list(map(plain, row)) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def front_matter(values: Dict[str, Any]) -> str:
    """YAML between two lines of dashes; texts must be of one line."""
    import yaml

    # Folded at no width, no line of a value can be taken for the end of the front matter.
    return "---\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf")) + "---"
