"""The model's accuracy on evaluation tasks while it trains: the items and the score of `colossal_llama2.evaluation`.

The logits of what follows a prompt come from the forward pass of the training engine, so every plugin computes them as
it computes a loss. Only those of the tokens that an item can be answered with leave the head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama2 import logs
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.results import share_of
from colossal_llama2.evaluation.task import LogitItems, LogitTask, Row
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.plurals import counted
from colossal_llama2.train.checkpointing.evaluation_history import ACCURACY, ITEMS, STANDARD_ERROR
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.stepping.pipeline import pipeline_logits
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from colossal_llama2.engine.engine import Engine


@dataclass(frozen=True)
class LoadedTask:
    """A task with its items in the model's tokens. `rows` are those of the items, the longest first."""

    name: str
    items: LogitItems
    rows: Sequence[Row]


def load_eval_tasks(config: TrainConfig, model: ModelFacts) -> list[LoadedTask]:
    """The tasks of --eval_tasks.

    Raises:
        UserError: the tokenizer cannot be used for a task, or a prompt is longer than --max_length.
    """
    tasks = config.evaluation.tasks
    if not tasks:
        return []
    tokenizer = load_tokenizer(config.source.tokenizer)
    return [_loaded(task, tokenizer, model, longest=config.data.max_length) for task in tasks]


def _loaded(task: LogitTask, tokenizer: "PreTrainedTokenizerBase", model: ModelFacts, *, longest: int) -> LoadedTask:
    items = task.items(tokenizer, context=model.positions, vocab_size=model.vocab_size)
    # Rows of similar length share a batch, as in the command; the last row is the cheapest to repeat.
    rows = sorted(items.rows, key=lambda row: (-len(row.ids), row.item))
    most, count = len(rows[0].ids), sum(len(row.ids) > longest for row in rows)
    if count:
        fewer = "fewer examples with --eval_num_fewshot, or " if task.num_fewshot else ""
        raise UserError(
            f"--eval_tasks {task.name}: {count:,} of {counted(len(rows), 'prompt')} exceed --max_length {longest}, the "
            f"longest with {most:,} tokens; give {fewer}a larger --max_length, or leave {task.name} out"
        )
    logs.get_logger().info("%s: %s of up to %d tokens", task.name, counted(len(rows), "item"), most)
    for note, what in (("dropped_examples", "without some of its examples"), ("cut_tokens", "cut in front")):
        if shortened := sum(bool(row.notes.get(note)) for row in rows):
            logs.get_logger().warning(
                "%s: %s %s, since the model's context is %s tokens",
                task.name,
                counted(shortened, "prompt"),
                what,
                f"{model.positions:,}",
            )
    return LoadedTask(task.name, items, rows)


def accuracy_on(engine: "Engine", task: LoadedTask, collator: Collator, *, stop: NoSignals) -> dict[str, float] | None:
    """The share of right items and its standard error, NaN if a logit is NaN/Inf. None if a signal came to a rank.

    The items are divided among the data-parallel ranks, which run the same number of forward passes. Called on all
    ranks. Training is unaffected.
    """
    right, width = 0.0, max(len(row.candidates) for row in task.rows)
    with engine.evaluating():
        for rows, count, batch in _share(engine, task.rows, collator):
            # As in `summed_loss`.
            if agreed_signal(engine.sum_over_data(stop.received(), known_to_host=True)) is not None:
                return None
            logits = next_logits(engine, batch, _candidates(rows, width)).tolist()
            right += sum(
                _is_right(task.items, row, of_row[: len(row.candidates)])
                for row, of_row in zip(rows[:count], logits[:count], strict=True)
            )
    (total,) = engine.sum_over_data([right])
    # A whole number, unless it is NaN.
    score = share_of(round(total) if math.isfinite(total) else math.nan, len(task.rows))
    errors = {} if score.error is None else {STANDARD_ERROR: score.error}
    return {ACCURACY: score.value, **errors, ITEMS: len(task.rows)}


def _share(engine: "Engine", rows: Sequence[Row], collator: Collator) -> Iterator[tuple[Sequence[Row], int, Batch]]:
    """The rows of this rank's micro batches, all of the same size, how many of them count, and the batches.

    Further rows repeat the last one, so that all ranks run the same forward passes.
    """
    size = engine.settings.micro_batch_size
    for start in range(0, len(rows), size * engine.data_size):
        begin = start + engine.data_rank * size
        own = rows[begin : begin + size]
        filled = [*own, *[rows[-1]] * (size - len(own))]
        yield filled, len(own), collator.of_prompts([row.ids for row in filled])


def _candidates(rows: Sequence[Row], width: int) -> "torch.Tensor":
    """(rows, width) ids. Rows with fewer candidates repeat one."""
    import torch

    ids = [[*row.candidates, *[row.candidates[0]] * (width - len(row.candidates))] for row in rows]
    return torch.tensor(ids, dtype=torch.long)


def next_logits(engine: "Engine", batch: Batch, candidates: "torch.Tensor") -> "torch.Tensor":
    """The (batch, candidates) logits of these tokens after the last one of each row of a micro batch.

    Called on all ranks, in `evaluating`.
    """
    if engine.is_pipelined:
        return pipeline_logits(engine, batch, candidates)
    asked = ((batch.lengths - 1).to(engine.device), candidates.to(engine.device))
    with engine.scoring_next(lambda: asked):
        return engine.model(
            input_ids=batch.input_ids.to(engine.device), use_cache=False, **engine.attention_inputs(batch)
        ).logits


def _is_right(items: LogitItems, row: Row, logits: list[float]) -> float:
    """1 or 0; NaN if a logit is NaN/Inf."""
    return float(items.record(row, logits)["is_correct"]) if all(map(math.isfinite, logits)) else math.nan
