"""Read the prompts of --input_file: lines of text, or records with a prompt or a conversation."""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.corpus.conversation import HUMAN, SYSTEM_ROLE, Turn, read_conversation, speakers_of
from colossal_llama2.corpus.message_formats import LISTS, recognize
from colossal_llama2.corpus.repeated_keys import refuse_repeated_keys
from colossal_llama2.errors import UserError
from colossal_llama2.logs import get_logger
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import read_jsonl
from colossal_llama2.storage.input_files import check_regular
from colossal_llama2.storage.row_errors import RowError, json_type

FLAG = "--input_file"
PROMPT_FIELDS = ("prompt", "input_txt")
# Everything is held in memory.
MAX_BYTES = 1 << 30


class FilePrompt(NamedTuple):
    """One prompt of a file.

    Attributes:
        where: the file and the line, for messages.
        text: the prompt; of a conversation, its last question.
        messages: the conversation, {"role": ..., "content": ...}, which ends with a question; None for a prompt.
        reference: the answer that the conversation ends with in the file, which the model does not see.
    """

    where: str
    text: str
    messages: list[dict[str, str]] | None = None
    reference: str | None = None

    def record(self) -> dict[str, Any]:
        """Its fields in the output file."""
        found: dict[str, Any] = {"prompt": self.text} if self.messages is None else {"messages": self.messages}
        return found if self.reference is None else {**found, "reference": self.reference}


def read_prompts(path: Path, *, flag: str = FLAG) -> list[FilePrompt]:
    """All prompts of a file, in its order.

        *.txt      one prompt per line
        *.jsonl    {"prompt": "..."} or {"input_txt": "..."}, or a conversation in a format of `message_formats`

    Blank lines are skipped and counted in the log. Other fields of a record are ignored.

    Args:
        flag: that names the file, for messages.

    Raises:
        UserError: with file:line, for what cannot be read, or the file has no prompt.
    """
    if not os.path.lexists(path):
        raise UserError(f"{flag} {path}: there is no such file; give a *.txt or *.jsonl file")
    check_regular(path, max_bytes=MAX_BYTES)
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise UserError(f"{flag} {path}: *.txt with a prompt per line, or *.jsonl is read; rename or convert it")
    prompts, blank = _of_text(path) if kind == ".txt" else _of_records(path)
    if not prompts:
        raise UserError(f"{flag} {path}: has no prompt")
    if blank:
        get_logger().info(f"{path}: {counted(blank, 'blank line')} skipped")
    references = sum(prompt.reference is not None for prompt in prompts)
    if references:
        get_logger().info(
            f"{path}: {counted(references, 'conversation')} with an answer at the end, which the model does not see"
        )
    return prompts


def content_digest(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of_text(path: Path) -> tuple[list[FilePrompt], int]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    prompts, blank = [], 0
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; convert the file")
        if text.strip():
            prompts.append(FilePrompt(f"{path}:{number}", text))
        else:
            blank += 1
    return prompts, blank


def _of_records(path: Path) -> tuple[list[FilePrompt], int]:
    prompts, blank = [], 0
    for line in read_jsonl(path):
        if line.record is None:
            blank += 1
            continue
        try:
            refuse_repeated_keys(line.text, line.record, also_used=PROMPT_FIELDS)
            prompts.append(_of_record(line.where, line.record))
        except RowError as error:
            raise UserError(f"{line.where}: {error}")
    return prompts, blank


def _of_record(where: str, record: dict[str, Any]) -> FilePrompt:
    given = [name for name in PROMPT_FIELDS if record.get(name) is not None]
    if len(given) > 1:
        raise RowError('both "prompt" and "input_txt" given; keep one', reason="two prompts")
    if given:
        text = record[given[0]]
        if not isinstance(text, str):
            raise RowError(f'"{given[0]}" is {json_type(text)}; give a string', reason="a prompt that is not text")
        if not text.strip():
            raise RowError(f'"{given[0]}" is empty', reason="an empty prompt")
        beside = [name for name in (*LISTS, "instruction") if not is_absent(record.get(name))]
        if beside:
            raise RowError(f'"{given[0]}" and "{beside[0]}" given; keep one', reason="two prompts")
        return FilePrompt(where, text)
    try:
        found = recognize(record)
    except RowError as error:
        names = '"prompt" and "input_txt" are missing, and there is no conversation'
        raise RowError(f"{names}: {error}", reason=error.reason)
    # Checks the roles.
    read_conversation(found.turns, system_text=found.system_text)
    return _of_turns(where, found.turns, found.system_text)


def _of_turns(where: str, turns: list[Turn], system_text: str | None) -> FilePrompt:
    speakers = speakers_of()
    messages = [{"role": SYSTEM_ROLE, "content": system_text}] if system_text is not None else []
    for turn in turns:
        speaker = speakers.get(turn.role.strip().lower())
        role = SYSTEM_ROLE if speaker is None else "user" if speaker == HUMAN else "assistant"
        messages.append({"role": role, "content": turn.text})
    reference = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or messages[-1]["role"] != "user":
        raise RowError("no question of the human precedes the answer", reason="no question")
    return FilePrompt(where, messages[-1]["content"], messages, reference)
