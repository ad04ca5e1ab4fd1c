"""What a model was trained for last. config.json of every model that training saves records it:

    "trained_for": {"stage": "sft", "chat_template": "colossal"}
    "trained_for": {"stage": "pretrain"}

The template itself is in chat_template.jinja of the same folder. Other programs ignore the entry, and transformers
keeps it when it saves the model again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

PURPOSE_KEY = "trained_for"
STAGES = ("pretrain", "sft")
# Longer names are not ours.
MAX_NAME = 200


class Purpose(NamedTuple):
    """The last stage of a model's training: "pretrain" or "sft", with the name of its chat template."""

    stage: str
    chat_template: str | None = None

    def as_json(self) -> dict[str, str]:
        """The value of the entry in config.json."""
        return {key: value for key, value in self._asdict().items() if value is not None}


def read_purpose(config: Mapping[str, Any]) -> Purpose | None:
    """The purpose that the content of a config.json records; None if it records none that is valid."""
    entry = config.get(PURPOSE_KEY)
    if not isinstance(entry, dict) or entry.get("stage") not in STAGES:
        return None
    name = entry.get("chat_template")
    is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME
    return Purpose(entry["stage"], name if is_name and entry["stage"] == "sft" else None)
