"""The model's answers to a few fixed prompts while it trains, greedily, in the form that inference_example.py gives it.

Keys and values are not kept, so every plugin computes an answer with the same forward pass as a loss. An answer of n
tokens takes n passes; a few prompts of some hundred tokens take seconds on GPUs.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.folder_chat import colossal_template_of
from colossal_llama2.chat.templates import ChatTemplate
from colossal_llama2.dataset.layout.chat_data import ChatData
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.encoding.registry import puts_prefix_after_marks, shared_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.inference.prompt_file import FilePrompt
from colossal_llama2.inference.prompts import PROMPT_SUFFIX, text_ids
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.storage.row_errors import RowError
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.stepping.pipeline import pipeline_tokens
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from colossal_llama2.engine.engine import Engine


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt, and its ids in the form in which the model gets it."""

    text: str
    ids: Sequence[int]


@dataclass(frozen=True)
class Answer:
    """A model's answer: its text and number of tokens, and whether it ended only because of the limit."""

    prompt: str
    text: str
    tokens: int
    is_cut: bool


def load_prompts(config: TrainConfig) -> list[EvalPrompt]:
    """The prompts of --eval_prompts with their ids; none without the flag.

    Raises:
        UserError: with file:line, for a prompt that cannot be used.
    """
    prompts = config.evaluation.prompts
    if not prompts:
        return []
    folder = config.source.tokenizer
    if config.stage == "sft":
        with contextlib.closing(_chat_tokenizer(config.chat, folder)) as chat:
            rows = [_chat_ids(prompt, chat, folder) for prompt in prompts]
    else:
        tokenizer = load_tokenizer(folder)
        rows = [_text_ids(prompt, tokenizer) for prompt in prompts]
    room, longest = config.evaluation.prompt_tokens, config.data.max_length
    for prompt, ids in zip(prompts, rows, strict=True):
        if len(ids) + room > longest:
            raise UserError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, and with --eval_prompt_tokens {room} more than "
                f"--max_length {longest}; shorten it, or give a smaller --eval_prompt_tokens"
            )
    return [EvalPrompt(prompt.text, ids) for prompt, ids in zip(prompts, rows, strict=True)]


def _chat_tokenizer(data: ChatData | None, folder: str) -> ChatTokenizer:
    """The template of the data, which the trained model is exported with."""
    text = data.text if data is not None and data.text is not None else colossal_template_of(folder)
    template = ChatTemplate(data.name if data else "colossal", text, "of the data")
    return ChatTokenizer(template, shared_encoder(folder), folder, prefix_after_marks=puts_prefix_after_marks(folder))


def _chat_ids(prompt: FilePrompt, chat: ChatTokenizer, folder: str) -> list[int]:
    """The ids of a prompt as a chat. Raises UserError if it cannot be used."""
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    for message in messages:
        problem = shared_encoder(folder).problem_of(message["content"])
        if problem:
            raise UserError(f"{prompt.where}: the prompt cannot be used: {problem}; change it")
    try:
        return chat.prompt(messages)
    except RowError as error:
        raise UserError(f"{prompt.where}: {error}; change it")


def _text_ids(prompt: FilePrompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The ids of a prompt as inference gives it to a model of train.py. Raises UserError if it cannot be used."""
    if prompt.messages is not None:
        raise UserError(f"{prompt.where}: is a conversation, but train.py continues texts; give a prompt")
    try:
        return text_ids(tokenizer, prompt.text + PROMPT_SUFFIX)
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}")


class Answerer:
    """Answers the prompts with the model that is trained. All ranks call its methods together."""

    def __init__(
        self,
        engine: "Engine",
        prompts: Sequence[EvalPrompt],
        collator: Collator,
        *,
        most_tokens: int,
        turn_ends: Sequence[int],
        tokenizer_dir: str,
        stop: NoSignals,
    ):
        """
        Args:
            most_tokens: of an answer.
            turn_ends: ids that end an answer, besides the end of a document and those of the model's
                generation_config.json.
        """
        self._engine, self._prompts, self._collator, self._stop = engine, prompts, collator, stop
        self._most_tokens, self._tokenizer = most_tokens, load_tokenizer(tokenizer_dir)
        own = engine.unwrapped_model.generation_config.eos_token_id
        self._ends = {self._tokenizer.eos_token_id, *turn_ends, *(own if isinstance(own, list) else [own])}

    def answer(self) -> list[Answer] | None:
        """The answers in the order of the prompts; empty without prompts. None if a signal came to a rank."""
        engine, found = self._engine, dict[int, list[int]]()
        width = engine.settings.micro_batch_size * engine.data_size
        with engine.evaluating():
            for start in range(0, len(self._prompts), width):
                begin = start + engine.data_rank * engine.settings.micro_batch_size
                numbers = range(begin, begin + engine.settings.micro_batch_size)
                answers = self._continued(numbers)
                if answers is None:
                    return None
                found.update(answers)
        # JSON has no keys that are numbers.
        gathered = collectives.gather_values(list(found.items()))
        ids = {number: tokens for rank in gathered for number, tokens in rank}
        return [self._answer(prompt, ids[number]) for number, prompt in enumerate(self._prompts)]

    def _continued(self, numbers: range) -> dict[int, list[int]] | None:
        """The ids of this rank's answers to these prompts, those that exist; None if a signal came to a rank.

        The other rows of the micro batch repeat the first prompt, so that all ranks run the same forward passes.
        """
        engine, count = self._engine, len(self._prompts)
        rows = [list(self._prompts[number if number < count else 0].ids) for number in numbers]
        answers: dict[int, list[int]] = {number: [] for number in numbers if number < count}
        open_rows = {number: row for number, row in zip(numbers, rows, strict=True) if number < count}
        for _ in range(self._most_tokens):
            # Agreed on by the hosts: the others would wait for a rank that stopped on its own.
            flags = [float(bool(open_rows)), *self._stop.received()]
            unfinished, *signals = engine.sum_over_data(flags, known_to_host=True)
            if agreed_signal(signals) is not None:
                return None
            if not unfinished:
                break
            tokens = next_tokens(engine, self._collator.of_prompts(rows))
            for number, token in zip(numbers, tokens, strict=True):
                if number not in open_rows:
                    continue
                if token in self._ends:
                    del open_rows[number]
                else:
                    open_rows[number].append(token)
                    answers[number].append(token)
        return answers

    def _answer(self, prompt: EvalPrompt, ids: Sequence[int]) -> Answer:
        stream = TextStream(self._tokenizer)
        text = "".join(map(stream.push, ids)) + stream.end()
        return Answer(prompt.text, text, len(ids), is_cut=len(ids) == self._most_tokens)


def next_tokens(engine: "Engine", batch: Batch) -> list[int]:
    """The most likely token after the last one of each row of a micro batch. Called on all ranks, in `evaluating`."""
    if engine.is_pipelined:
        return pipeline_tokens(engine, batch)
    places = (batch.lengths - 1).to(engine.device)
    with engine.choosing_next(lambda: places):
        chosen = engine.model(
            input_ids=batch.input_ids.to(engine.device), use_cache=False, **engine.attention_inputs(batch)
        ).logits
    return chosen.tolist()


def as_record(answers: Sequence[Answer]) -> list[Mapping[str, Any]]:
    """The answers as train_log.jsonl records them."""
    return [
        {"prompt": answer.prompt, "answer": answer.text, "tokens": answer.tokens, "is_cut": answer.is_cut}
        for answer in answers
    ]
