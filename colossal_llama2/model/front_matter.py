"""The front matter of a model card, whoever wrote the card."""

import os
from pathlib import Path
from typing import Any, Dict

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.input_files import MIB, check_regular, shown

# YAML is slow to parse: of a card this much is looked at, of which the front matter is the beginning.
FRONT_BYTES = MIB // 8
BORDER = "---"


def read_front_matter(card: Path) -> Dict[str, Any]:
    """What a README.md says between its first two lines of dashes; empty if it says nothing.

    A card is of no use to training, so one that cannot be read is logged and passed over.
    """
    if not os.path.lexists(card):
        return {}
    try:
        return _parsed(card)
    except Exception as error:  # PyYAML raises ValueError, RecursionError and others for what is not YAML
        logs.get_logger().warning("%s is passed over: %s", card, " ".join(str(error).split())[:300] or shown(error))
        return {}


def _parsed(card: Path) -> Dict[str, Any]:
    import yaml

    check_regular(card, max_bytes=64 * MIB)
    with card.open("rb") as file:
        text = file.read(FRONT_BYTES).decode("utf-8-sig", errors="replace")
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != BORDER:
        return {}
    ends = [number for number, line in enumerate(lines) if line.rstrip() == BORDER]
    if len(ends) < 2:
        raise UserError("its front matter does not end")
    front = "\n".join(lines[1 : ends[1]])
    if "&" in front and "<<" in front:
        # Merged aliases can grow without bound.
        raise UserError("its front matter merges aliases")
    content = yaml.safe_load(front)
    if content is not None and not isinstance(content, dict):
        raise UserError("its front matter is not a mapping")
    return content or {}
