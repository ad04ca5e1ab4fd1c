"""The chat template: the text of a conversation, and which parts of it are trained on.

    SYSTEM TEXT + blank line
    Human: <s>TEXT</s>Assistant: <s>TEXT</s>Human: <s>TEXT</s>Assistant: <s>TEXT</s>

There is nothing between the messages, and one more <s> before everything. The text of a later system message, with its
blank line, comes before the next name. <s> and </s> stand for the marks of the tokenizer, which are added as ids: a
message that contains the characters "<s>" keeps them as text. The assistant's text and the </s> after it carry loss.
A tokenizer without a mark for the beginning has </s> before each text too, and nothing before everything.

`chat_template` returns the same template for transformers: `apply_chat_template` returns the ids of
`tokenization.tokenize_sft`, and with `return_assistant_tokens_mask=True` its mask, without answers that a loss mark of
their message (`loss_marks`) or --assistant_first masks. It has limits:

- A mark that is spelled out in a message, such as "<s>", becomes the mark's id, which never happens in training.
- It does not see the loss mark of a whole record.
- It accepts plain texts only, not lists of text parts.
- It renders messages whose loss marks or tool calls training would refuse.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from colossal_llama2.corpus.loss_marks import INVERTED_MARKS, MARKS
from colossal_llama2.storage.row_errors import RowError

SYSTEM_TEXT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_END = "\n\n"
NAME_END = ": "
HUMAN, ASSISTANT = "Human", "Assistant"
ROLES = {"human": HUMAN, "user": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT}
SYSTEM_ROLE = "system"
# Roles of messages with tool calls or their results.
TOOL_ROLES = ("tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython")

# Reasons for bad rows, by which manifests count them.
UNKNOWN_ROLE = "a message of an unknown role"
TOOL_MESSAGE = "a message with tool calls or their results"
SYSTEM_PLACE = "a system message out of place"
# Notes, by which manifests count records that are used.
EMPTY_ANSWERS = "answers without text"
EMPTY_QUESTIONS = "messages of the human without text"
BEGINS_WITH_ANSWER = "conversations that begin with the assistant"
MASKED_OPENINGS = "opening answers masked (--assistant_first mask)"
MASKED_BY_MARK = "answers masked by a loss mark"
MARKED_OTHERS = "other messages that a mark trains, masked still"
# Longer names of unknown roles are cut.
ROLE_CHARACTERS = 40


class Turn(NamedTuple):
    """One message of a record, in any format.

    `role` is as written. `mark` is its loss mark: True to train it, False to mask it, None if it has none.
    """

    role: str
    text: str
    mark: bool | None = None


class Message(NamedTuple):
    """A message of one side. `speaker` is "Human" or "Assistant"; `system_text` is a system message just before it."""

    speaker: str
    text: str
    system_text: str = ""
    is_masked: bool = False

    @property
    def is_trained(self) -> bool:
        """Whether the model learns to produce this message."""
        return self.speaker == ASSISTANT and not self.is_masked


class UnknownRole(RowError):
    """A record has unknown roles. `roles` counts its messages with each of them; long names are cut."""

    def __init__(self, message: str, roles: dict[str, int]):
        super().__init__(message, reason=UNKNOWN_ROLE)
        self.roles = roles

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.roles)


@dataclass(frozen=True)
class Conversation:
    """A conversation in exchanges; each is a run of messages that ends with an answer of the assistant.

    `unanswered` holds the human's messages after the last answer, which cannot be trained on. `notes` are counted in
    the token ledger, once per occurrence. `has_system` is whether the record has a system text of its own.
    """

    system_text: str
    exchanges: list[list[Message]]
    unanswered: list[Message]
    notes: tuple[str, ...] = ()
    has_system: bool = True


class Segment(NamedTuple):
    """A stretch of text that is encoded separately. A marked one is enclosed in <s> and </s>.

    With `is_trained`, the text and its </s> carry loss; the <s> does not, because the prompt ends with it.
    """

    text: str
    is_marked: bool
    is_trained: bool


def speakers_of(assistant_roles: Iterable[str] = ()) -> Mapping[str, str]:
    """A mapping of roles to speakers: `ROLES`, and the assistant's names of --assistant_roles."""
    return {**ROLES, **dict.fromkeys(map(canonical_role, assistant_roles), ASSISTANT)}


def canonical_role(role: str) -> str:
    """The name of a role in lower case, without surrounding white space."""
    return role.strip().lower()


