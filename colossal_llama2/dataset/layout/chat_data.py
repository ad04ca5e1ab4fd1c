"""By which chat template conversations were prepared, as the manifest beside them records it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.chat.templates import COLOSSAL, read_template
from colossal_llama2.dataset.layout.manifest import read_manifest_of
from colossal_llama2.dataset.layout.output_folder import DATA_MANIFEST_FILE
from colossal_llama2.encoding.file_names import TEMPLATE_FILE
from colossal_llama2.errors import UserError
from colossal_llama2.storage.json_input import is_whole


class ChatData(NamedTuple):
    """The template of prepared conversations.

    Attributes:
        name: the value of --chat_template, or the name of its file.
        text: in Jinja; None for colossal if the data does not have it.
        turn_ends: the ids of the tokens that end an answer; empty if the data does not record them.
    """

    name: str
    text: str | None
    turn_ends: tuple[int, ...]


def chat_data_of(parts: Sequence[str], *, flag: str = "--dataset", other: ChatData | None = None) -> ChatData | None:
    """The template of all conversations in these folders; None if none of them holds conversations.

    Args:
        other: the template of other data of the same run, which must be the same.

    Raises:
        UserError: two folders were prepared with different templates, or a template cannot be read.
    """
    first = ""
    # All parts in a folder have one manifest, which may be large.
    folders: dict[Path, str] = {}
    for part in parts:
        folders.setdefault(Path(part).resolve().parent, part)
    for part in folders.values():
        found = _chat_data(part)
        if found is None:
            continue
        if other is None:
            other, first = found, part
        elif not _is_same(found, other):
            before = f"{first} by {other.name}" if first else f"--dataset by {other.name}"
            also = " with another text" if found.name == other.name else ""
            raise UserError(
                f"{flag} {part}: its conversations are written by the chat template {found.name}{also}, those of "
                f"{before}; prepare all with the same --chat_template"
            )
    return other


def _is_same(one: ChatData, other: ChatData) -> bool:
    # The text of colossal depends on --assistant_roles and --assistant_first, the format does not.
    return one.name == other.name == COLOSSAL or one.text == other.text


def _chat_data(part: str) -> ChatData | None:
    content = read_manifest_of(part)
    settings: dict[str, Any] = content.get("settings", {})
    if settings.get("stage") != "sft":
        return None
    name, text = settings.get("chat_template", COLOSSAL), settings.get("template_text") or None
    ends = content.get("turn_end", [])
    are_ids = isinstance(ends, list) and all(is_whole(end) and end >= 0 for end in ends)
    if not isinstance(name, str) or not isinstance(text, str | None) or not are_ids:
        path = Path(part).resolve().parent / DATA_MANIFEST_FILE
        raise UserError(f"{path} is damaged (its chat template); copy it again, or prepare the data again")
    if text is None:
        path = Path(part).resolve().parent / TEMPLATE_FILE
        text = read_template(path) if path.exists() else None
    return ChatData(name, text, tuple(ends))
