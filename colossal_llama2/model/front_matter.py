"""The front matter of a model card, which anyone may have written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import MIB, check_regular
from colossal_llama2.storage.json_input import shown

BORDER = "---"
CARD_BYTES = 64 * MIB
# PyYAML needs a second for twice as much, and minutes for many brackets. In a longer front matter, such as one with a
# table of results, only the entry of the base model is parsed.
PARSED_CHARACTERS, PARSED_BRACKETS = 2**14, 500
BASE_MODEL = "base_model"


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes of a README.md; empty if there is none.

    Training does not need the card, so one that cannot be read is logged and ignored.
    """
    if not os.path.lexists(card):
        return {}
    try:
        return _parsed(card)
    except Exception as error:  # PyYAML raises ValueError, RecursionError and others for what is not YAML
        logs.get_logger().warning("%s is passed over: %s", card, " ".join(str(error).split())[:300] or shown(error))
        return {}


def _parsed(card: Path) -> dict[str, Any]:
    import yaml

    check_regular(card, max_bytes=CARD_BYTES)
    lines = card.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    if not lines or lines[0].rstrip() != BORDER:
        return {}
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == BORDER), None)
    if end is None:
        raise UserError("its front matter does not end")
    front = "\n".join(lines[1:end])
    if len(front) > PARSED_CHARACTERS:
        front = "\n".join(_entry(lines[1:end], BASE_MODEL))
    if len(front) > PARSED_CHARACTERS or front.count("[") + front.count("{") > PARSED_BRACKETS:
        raise UserError("its front matter is too long")
    if "&" in front and "<<" in front:
        # Merged aliases can grow without bound.
        raise UserError("its front matter merges aliases")
    content = yaml.safe_load(front)
    if content is not None and not isinstance(content, dict):
        raise UserError("its front matter is not a mapping")
    return content or {}


def _entry(lines: list[str], key: str) -> Iterator[str]:
    """The lines of one entry of a mapping that is not indented."""
    is_inside = False
    for line in lines:
        if line[:1] not in (" ", "-", ""):
            is_inside = line.startswith(f"{key}:")
        if is_inside:
            yield line