def read_conversation(
    turns: Sequence[Turn],
    *,
    system_text: str | None = None,
    speakers: Mapping[str, str] = ROLES,
    masks_opening: bool = True,
    default_system: str = SYSTEM_TEXT,
) -> Conversation:
    """Check the turns of a record and group them into exchanges.

    Any order of roles is allowed, and texts may be empty. Answers that a loss mark masks carry no loss, and neither do
    answers before the first human message, unless `masks_opening` is False.

    Args:
        system_text: the record's separate system text, if it has one. Otherwise a first turn with the role system is
            the system text, and without that `default_system`.
        speakers: from `speakers_of`.
        default_system: the template's own system text.

    Raises:
        RowError: a role is unknown (`UnknownRole`) or belongs to a tool, there are two system texts for one place, or
            nothing follows a system message, or there are no turns.
    """
    exchanges: list[list[Message]] = []
    current: list[Message] = []
    notes: list[str] = []
    system_before: str | None = None
    is_opening = True
    for number, turn in enumerate(turns, start=1):
        speaker = speakers.get(turn.role) or speakers.get(canonical_role(turn.role))
        if speaker is None:
            _check_is_system(number, turns, speakers)
            if number == 1 and system_text is not None:
                message = 'message 1 has the role system, but the record also has a "system" field; keep one'
                raise RowError(message, reason=SYSTEM_PLACE)
            if system_before is not None:
                message = f"messages {number - 1} and {number} both have the role system; make them one"
                raise RowError(message, reason=SYSTEM_PLACE)
            if turn.mark:
                notes.append(MARKED_OTHERS)
            if number == 1:
                system_text = turn.text
            else:
                system_before = turn.text
            continue
        if speaker == HUMAN:
            is_opening = False
        elif is_opening and not exchanges:
            notes.append(BEGINS_WITH_ANSWER)
        current.append(_message(turn, speaker, system_before, masks=is_opening and masks_opening, notes=notes))
        system_before = None
        if speaker == ASSISTANT:
            exchanges.append(current)
            current = []
    if system_before is not None:
        raise RowError("the last message has the role system, and nothing follows it", reason=SYSTEM_PLACE)
    if not exchanges and not current:
        raise RowError("the conversation holds a system message and nothing else", reason=SYSTEM_PLACE)
    own = default_system if system_text is None else system_text
    return Conversation(own, exchanges, current, tuple(notes), has_system=system_text is not None)


def _check_is_system(number: int, turns: Sequence[Turn], speakers: Mapping[str, str]) -> None:
    """Raise RowError unless turn `number`, which has no speaker, has the role system."""
    role = turns[number - 1].role
    name = canonical_role(role)
    if name == SYSTEM_ROLE:
        return
    if name in TOOL_ROLES:
        raise RowError(f"message {number} is from {role!r:.80}; tool calls are not supported", reason=TOOL_MESSAGE)
    roles = (canonical_role(turn.role) for turn in turns)
    known = {*speakers, SYSTEM_ROLE, *TOOL_ROLES}
    unknown = Counter(role[:ROLE_CHARACTERS] for role in roles if role not in known)
    raise UnknownRole(
        f"message {number} is from {role!r:.80}; roles are {', '.join([*speakers, SYSTEM_ROLE])}; if it is the "
        "assistant, name it with --assistant_roles",
        dict(unknown),
    )


def _message(turn: Turn, speaker: str, system_text: str | None, *, masks: bool, notes: list[str]) -> Message:
    """The message of a turn. Adds to `notes` what should be counted. `masks` masks it if it is an answer."""
    is_answer = speaker == ASSISTANT
    if not turn.text or turn.text.isspace():
        notes.append(EMPTY_ANSWERS if is_answer else EMPTY_QUESTIONS)
    if turn.mark and not is_answer:
        notes.append(MARKED_OTHERS)
    if not is_answer or not (masks or turn.mark is False):
        return Message(speaker, turn.text, system_text or "")
    notes.append(MASKED_BY_MARK if turn.mark is False else MASKED_OPENINGS)
    return Message(speaker, turn.text, system_text or "", is_masked=True)


def opening_text(conversation: Conversation) -> str:
    """The text before the first message's name: the system text and a blank line, or nothing if it is empty."""
    return _with_end(conversation.system_text)


def _with_end(system_text: str) -> str:
    return system_text + SYSTEM_END if system_text else ""


