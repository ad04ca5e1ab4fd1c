"""Recognize the format of each conversation record, and read it into the turns of `conversation`.

    from/content     {"messages": [{"from": "human", "content": "Hi"}, {"from": "assistant", "content": "Hello!"}]}
    role/content     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    from/value       {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                      "system": "Be kind."}
    alpaca           {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day",
                      "system": "Be kind.", "history": [["Hi", "Hello!"]]}

Either list name may hold messages of any of the three field pairs: `conversations` of role/content are common too. The
first message decides for the whole record. `system` and alpaca's `input` and `history` are optional. An empty `system`
or `input` counts as absent, and so do null and empty lists everywhere (`absent`), which `datasets` fills in where it
merges rows. A record with several of `messages`, `conversations` and `instruction` is read by the first of them.

A text may be a list of text parts, which are joined: [{"type": "text", "text": "Hello "}, {"type": "text", "text":
"there"}]. Messages and records may have loss marks (`loss_marks`). A message with content beside its text that would be
lost, such as tool calls, reasoning or images, makes its record a bad row. Other fields are ignored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.corpus.conversation import TOOL_MESSAGE, TOOL_ROLES, Turn, canonical_role
from colossal_llama2.corpus.loss_marks import ALL_MARKS, read_mark
from colossal_llama2.storage.row_errors import RowError, json_type

# Format name to the fields of a message for the role and the text.
MESSAGE_FIELDS = {
    "from/content": ("from", "content"),
    "role/content": ("role", "content"),
    "from/value": ("from", "value"),
}
ALPACA = "alpaca"
FORMATS = (*MESSAGE_FIELDS, ALPACA)
LISTS = ("messages", "conversations")
ALPACA_FIELDS = ("instruction", "input", "output", "history")
USER, ASSISTANT = "user", "assistant"

TOOL_FIELDS = frozenset(("tool_calls", "tool_call", "function_call", "tool_call_id"))
REASONING_FIELDS = frozenset(("reasoning_content", "reasoning", "reasoning_details", "thinking"))
REFUSAL = "refusal"
MEDIA_FIELDS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
TOOL_LISTS = frozenset(("tools", "functions"))
OTHER_SYSTEM_FIELDS = frozenset(("system_prompt", "system_message", "meta_instruction"))
# Fields that are examined in a message beside its role and text, and in a record beside its conversation.
BESIDE_TEXT = ALL_MARKS | TOOL_FIELDS | REASONING_FIELDS | MEDIA_FIELDS | {REFUSAL}
BESIDE_CONVERSATION = BESIDE_TEXT | TOOL_LISTS | OTHER_SYSTEM_FIELDS
USED_IN_RECORD = frozenset((*LISTS, *ALPACA_FIELDS, "system", "category")) | BESIDE_CONVERSATION
USED_IN_MESSAGE = frozenset(name for names in MESSAGE_FIELDS.values() for name in names) | BESIDE_TEXT
TEXT_PARTS = ("text", "input_text", "output_text")
USED_IN_PART = frozenset(("type", "text"))

# Reasons for bad rows, by which manifests count them.
NO_CONVERSATION = 'no "messages", "conversations" or "instruction"'
PRETRAINING_DATA = "this looks like pre-training data: use prepare_pretrain_dataset.py"
PREFERENCE_DATA = "this looks like preference data, which is not read"
NOT_A_LIST = '"messages" or "conversations" that are not a list'
NOT_A_MESSAGE = "a message that is not an object of a role and a text"
NO_TEXT = "a message whose text is null"
REASONING = "a message with reasoning beside its text"
REFUSED = "a message with a refusal beside its text"
OTHER_LIST_NAME = 'messages in another field than "messages" or "conversations"'
NOT_ONLY_TEXT = "a message that is not only text"
RECORDS_INSIDE = "an object that holds records, and is not one itself"
BAD_HISTORY = '"history" that is not a list of [question, answer]'
NO_OUTPUT = '"instruction" without "output"'
NOT_TEXT = "a field that is not text"
# Notes, by which manifests count records that are used.
TOOLS_LEFT_OUT = "conversations whose list of tools is left out"
SYSTEM_LEFT_OUT = 'conversations with a system prompt in another field than "system", which is left out'
MEDIA_LEFT_OUT = "conversations whose images, audio or video are left out"
LEFT_OUT = (
    (TOOLS_LEFT_OUT, TOOL_LISTS),
    (MEDIA_LEFT_OUT, MEDIA_FIELDS),
    (SYSTEM_LEFT_OUT, OTHER_SYSTEM_FIELDS),
)
OTHERS_LEFT_OUT = 'records with several of "messages", "conversations" and "instruction", read by the first'

# Other common names of alpaca's "output".
OTHER_OUTPUTS = ("response", "answer", "completion", "target")
# Common names of a question and its answer.
OTHER_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("input", "output"),
    ("question", "response"),
    ("problem", "solution"),
    ("query", "answer"),
    ("input", "target"),
)


class Recognized(NamedTuple):
    """The turns of a record, its separate system text if there is one, and the name of its format.

    `notes` are counted in the token ledger.
    """

    turns: list[Turn]
    system_text: str | None
    format: str
    notes: tuple[str, ...] = ()


def recognize(row: dict[str, Any]) -> Recognized:
    """Read a record in any of `FORMATS`. Raises RowError if it has none of them, or is not valid in its format.

    `conversation.read_conversation` checks the roles.
    """
    found = [name for name in (*LISTS, "instruction") if name in row and not is_absent(row[name])]
    if not found:
        raise _no_conversation(row)
    is_alpaca = found[0] == "instruction"
    notes = [OTHERS_LEFT_OUT] if len(found) > 1 else []
    mark = None
    if not BESIDE_CONVERSATION.isdisjoint(row):
        mark = read_mark(row, "the record")
        if is_alpaca:
            _refuse_what_would_be_lost(row, "the record")
        notes += [note for note, names in LEFT_OUT if any(_holds_something(row.get(name)) for name in names)]
    turns, form = (_alpaca_turns(row), ALPACA) if is_alpaca else _list_turns(row[found[0]], found[0])
    if mark is False:
        turns = [turn._replace(mark=False) for turn in turns]
    return Recognized(turns, _text(row, "system") or None, form, tuple(notes))


def _no_conversation(row: dict[str, Any]) -> RowError:
    """The error for a record without a conversation, with a cure that depends on its fields."""
    there = [name for name, value in row.items() if not is_absent(value)]
    missing = '"messages" is missing, and so are "conversations" and "instruction"'
    if "chosen" in there and "rejected" in there:
        return RowError(f'{missing}; "chosen" and "rejected" are of preference data, not read', reason=PREFERENCE_DATA)
    for name, value in row.items():
        if name not in LISTS and isinstance(value, list) and value and _is_message(value[0]):
            return RowError(f'{missing}; rename {name!r:.80} to "messages"', reason=OTHER_LIST_NAME)
    if place := where_records_lie(row, (*LISTS, "instruction")):
        return RowError(place, reason=RECORDS_INSIDE)
    for question, answer in OTHER_PAIRS:
        if question in there and answer in there:
            renaming = f'"{question}" and "{answer}" are not read: rename them to "instruction" and "output"'
            return RowError(f"{missing}; {renaming}", reason=renaming)
    if "target" in there or "text" in there:
        return RowError(f"{missing}; {PRETRAINING_DATA}", reason=PRETRAINING_DATA)
    if any(name in row for name in LISTS):
        name = next(name for name in LISTS if name in row)
        return RowError(
            f'"{name}" must be a list of at least one message, and there is no other conversation',
            reason=NO_CONVERSATION,
        )
    return RowError(missing, reason=NO_CONVERSATION)


def where_records_lie(row: dict[str, Any], fields: Sequence[str]) -> str:
    """Where an object holds records inside, as {"data": [...]} and {"id1": {...}, ...} do, and the cure.

    Args:
        fields: every record has at least one of these.

    Returns:
        An empty string if none of its lists begins with a record, and not all of its values are records.
    """

    def is_record(value: Any) -> bool:
        return isinstance(value, dict) and any(not is_absent(value.get(field)) for field in fields)

    for name, value in row.items():
        if isinstance(value, list) and value and is_record(value[0]):
            return f"the records are inside {name!r:.80}; write only that list into the file"
    if row and all(is_record(value) for value in row.values()):
        return "each value of this object is a record; write them as one array, or one per line"
    return ""


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(who in value and what in value for who, what in MESSAGE_FIELDS.values())


def _list_turns(messages: Any, name: str) -> tuple[list[Turn], str]:
    """The turns of a list of messages, and the name of their format."""
    if not isinstance(messages, list):
        raise RowError(f'"{name}" must be a list of at least one message', reason=NOT_A_LIST)
    found = _format_of(messages[0])
    who, what = MESSAGE_FIELDS[found]
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _no_message(number, who, what)
        role, text, mark = message.get(who), message.get(what), None
        # Most messages have these two fields alone.
        if (len(message) > 2 or text is None) and not BESIDE_TEXT.isdisjoint(message):
            _refuse_what_would_be_lost(message, f"message {number}", media=MEDIA_FIELDS)
            mark = read_mark(message, f"message {number}")
        if not isinstance(role, str) or what not in message:
            raise _no_message(number, who, what)
        if not isinstance(text, str):
            text = _joined_parts(text, role, what, number)
        turns.append(Turn(role, text, mark))
    return turns, found


def _no_message(number: int, who: str, what: str) -> RowError:
    as_first = " as message 1 is" if number > 1 else ""
    return RowError(
        f'message {number} must be {{"{who}": ..., "{what}": ...}} with two strings{as_first}', reason=NOT_A_MESSAGE
    )


def _format_of(message: Any) -> str:
    """The name of the first format whose two fields have values; if there is none, of the first with a role."""
    fields = message if isinstance(message, dict) else {}
    held = {name for name, value in fields.items() if not is_absent(value)}
    for have_text in (held, fields):
        for name, (who, what) in MESSAGE_FIELDS.items():
            if who in held and what in have_text:
                return name
    _refuse_what_would_be_lost(fields, "message 1", media=MEDIA_FIELDS)
    shapes = " or ".join(f'{{"{who}": ..., "{what}": ...}}' for who, what in MESSAGE_FIELDS.values())
    raise RowError(f"message 1 must be {shapes}", reason=NOT_A_MESSAGE)


def _refuse_what_would_be_lost(fields: dict[str, Any], where: str, *, media: frozenset = frozenset()) -> None:
    """Raise RowError for a field beside the text that holds content of the message."""
    for name, value in fields.items():
        if name not in BESIDE_TEXT or not _holds_something(value):
            continue
        if name in TOOL_FIELDS:
            raise RowError(f'{where} has "{name}"; tool calls are not supported', reason=TOOL_MESSAGE)
        if name in REASONING_FIELDS:
            cure = "put it into the text if it is to be trained, or remove it"
            raise RowError(f'{where} has "{name}", which is not read; {cure}', reason=REASONING)
        if name == REFUSAL:
            cure = "make it the text if it is to be trained, or remove it"
            raise RowError(f'{where} has a "{name}" beside its text, which is not read; {cure}', reason=REFUSED)
        if name in media:
            raise RowError(f'{where} has "{name}"; only text is read', reason=NOT_ONLY_TEXT)


def _holds_something(value: Any) -> bool:
    """Whether a field has content; flags and numbers, such as "thinking": false, have none."""
    return isinstance(value, (str, list, dict)) and bool(value) and not is_absent(value)


def _joined_parts(parts: Any, role: str, what: str, number: int) -> str:
    """The text of a list of parts. Raises RowError for a part that is not text, and for values other than a list."""
    where = f"message {number}"
    if canonical_role(role) in TOOL_ROLES:
        raise RowError(f"{where} is from {role!r:.80}; tool calls are not supported", reason=TOOL_MESSAGE)
    if is_absent(parts):
        shown = "null" if parts is None else "NaN" if parts != parts else "empty"
        raise RowError(f'{where} has no text: its "{what}" is {shown}; give a string', reason=NO_TEXT)
    if not isinstance(parts, list):
        why = f'{where}: "{what}" is {json_type(parts)}; give a string, or a list of text parts'
        raise RowError(why, reason=NOT_A_MESSAGE)
    return "".join(_text_of_part(part, f'part {place} of {where}\'s "{what}"') for place, part in enumerate(parts, 1))


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    fields = part if isinstance(part, dict) else {}
    kind = fields.get("type")
    text = fields.get("text")
    if isinstance(text, str) and (kind in TEXT_PARTS or is_absent(kind)):
        return text
    shown = f'of the type "{kind}"' if isinstance(kind, str) else "no text part"
    if kind in TEXT_PARTS:
        shown = 'without a "text" that is a string'
    reason = NOT_ONLY_TEXT
    if isinstance(kind, str):
        reason = TOOL_MESSAGE if kind.startswith(("tool", "function")) else reason
        reason = REASONING if kind in ("thinking", "redacted_thinking", "reasoning") else reason
    raise RowError(f'{where} is {shown:.80}; only {{"type": "text", "text": ...}} is read', reason=reason)


def _alpaca_turns(row: dict[str, Any]) -> list[Turn]:
    """The rounds of `history`, then the instruction followed by the input on a new line, and the output."""
    turns: list[Turn] = []
    history = row.get("history")
    history = [] if is_absent(history) else history
    if not isinstance(history, list):
        raise RowError('"history" must be a list of [question, answer]', reason=BAD_HISTORY)
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f'round {number} of "history" must be [question, answer], two strings', reason=BAD_HISTORY)
        turns += [Turn(USER, pair[0]), Turn(ASSISTANT, pair[1])]
    instruction, given, output = (_text(row, name) for name in ("instruction", "input", "output"))
    if output is None:
        others = (name for name in OTHER_OUTPUTS if not is_absent(row.get(name)))
        hint = next((f'; "{name}" is not read: rename it to "output"' for name in others), "")
        raise RowError(f'"output" is missing beside "instruction"{hint}', reason=NO_OUTPUT)
    question = "\n".join(part for part in (instruction, given) if part)
    return [*turns, Turn(USER, question), Turn(ASSISTANT, output)]


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if isinstance(value, str):
        return value
    if is_absent(value):
        return None
    raise RowError(f'"{name}" must be a string', reason=NOT_TEXT)
