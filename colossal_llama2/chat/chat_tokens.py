"""Messages to token ids by a template that is rendered: exactly what a model is trained on, and asked with.

The text of a conversation is that of transformers' `apply_chat_template`, and so are its ids, with two differences. A
special token that a message spells out stays text, as in all data here: "<|im_end|>" on a web page ends no turn. And no
token crosses the border of an answer, because the model continues a prompt that ends there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.chat.marks import Marks
from colossal_llama2.chat.renderer import Renderer
from colossal_llama2.chat.templates import ChatTemplate
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.file_names import CONFIG_FILE, SPECIAL_TOKENS_FILE
from colossal_llama2.encoding.folder_files import ADDITIONAL, SPECIAL_TOKENS
from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import is_regular, read_settings
from colossal_llama2.storage.row_errors import RowError

# The last of Unicode's 32 code points here for use inside a program; `render_process` uses the first ones.
SHIELD = "\ufdef"
# As json.dumps and tojson(ensure_ascii=True) write it.
ESCAPED_SHIELD = re.compile(r"\\u[fF][dD][eE][fF]")
# The span of an answer that cannot be found.
NOWHERE = (0, 0)
NO_END = "a conversation with an answer that the chat template does not end with a special token"

PROBE = (
    {"role": "user", "content": "Where is Lyon?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Nice?"},
    {"role": "assistant", "content": "In France too."},
)


class Part(NamedTuple):
    """A run of tokens with one mask. `answer` is the number of the answer that they belong to, or None."""

    ids: list[int]
    answer: int | None


@dataclass(frozen=True)
class Tokens:
    """A conversation as tokens.

    Attributes:
        parts: in order.
        is_joined: whether transformers would join characters across the border of an answer into one token.
    """

    parts: list[Part]
    is_joined: bool

    @property
    def num_tokens(self) -> int:
        """Of all parts."""
        return sum(len(part.ids) for part in self.parts)


class _Run(NamedTuple):
    """A stretch of text without a mark, or a mark alone; `answer` as in `Part`. It begins at a border if `is_cut`."""

    text: str
    mark: int | None
    answer: int | None
    is_cut: bool


class ChatTokenizer:
    """A template with a tokenizer."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, folder: str | Path, *, prefix_after_marks: bool):
        """
        Args:
            folder: of the tokenizer.
            prefix_after_marks: see `Encoder.puts_prefix_after_marks`.

        Raises:
            UserError: the tokenizer's files are damaged.
        """
        self.template = template
        self._folder = folder
        self._encoder, self._prefix_after_marks = encoder, prefix_after_marks
        self._marks = Marks.of(folder, encoder)
        # A special token of one character has no place inside for the shield.
        self._stand_ins = {text: chr(ord(SHIELD) - 1 - n) for n, text in enumerate(self._marks.special_characters)}
        self._renderer = Renderer(template.text, names=_token_names(folder, encoder), origin=template.origin)

    def close(self) -> None:
        """End the process that renders."""
        self._renderer.close()

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids after which the model answers.

        Raises:
            RowError: the template refuses the messages.
        """
        # Earlier answers are encoded as in training.
        shielded = self._shielded(messages)
        text = self._renderer.prompt(shielded)
        self._check_shields(text, shielded)
        spans: list[tuple[int, int]] = []
        if any(message["role"] == "assistant" for message in messages):
            try:
                whole = self._renderer.conversation(shielded)
            except RowError:
                pass  # a history that training would refuse
            else:
                spans = self._trimmed(whole.text, whole.spans) if text.startswith(whole.text) else []
        return [token for part in self._encode(text, spans).parts for token in part.ids]

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """A conversation as tokens.

        Answers before the first question have no part of their own if the template does not show where they are.

        Raises:
            RowError: the template refuses it, or its answers cannot be found in the text.
        """
        shielded = self._shielded(messages)
        rendered = self._renderer.conversation(shielded)
        self._check_shields(rendered.text, shielded)
        spans = self._trimmed(rendered.text, rendered.spans)
        for number, span in enumerate(spans, start=1):
            if span != NOWHERE and self._end_of(rendered.text, span) is None:
                raise RowError(
                    f"the chat template {self.template.origin} ends answer {number} without a special token of the "
                    "tokenizer, so that generation would not stop there",
                    reason=NO_END,
                )
        return self._encode(rendered.text, spans)

    @cached_property
    def turn_ends(self) -> list[int]:
        """The ids of the tokens that end an answer, as seen in a short conversation.

        Raises:
            UserError: a model cannot be trained with this template, or not with this tokenizer.
        """
        try:
            rendered = self._renderer.conversation(PROBE)
            prompt = self._renderer.prompt(PROBE[:1])
        except RowError as error:
            raise UserError(f"{error} (for a conversation of two questions and their answers); give another template")
        origin, text = self.template.origin, rendered.text
        spans = self._trimmed(text, rendered.spans)
        begin = spans[0][0]
        if not text.startswith(prompt[:begin]) or not prompt.startswith(text[:begin]):
            raise UserError(
                f"the chat template {origin} begins an answer with {text[:begin][-60:]!r} in a conversation, and with "
                f"{prompt[-60:]!r} as a prompt; correct it, so that a model is asked as it was trained"
            )
        ends = [self._end_of(text, span) for span in spans]
        after = self._marks.special_pattern.match(text, spans[0][1])
        if None in ends and after:
            raise UserError(
                f"the chat template {origin} has {after[0]} behind an answer's {{% endgeneration %}}, so a model would "
                f"not learn to end its answers; move {{% endgeneration %}} behind it"
            )
        if begin == 0 or None in ends:
            shown = text[spans[0][0] : spans[0][1]][-40:]
            raise UserError(
                f"the chat template {origin} ends an answer with {shown!r}, where {self._folder} has no special "
                "token, so generation would not stop there; end answers with a special token, such as "
                f"{self._encoder.eos_text}"
            )
        return sorted({end for end in ends if end is not None})

    def _shielded(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """The messages with a reserved character in each special token that they spell out."""
        pattern = self._marks.special_pattern
        shielded = []
        for message in messages:
            content = message["content"]
            used = next((character for character in (SHIELD, *self._stand_ins.values()) if character in content), None)
            if used is not None:
                raise RowError(
                    f"a message has the character U+{ord(used):04X}, which Unicode reserves for use inside programs; "
                    "remove it",
                    reason="a message with a reserved character",
                )
            if pattern.search(content):
                content = pattern.sub(self._shield, content)
            shielded.append({"role": message["role"], "content": content})
        return shielded

    def _check_shields(self, text: str, messages: Sequence[Mapping[str, str]]) -> None:
        """Raise RowError if a shield of these messages was escaped, and would stay in the text."""
        if any(SHIELD in message["content"] for message in messages) and ESCAPED_SHIELD.search(text):
            raise RowError(
                f"the chat template {self.template.origin} escapes a message with a special token as JSON does, and "
                "changes it; remove the token from the message",
                reason="a special token in a message that the chat template escapes",
            )

    def _shield(self, found: re.Match[str]) -> str:
        """What stands for a special token that a message spells out."""
        return self._stand_ins.get(found[0]) or found[0][0] + SHIELD + found[0][1:]

    def _unshielded(self, text: str) -> str:
        for character, stand_in in self._stand_ins.items():
            text = text.replace(stand_in, character)
        return text.replace(SHIELD, "")

    def _trimmed(self, text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Spans that end with their last special token, if they have one: templates without markers write more."""
        if self._renderer.has_markers:
            return list(spans)
        trimmed = []
        for begin, end in spans:
            if (begin, end) == NOWHERE:
                trimmed.append(NOWHERE)
                continue
            found = list(self._marks.special_pattern.finditer(text, begin, end))
            trimmed.append((begin, found[-1].end() if found else end))
        return trimmed

    def _end_of(self, text: str, span: tuple[int, int]) -> int | None:
        """The id of the special token that ends an answer, if one does. Only white space may follow it."""
        begin, end = span
        found = list(self._marks.special_pattern.finditer(text, begin, end))
        is_end = bool(found) and not text[found[-1].end() : end].strip()
        return self._marks[found[-1][0]].id if is_end else None

    def _encode(self, text: str, spans: Sequence[tuple[int, int]]) -> Tokens:
        runs = self._runs(text, spans)
        plain = [run for run in runs if run.mark is None]
        # A text at the beginning has a prefix; after a mark, that depends on the tokenizer; after a border, never.
        firsts = [run is runs[0] or (self._prefix_after_marks and not run.is_cut) for run in plain]
        ids = iter(self._encode_runs([run.text for run in plain], firsts))
        parts: list[Part] = []
        for run in runs:
            found = next(ids) if run.mark is None else [run.mark]
            if parts and parts[-1].answer == run.answer:
                parts[-1].ids.extend(found)
            else:
                parts.append(Part(list(found), run.answer))
        return Tokens(parts, self._is_joined(runs, firsts))

    def _encode_runs(self, texts: Sequence[str], firsts: Sequence[bool]) -> list[list[int]]:
        """The ids of each text, with a prefix or without."""
        found: list[list[int]] = [[]] * len(texts)
        for has_prefix in (True, False):
            places = [place for place, is_first in enumerate(firsts) if is_first is has_prefix]
            ids = self._encoder.encode([texts[place] for place in places], dummy_prefix=has_prefix) if places else []
            for place, own in zip(places, ids, strict=True):
                found[place] = list(own)
        return found

    def _is_joined(self, runs: Sequence[_Run], firsts: Sequence[bool]) -> bool:
        """Whether two runs on both sides of a border have other ids as one text."""
        has_prefix = iter(firsts)
        prefixes = [run.mark is None and next(has_prefix) for run in runs]
        for number in range(1, len(runs)):
            before, after = runs[number - 1], runs[number]
            if before.mark is not None or after.mark is not None or not after.is_cut:
                continue
            apart = self._encode_runs([before.text, after.text], [prefixes[number - 1], False])
            if self._encode_runs([before.text + after.text], [prefixes[number - 1]]) != [apart[0] + apart[1]]:
                return True
        return False

    def _runs(self, text: str, spans: Sequence[tuple[int, int]]) -> list[_Run]:
        """The text divided at marks and at the borders of answers, without the shields."""
        borders = sorted({0, len(text), *(border for span in spans for border in span)})
        answers = {span[0]: number for number, span in enumerate(spans) if span != NOWHERE}
        runs: list[_Run] = []
        for begin, end in zip(borders, borders[1:], strict=False):
            answer = answers.get(begin)
            place, strips = begin, bool(runs) and runs[-1].mark is not None and self._marks[runs[-1].text].strips_right
            for match in [*self._marks.pattern.finditer(text, begin, end), None]:
                mark = self._marks[match[0]] if match else None
                plain = text[place : match.start() if match else end]
                plain = plain.lstrip() if strips else plain
                plain = plain.rstrip() if mark and mark.strips_left else plain
                if plain:
                    is_cut = place == begin and begin > 0 and bool(runs) and runs[-1].mark is None
                    runs.append(_Run(self._unshielded(plain), None, answer, is_cut))
                if match and mark:
                    runs.append(_Run(match[0], mark.id, answer, is_cut=False))
                    place, strips = match.end(), mark.strips_right
        return runs


def _token_names(folder: str | Path, encoder: Encoder) -> dict[str, Any]:
    """What a template can use besides the messages, as in transformers: bos_token, unk_token and others, as texts."""
    found: dict[str, Any] = {}
    for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
        path = Path(folder, name)
        settings = read_settings(path) if is_regular(path) else {}
        for key in SPECIAL_TOKENS:
            if isinstance(text := _text_of(settings.get(key)), str):
                found[key] = text
        if isinstance(listed := settings.get(ADDITIONAL), list):
            found[ADDITIONAL] = [text for text in map(_text_of, listed) if isinstance(text, str)]
    own = {"bos_token": encoder.bos_text if encoder.bos_id >= 0 else "", "eos_token": encoder.eos_text}
    return {**found, **own}


def _text_of(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else entry
