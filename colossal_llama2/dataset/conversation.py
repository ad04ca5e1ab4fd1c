"""The chat template: what text a conversation becomes, and which of it is trained on.

    SYSTEM TEXT + blank line
    Human: <s>TEXT</s>Assistant: <s>TEXT</s>Human: <s>TEXT</s>Assistant: <s>TEXT</s>

with nothing between the messages, and one more <s> in front of everything. The marks are token ids, never text: a
message that holds the characters "<s>" keeps them as characters. Loss falls on what the assistant says and on the
</s> that ends it.
"""

from dataclasses import dataclass
from typing import Any, List, NamedTuple

SYSTEM_TEXT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_END = "\n\n"
ROLES = {"human": "Human", "user": "Human", "assistant": "Assistant", "gpt": "Assistant"}
SYSTEM_ROLE = "system"


class Message(NamedTuple):
    """What one side says. `speaker` is "Human" or "Assistant"."""

    speaker: str
    text: str

    @property
    def is_trained(self) -> bool:
        """True for what the model shall learn to say."""
        return self.speaker == ROLES["assistant"]


@dataclass(frozen=True)
class Conversation:
    """A conversation in exchanges: each is a run of messages that ends with an answer of the assistant.

    `unanswered` holds the human's messages after the last answer: nothing can be learnt from them.
    """

    system_text: str
    exchanges: List[List[Message]]
    unanswered: List[Message]


class Segment(NamedTuple):
    """A stretch of text to encode by itself. A marked one stands between <s> and </s>.

    With `is_trained`, the text and its </s> carry loss; the <s> does not, since it is given when the model is asked.
    """

    text: str
    is_marked: bool
    is_trained: bool


def read_conversation(messages: Any) -> Conversation:
    """Check a record's `messages`, a list of {"from": role, "content": text}, and sort it into exchanges.

    Any order of human and assistant is taken, and empty texts are. Raises ValueError with the reason for anything
    that is not such a list, an unknown role, or a system message that is not the first.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of at least one {"from": ..., "content": ...}')
    system_text = SYSTEM_TEXT
    exchanges: List[List[Message]] = []
    current: List[Message] = []
    for number, raw in enumerate(messages, start=1):
        role, text = _role_and_text(raw, number=number)
        if role == SYSTEM_ROLE:
            if number > 1:
                raise ValueError(f"message {number} has the role system, which only the first message may have")
            system_text = text
            continue
        current.append(Message(ROLES[role], text))
        if current[-1].is_trained:
            exchanges.append(current)
            current = []
    if not exchanges and not current:
        raise ValueError("the conversation holds a system message and nothing else")
    return Conversation(system_text, exchanges, unanswered=current)


def _role_and_text(raw: Any, *, number: int) -> tuple:
    if not isinstance(raw, dict) or not isinstance(raw.get("from"), str) or not isinstance(raw.get("content"), str):
        raise ValueError(f'message {number} must be {{"from": ..., "content": ...}} with two strings')
    if raw["from"] not in ROLES and raw["from"] != SYSTEM_ROLE:
        allowed = ", ".join([*ROLES, SYSTEM_ROLE])
        raise ValueError(f"message {number} is from {raw['from']!r}; roles are {allowed}")
    return raw["from"], raw["content"]


def opening_text(conversation: Conversation) -> str:
    """What stands before the first message's name: the system text and its blank line, or nothing if it is empty."""
    return conversation.system_text + SYSTEM_END if conversation.system_text else ""


def message_segments(messages: List[Message], *, opening: str = "") -> List[Segment]:
    """The segments of `messages` in order, two for each; `opening` joins the first.

    >>> message_segments([Message("Human", "Hi"), Message("Assistant", "Hello!")], opening="Be kind.\\n\\n")
    [Segment(text='Be kind.\\n\\nHuman: ', is_marked=False, is_trained=False),
     Segment(text='Hi', is_marked=True, is_trained=False),
     Segment(text='Assistant: ', is_marked=False, is_trained=False),
     Segment(text='Hello!', is_marked=True, is_trained=True)]
    """
    segments = []
    for number, message in enumerate(messages):
        name = f"{opening if number == 0 else ''}{message.speaker}: "
        segments.append(Segment(name, is_marked=False, is_trained=False))
        segments.append(Segment(message.text, is_marked=True, is_trained=message.is_trained))
    return segments
