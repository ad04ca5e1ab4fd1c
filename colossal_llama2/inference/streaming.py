"""The text of tokens while they are generated: whole characters only, as early as possible."""

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes one answer token by token. What `push` and `end` return is the answer, in parts.

    It is what `decode` of transformers returns for all tokens together, without special tokens; spaces before
    punctuation stay as they were generated. A character whose bytes are spread over several tokens is returned with the
    last of them. One difference: where a character that is complete is followed by bytes that are none, it is kept
    here, while the decoder of LLaMA-2's tokenizer.json replaces it too.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        # Tokens whose text is not returned completely, and how much of it is.
        self._pending: list[int] = []
        self._returned = 0
        self._is_first = True

    def push(self, token: int) -> str:
        """The characters that are complete with this token; often none."""
        if token in self._special:
            return ""
        self._pending.append(token)
        text = self._decoded()
        complete = text.rstrip(REPLACEMENT)
        new = complete[self._returned :]
        self._returned = max(self._returned, len(complete))
        if len(complete) == len(text):
            self._forget()
        return new

    def end(self) -> str:
        """The rest: what is left of an incomplete character, as U+FFFD."""
        text = self._decoded()[self._returned :] if self._pending else ""
        self._forget()
        return text

    def _forget(self) -> None:
        self._is_first = self._is_first and not self._pending
        self._pending, self._returned = [], 0

    def _decoded(self) -> str:
        """The text of the pending tokens. SentencePiece drops the space before the first token of an answer only."""
        if self._is_first:
            return self._decode(self._pending)
        anchor, length = self._anchor
        return self._decode([*anchor, *self._pending])[length:]

    @cached_property
    def _anchor(self) -> tuple[list[int], int]:
        """A token that may precede any other, and the length of its text."""
        ids = self._tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        return ids, len(self._decode(ids))

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
