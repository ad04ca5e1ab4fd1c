"""Answer many prompts: several at a time, the answers in the order of the prompts."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.inference.answer_file import AnswerFile
from colossal_llama2.inference.generation import generate_tokens, room_for_answer
from colossal_llama2.inference.loading import precision_of
from colossal_llama2.inference.prompt_file import FilePrompt
from colossal_llama2.inference.prompts import SFT, chat_ids, prompt_ids
from colossal_llama2.inference.settings import GenerationSettings, InferenceSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.logs import SilentProgress, get_logger, progress
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Prompts of similar length are answered together: they are chosen from this many batches at a time.
WINDOW_BATCHES = 4


class Answered(NamedTuple):
    """An answer: its text, its length in tokens, and whether it ended only because there was no more room."""

    text: str
    tokens: int
    is_cut: bool


def check_form(prompts: Sequence[FilePrompt], style: str) -> None:
    """Raise UserError, with its place, for a conversation if prompts are not given as chats."""
    for prompt in prompts:
        if prompt.messages is not None and style != SFT:
            raise UserError(
                f"{prompt.where}: a conversation needs prompt style {SFT}, and this is {style}; give a model with a "
                "chat template"
            )


def answer_prompts(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    style: str,
    prompts: Sequence[FilePrompt],
    settings: InferenceSettings,
    file: AnswerFile | None,
) -> None:
    """Answer all prompts that `file` has no answer to yet, into the file, or to stdout without one.

    Raises:
        UserError: a prompt cannot be used; none is answered then.
    """
    rows = [_encoded(model, tokenizer, prompt, style) for prompt in prompts]
    done = 0
    if file is not None:
        file.open(precision_of(model))
        done = file.done
    found = answers_in_order(
        model,
        tokenizer,
        rows,
        settings.generation,
        sequences=settings.num_return_sequences,
        batch_size=settings.batch_size,
        done=done,
    )
    start, tokens = time.monotonic(), 0
    bar = SilentProgress()
    if file is not None:
        bar = progress(total=len(prompts), description="answers", unit="prompt", initial=done)
    with bar, contextlib.closing(file) if file is not None else contextlib.nullcontext():
        for prompt, answers in zip(prompts[done:], found, strict=True):
            tokens += sum(answer.tokens for answer in answers)
            if file is None:
                _show(prompt, answers)
            else:
                file.add({**prompt.record(), **answer_fields(answers)})
            bar.update()
    seconds = time.monotonic() - start
    get_logger().info(
        f"answered {counted(len(prompts) - done, 'prompt')} in {seconds:.1f} s: {counted(tokens, 'token')}, "
        f"{tokens / max(seconds, 1e-9):.1f} tokens/s"
    )


def _encoded(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", prompt: FilePrompt, style: str
) -> list[int]:
    """The ids of a prompt. Raises UserError, with its place, if it cannot be used or fills the context."""
    try:
        if prompt.messages is None:
            row = prompt_ids(tokenizer, style, prompt.text)
        else:
            row = chat_ids(tokenizer, prompt.messages)
        room_for_answer(model, prompt_length=len(row), max_new_tokens=1)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}")
    return row


def _show(prompt: FilePrompt, answers: Sequence[Answered]) -> None:
    """Print a prompt, or the last question of a conversation, and its answers."""
    show(f"Prompt: {prompt.text}")
    for number, answer in enumerate(answers, start=1):
        show(f"Answer{f' {number}' if len(answers) > 1 else ''}: {answer.text}")


def answers_in_order(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    sequences: int,
    batch_size: int,
    done: int = 0,
) -> Iterator[list[Answered]]:
    """Yield the answers to each prompt, in the order of the prompts, as soon as they and those before them are there.

    With a seed, answer i to prompt n (from 0) is drawn with the seed `settings.seed` + n * `sequences` + i, whatever is
    generated beside it.

    Args:
        rows: the ids of each prompt.
        sequences: answers to each prompt.
        batch_size: answers that are generated together.
        done: how many prompts to leave out at the beginning.
    """
    found: dict[int, Answered] = {}
    numbers = range(done * sequences, len(rows) * sequences)
    yielded = done
    for start in range(0, len(numbers), batch_size * WINDOW_BATCHES):
        window = numbers[start : start + batch_size * WINDOW_BATCHES]
        # Stable, so that equal prompts stay together.
        by_length = sorted(window, key=lambda number: len(rows[number // sequences]))
        for first in range(0, len(by_length), batch_size):
            batch = by_length[first : first + batch_size]
            found.update(_answered(model, tokenizer, [rows[number // sequences] for number in batch], settings, batch))
            while all(yielded * sequences + number in found for number in range(sequences)):
                yield [found.pop(yielded * sequences + number) for number in range(sequences)]
                yielded += 1


def _answered(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    numbers: Sequence[int],
) -> dict[int, Answered]:
    """The answers to some prompts, which are generated together, by their numbers."""
    streams = [TextStream(tokenizer) for _ in rows]
    texts = [""] * len(rows)
    counts = [0] * len(rows)
    for step in generate_tokens(model, tokenizer, rows, settings, numbers=numbers):
        for row, token in step.items():
            texts[row] += streams[row].push(token)
            counts[row] += 1
    limits = [room_for_answer(model, prompt_length=len(row), max_new_tokens=settings.max_new_tokens) for row in rows]
    return {
        number: Answered(texts[row] + streams[row].end(), counts[row], counts[row] >= limits[row])
        for row, number in enumerate(numbers)
    }


def answer_fields(answers: Sequence[Answered]) -> dict[str, Any]:
    """The fields of a prompt's answers in the output file: values, or lists of them if there are several answers."""
    if len(answers) == 1:
        return {"answer": answers[0].text, "tokens": answers[0].tokens, "is_cut": answers[0].is_cut}
    return {
        "answers": [answer.text for answer in answers],
        "tokens": [answer.tokens for answer in answers],
        "is_cut": [answer.is_cut for answer in answers],
    }
