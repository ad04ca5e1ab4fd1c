"""One answer while it is generated: its text in parts, its length and its speed."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from colossal_llama2.inference.generation import generate_tokens, room_for_answer
from colossal_llama2.inference.prompt_batch import KeptStates
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class Answer:
    """The answer to one prompt. Iterating generates it, and returns its text in parts of whole characters.

    There is a part for each token, which may be empty, and one at the end.

    Attributes:
        text: what has been generated so far.
        tokens: how many that are, without the end of the text.
        seconds: the time that they took.
    """

    def __init__(
        self,
        model: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        row: Sequence[int],
        settings: GenerationSettings,
        *,
        kept: KeptStates | None = None,
    ):
        """
        Args:
            row: the ids of the prompt.
            kept: the states of earlier prompts, which are used and updated.

        Raises:
            UserError: the prompt alone fills the model's context.
        """
        self.text, self.tokens, self.seconds = "", 0, 0.0
        self._limit = room_for_answer(model, prompt_length=len(row), max_new_tokens=settings.max_new_tokens)
        self._steps = generate_tokens(model, tokenizer, [row], settings, kept=kept)
        self._stream = TextStream(tokenizer)

    def __iter__(self) -> Iterator[str]:
        start = time.monotonic()
        try:
            for step in self._steps:
                self.tokens += 1
                self.seconds = time.monotonic() - start
                yield self._part(self._stream.push(step[0]))
        finally:
            self._steps.close()
        self.seconds = time.monotonic() - start
        yield self._part(self._stream.end())

    def _part(self, text: str) -> str:
        self.text += text
        return text

    @property
    def is_cut(self) -> bool:
        """Whether it ended because there was no more room, or after max_new_tokens."""
        return self.tokens >= self._limit

    def speed(self) -> str:
        """Its length and speed, for people: "48 tokens, 12.3 tokens/s"."""
        return f"{counted(self.tokens, 'token')}, {self.tokens / max(self.seconds, 1e-9):.1f} tokens/s"