def message_segments(messages: list[Message], *, opening: str = "") -> list[Segment]:
    """The segments of `messages` in order, two for each; `opening` is prepended to the first.

    >>> message_segments([Message("Human", "Hi"), Message("Assistant", "Hello!")], opening="Be kind.\\n\\n")
    [Segment(text='Be kind.\\n\\nHuman: ', is_marked=False, is_trained=False),
     Segment(text='Hi', is_marked=True, is_trained=False),
     Segment(text='Assistant: ', is_marked=False, is_trained=False),
     Segment(text='Hello!', is_marked=True, is_trained=True)]
    """
    segments = []
    for number, message in enumerate(messages):
        before = (opening if number == 0 else "") + _with_end(message.system_text)
        name = f"{before}{message.speaker}{NAME_END}"
        segments.append(Segment(name, is_marked=False, is_trained=False))
        segments.append(Segment(message.text, is_marked=True, is_trained=message.is_trained))
    return segments


def chat_template(
    *,
    prefix_after_marks: bool,
    has_dummy_prefix: bool = True,
    has_bos: bool = True,
    speakers: Mapping[str, str] = ROLES,
    masks_opening: bool = True,
) -> str:
    """The template above in Jinja for transformers, for messages of {"role", "content"}. Marks are text in it.

    `prefix_after_marks` is from `Encoder.puts_prefix_after_marks`: SentencePiece puts a "▁" before the first text; if
    transformers does not, because a mark precedes the text, the template adds a space instead. Without
    `has_dummy_prefix`, the kind of tokenizer puts no space anywhere. Without `has_bos`, nothing precedes everything,
    and eos_token precedes a message. `speakers` and `masks_opening` are those of `read_conversation`.
    """
    prefix = " " if has_dummy_prefix and not prefix_after_marks else ""
    mark, first = ("bos_token", "bos_token") if has_bos else ("eos_token", "''")
    opening = "state.asked" if masks_opening else "true"
    return f"""\
{{%- set speakers = {dict(speakers)!a} -%}}
{{%- set state = namespace(asked=false, trained=true) -%}}
{{{{- {first} + {prefix!a} -}}}}
{{%- set system_text = {SYSTEM_TEXT!a} -%}}
{{%- if messages and messages[0]['role'] | trim | lower == {SYSTEM_ROLE!a} -%}}
  {{%- set system_text = messages[0]['content'] -%}}
{{%- endif -%}}
{{%- if system_text -%}}
  {{{{- system_text + {SYSTEM_END!a} -}}}}
{{%- endif -%}}
{_messages_template(speakers, mark=mark, opening=opening)}\
{{%- if add_generation_prompt -%}}
  {{{{- {ASSISTANT + NAME_END!a} + {mark} -}}}}
{{%- endif -%}}
"""


def _messages_template(speakers: Mapping[str, str], *, mark: str, opening: str) -> str:
    """The part of the template for all messages. `mark` and `opening` are expressions of Jinja."""
    twice = f" both have the role {SYSTEM_ROLE}; make them one"
    refusal = f"; roles are {', '.join([*speakers, SYSTEM_ROLE])}"
    return f"""\
{{%- for message in messages -%}}
  {{%- set role = message['role'] | trim | lower -%}}
  {{%- if role in speakers -%}}
    {{%- set state.asked = state.asked or speakers[role] == {HUMAN!a} -%}}
    {{%- set state.trained = speakers[role] == {ASSISTANT!a} and {opening} -%}}
    {{%- for mark in {list(MARKS)!a} if message[mark] == 0 -%}}
      {{%- set state.trained = false -%}}
    {{%- endfor -%}}
    {{%- for mark in {list(INVERTED_MARKS)!a} if message[mark] == 1 -%}}
      {{%- set state.trained = false -%}}
    {{%- endfor -%}}
    {{{{- speakers[role] + {NAME_END!a} + {mark} -}}}}
    {{%- if state.trained -%}}
      {{%- generation -%}}
        {{{{- message['content'] + eos_token -}}}}
      {{%- endgeneration -%}}
    {{%- else -%}}
      {{{{- message['content'] + eos_token -}}}}
    {{%- endif -%}}
  {{%- elif role == {SYSTEM_ROLE!a} -%}}
    {{%- if loop.index > 2 and loop.previtem['role'] | trim | lower == {SYSTEM_ROLE!a} -%}}
      {{{{- raise_exception('messages ' ~ loop.index0 ~ ' and ' ~ loop.index ~ {twice!a}) -}}}}
    {{%- endif -%}}
    {{%- if message['content'] and not loop.first -%}}
      {{{{- message['content'] + {SYSTEM_END!a} -}}}}
    {{%- endif -%}}
  {{%- else -%}}
    {{{{- raise_exception('message ' ~ loop.index ~ ' is from ' ~ message['role'] ~ {refusal!a}) -}}}}
  {{%- endif -%}}
{{%- endfor -%}}
"""
