"""A conversation in memory: its turns, what the model sees of them, and the file that it is saved to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import open_no_link, read_jsonl
from colossal_llama2.storage.output_paths import check_output_file


class Exchange(NamedTuple):
    """A question and the answer to it, as far as that came."""

    question: str
    answer: str


class History:
    """The turns of a conversation.

    Attributes:
        system_text: precedes everything; None leaves it to the chat template, which may have one of its own.
        exchanges: all of them, the oldest first.
        forgotten: how many of the oldest ones the model no longer sees, because its context is full.
    """

    def __init__(self) -> None:
        self.system_text: str | None = None
        self.exchanges: list[Exchange] = []
        self.forgotten = 0

    def messages(self, question: str, *, forgotten: int) -> list[dict[str, str]]:
        """The messages for the model, {"role": ..., "content": ...}, without the `forgotten` oldest exchanges."""
        return [
            *_messages(("role", "content"), ("user", "assistant"), self.system_text, self.exchanges[forgotten:]),
            {"role": "user", "content": question},
        ]

    def record(self) -> dict[str, Any]:
        """The whole conversation as a line of prepare_sft_dataset.py's input."""
        fields, names = ("from", "content"), ("human", "assistant")
        return {"messages": list(_messages(fields, names, self.system_text, self.exchanges))}

    def add(self, question: str, answer: str) -> None:
        """Add an exchange at the end."""
        self.exchanges.append(Exchange(question, answer))

    def undo(self) -> Exchange | None:
        """Remove the last exchange, and return it; None if there is none."""
        if not self.exchanges:
            return None
        removed = self.exchanges.pop()
        self.forgotten = min(self.forgotten, len(self.exchanges))
        return removed

    def reset(self) -> None:
        """Remove all exchanges. The system text stays."""
        self.exchanges.clear()
        self.forgotten = 0


def _messages(
    fields: tuple[str, str], names: tuple[str, str], system_text: str | None, exchanges: list[Exchange]
) -> list[dict[str, str]]:
    who, what = fields
    found = [{who: "system", what: system_text}] if system_text is not None else []
    for exchange in exchanges:
        found += [{who: names[0], what: exchange.question}, {who: names[1], what: exchange.answer}]
    return found


def append_conversation(path: Path, record: Mapping[str, Any]) -> int:
    """Add a conversation as the last line of a jsonl file, which is created if it does not exist.

    Returns:
        The number of the line. Earlier lines are never changed.

    Raises:
        UserError: the path is not that of a file of conversations, or cannot be written.
        OSError: writing fails.
    """
    lines, needs_break = 0, False
    check_output_file(path, "/save")
    if path.exists():
        for line in read_jsonl(path):
            if line.record is not None and "messages" not in line.record:
                raise UserError(f'{line.where}: has no "messages"; give a new file, or one of saved conversations')
        content = path.read_bytes()
        needs_break = bool(content) and not content.endswith(b"\n")
        lines = content.count(b"\n") + needs_break
    text = json.dumps(record, ensure_ascii=False)
    with open_no_link(path, "ab") as file:
        file.write(("\n" * needs_break + text + "\n").encode())
    return lines + 1
