"""The chat template: what text a conversation becomes, and which of it is trained on.

    SYSTEM TEXT + blank line
    Human: <s>TEXT</s>Assistant: <s>TEXT</s>Human: <s>TEXT</s>Assistant: <s>TEXT</s>

with nothing between the messages, and one more <s> in front of everything. The marks are token ids, never text: a
message that holds the characters "<s>" keeps them as characters. Loss falls on what the assistant says and on the
</s> that ends it.

`chat_template` is the same for transformers, made of the same constants: `apply_chat_template` gives the ids of
`tokenization.tokenize_sft`, and with `return_assistant_tokens_mask=True` its mask. One thing it cannot do: a mark that
a message spells out, such as the characters "<s>", becomes the mark's id, which in training it never does.
"""

from dataclasses import dataclass
from typing import Iterable, List, NamedTuple, Optional

SYSTEM_TEXT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_END = "\n\n"
NAME_END = ": "
ROLES = {"human": "Human", "user": "Human", "assistant": "Assistant", "gpt": "Assistant"}
SYSTEM_ROLE = "system"


class Turn(NamedTuple):
    """One message as a record tells it, whatever its format: `role` is a key of `ROLES`, or `SYSTEM_ROLE`."""

    role: str
    text: str


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


def read_conversation(turns: Iterable[Turn], *, system_text: Optional[str] = None) -> Conversation:
    """Check the turns of a record and sort them into exchanges.

    Any order of human and assistant is taken, and empty texts are. `system_text` is one that the record tells apart
    from its turns (None: it does not), and a first turn of the role system is one among them; with neither it is the
    template's own. Raises ValueError with the reason for an unknown role, a second system text, or no turns.
    """
    exchanges: List[List[Message]] = []
    current: List[Message] = []
    for number, (role, text) in enumerate(turns, start=1):
        if role == SYSTEM_ROLE:
            if number > 1:
                raise ValueError(f"message {number} has the role system, which only the first message may have")
            if system_text is not None:
                raise ValueError('message 1 has the role system, but the line has a "system" of its own; keep one')
            system_text = text
            continue
        if role not in ROLES:
            raise ValueError(f"message {number} is from {role!r:.80}; roles are {', '.join([*ROLES, SYSTEM_ROLE])}")
        current.append(Message(ROLES[role], text))
        if current[-1].is_trained:
            exchanges.append(current)
            current = []
    if not exchanges and not current:
        raise ValueError("the conversation holds a system message and nothing else")
    return Conversation(SYSTEM_TEXT if system_text is None else system_text, exchanges, unanswered=current)


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
        name = f"{opening if number == 0 else ''}{message.speaker}{NAME_END}"
        segments.append(Segment(name, is_marked=False, is_trained=False))
        segments.append(Segment(message.text, is_marked=True, is_trained=message.is_trained))
    return segments


def chat_template(*, prefix_after_marks: bool) -> str:
    """The template above for transformers, which takes {"role", "content"}: the same text with its marks as text.

    `prefix_after_marks` is `tokenizer.puts_prefix_after_marks`. SentencePiece puts a "▁" before the first text; where
    transformers, which sees a mark in front, does not, a space stands for it.
    """
    prefix = "" if prefix_after_marks else " "
    assistant = ROLES["assistant"]
    refusal = f"; roles are {', '.join(ROLES)}, and {SYSTEM_ROLE} for the first message alone"
    return f"""\
{{%- set speakers = {ROLES!a} -%}}
{{{{- bos_token + {prefix!a} -}}}}
{{%- set system_text = {SYSTEM_TEXT!a} -%}}
{{%- if messages and messages[0]['role'] == {SYSTEM_ROLE!a} -%}}
  {{%- set system_text = messages[0]['content'] -%}}
{{%- endif -%}}
{{%- if system_text -%}}
  {{{{- system_text + {SYSTEM_END!a} -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
  {{%- if message['role'] in speakers -%}}
    {{{{- speakers[message['role']] + {NAME_END!a} + bos_token -}}}}
    {{%- if speakers[message['role']] == {assistant!a} -%}}
      {{%- generation -%}}
        {{{{- message['content'] + eos_token -}}}}
      {{%- endgeneration -%}}
    {{%- else -%}}
      {{{{- message['content'] + eos_token -}}}}
    {{%- endif -%}}
  {{%- elif message['role'] != {SYSTEM_ROLE!a} or not loop.first -%}}
    {{{{- raise_exception('message ' ~ loop.index ~ ' is from ' ~ message['role'] ~ {refusal!a}) -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
  {{{{- {assistant + NAME_END!a} + bos_token -}}}}
{{%- endif -%}}
"""
