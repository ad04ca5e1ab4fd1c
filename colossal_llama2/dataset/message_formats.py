"""The formats that conversations come in, recognized record by record and read into the turns of `conversation`.

    from/content     {"messages": [{"from": "human", "content": "Hi"}, {"from": "assistant", "content": "Hello!"}]}
    role/content     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    from/value       {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}],
                      "system": "Be kind."}
    alpaca           {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day",
                      "system": "Be kind.", "history": [["Hi", "Hello!"]]}

The names of the two lists and the names inside a message are judged apart: `conversations` of role/content are common
too. The first message decides for the record. `system` is optional, and so are alpaca's `input` and `history`; null,
and an empty `system` or `input`, are as good as absent. A record with several of `messages`, `conversations` and
`instruction` is read by the first of them. Other fields are ignored.
"""

from typing import Any, Dict, List, NamedTuple, Optional

from colossal_llama2.dataset.conversation import Turn

# Name of the format: the two fields of its messages, who and what.
MESSAGE_FIELDS = {
    "from/content": ("from", "content"),
    "role/content": ("role", "content"),
    "from/value": ("from", "value"),
}
ALPACA = "alpaca"
FORMATS = (*MESSAGE_FIELDS, ALPACA)
LISTS = ("messages", "conversations")
USER, ASSISTANT = "user", "assistant"


class Recognized(NamedTuple):
    """The turns of a record, the system text that it tells apart from them, if any, and the name of its format."""

    turns: List[Turn]
    system_text: Optional[str]
    format: str


def recognize(row: Dict[str, Any]) -> Recognized:
    """Read a record in whichever of `FORMATS` it has. Raises ValueError with the reason if it has none, or breaks it.

    What a role may be is judged by `conversation.read_conversation`.
    """
    for name in LISTS:
        if row.get(name) is not None:
            return _read_list(row, name)
    if row.get("instruction") is not None:
        return Recognized(_alpaca_turns(row), _system_text(row), ALPACA)
    raise ValueError('"messages" is missing, and so are "conversations" and "instruction"')


def _read_list(row: Dict[str, Any], name: str) -> Recognized:
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" must be a list of at least one message')
    found = _format_of(messages[0])
    who, what = MESSAGE_FIELDS[found]
    turns = []
    for number, message in enumerate(messages, start=1):
        role, text = (message.get(who), message.get(what)) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            as_first = " as message 1 is" if number > 1 else ""
            raise ValueError(f'message {number} must be {{"{who}": ..., "{what}": ...}} with two strings{as_first}')
        turns.append(Turn(role, text))
    return Recognized(turns, _system_text(row), found)


def _format_of(message: Any) -> str:
    """The name of the first format whose two fields the message has."""
    for name, fields in MESSAGE_FIELDS.items():
        if isinstance(message, dict) and all(field in message for field in fields):
            return name
    shapes = " or ".join(f'{{"{who}": ..., "{what}": ...}}' for who, what in MESSAGE_FIELDS.values())
    raise ValueError(f"message 1 must be {shapes}")


def _alpaca_turns(row: Dict[str, Any]) -> List[Turn]:
    """The rounds of `history`, then the instruction, with the input on the next line, and the output."""
    turns: List[Turn] = []
    history = row.get("history")
    if not isinstance(history, (list, type(None))):
        raise ValueError('"history" must be a list of [question, answer]')
    for number, pair in enumerate(history or [], start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f'round {number} of "history" must be [question, answer], two strings')
        turns += [Turn(USER, pair[0]), Turn(ASSISTANT, pair[1])]
    instruction, given, output = (_text(row, name) for name in ("instruction", "input", "output"))
    if output is None:
        raise ValueError('"output" is missing beside "instruction"')
    question = "\n".join(part for part in (instruction, given) if part)
    return [*turns, Turn(USER, question), Turn(ASSISTANT, output)]


def _system_text(row: Dict[str, Any]) -> Optional[str]:
    return _text(row, "system") or None


def _text(row: Dict[str, Any], name: str) -> Optional[str]:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string')
    return value
