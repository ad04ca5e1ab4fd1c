"""Compute the records of a task for one model: batch after batch, each rank its own."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2 import launcher
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation import ranks
from colossal_llama2.evaluation.batching import Batch, Room, batches_of
from colossal_llama2.evaluation.task import PreparedTask, Row, Task
from colossal_llama2.inference.prompt_batch import SharedStates

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

Record = dict[str, Any]
# Tokens of a forward pass: more are not faster.
COMPUTED_TOKENS = {"cpu": 2048, "cuda": 32768}
# Most padding of a row, in tokens. On a CPU the operations of a forward pass take as long as about 32 tokens of it, and
# with this limit padding and passes together take least for the questions of CMMLU, AGIEval and GAOKAO-Bench, of which
# 16 to 64 are within 3 %. A GPU is not busy with few rows, so there is no limit.
CPU_PADDING = 32
CPU_STATES_BYTES = 1 << 30
# Of what is free on the GPU once the model is there: attention and logits need memory too.
GPU_STATES_SHARE = 0.3
SECOND_DIGITS = 6


def records_of(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    folder: str,
    task: Task,
    *,
    batch_size: int | None,
    done: Sequence[int] = (),
) -> Iterator[list[Record]]:
    """Yield the records of a task's items, some at a time, in an order that depends on the task and the model alone.

    All ranks call this together, and all get all records.

    Args:
        folder: the model's.
        batch_size: items that are computed together; None for what fits.
        done: the items whose records an earlier command has computed, in its order. They are left out.

    Raises:
        UserError: the tokenizer cannot be used for the task, or the items of `done` are not the first ones.
    """
    prepared = task.prepare(model, tokenizer, folder)
    room = _room(model, batch_size, is_continued=prepared.new_tokens > 1)
    batches = batches_of(prepared.rows, room, new_tokens=prepared.new_tokens)
    if list(done) != [row.item for batch in batches for row in batch.rows][: len(done)]:
        raise UserError(
            f"--output_file: the items of {task.name} are not in the order in which this version computes them; give a "
            "new file"
        )
    computer, here = _Computer(model, prepared, task), launcher.place()
    before = 0
    for start in range(0, len(batches), here.world_size):
        turn = batches[start : start + here.world_size]
        after = before + sum(len(batch.rows) for batch in turn)
        if after > len(done):
            own = computer.records(turn[here.rank]) if here.rank < len(turn) else []
            found = [record for rank in ranks.gathered(own) for record in rank]
            yield found[max(0, len(done) - before) :]
        before = after


def _room(model: "LlamaForCausalLM", batch_size: int | None, *, is_continued: bool) -> Room:
    """Rows that are continued token by token read all weights for each, so they are padded to be together."""
    import torch

    config, device = model.config, model.device
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    room = CPU_STATES_BYTES
    if device.type == "cuda":
        room = int(torch.cuda.mem_get_info(device)[0] * GPU_STATES_SHARE)
    padding = CPU_PADDING if device.type == "cpu" and not is_continued else None
    return Room(batch_size, COMPUTED_TOKENS[device.type], max(1, room // states), padding)


class _Computer:
    """Computes batches, and keeps the states of the last shared beginning, which the next batch often shares."""

    def __init__(self, model: "LlamaForCausalLM", prepared: PreparedTask, task: Task):
        self._model, self._prepared, self._task = model, prepared, task
        self._states: SharedStates | None = None

    def records(self, batch: Batch) -> list[Record]:
        """The records of a batch. `seconds` is the time of the batch, divided among its items and all ranks."""
        start = time.monotonic()
        found = self._computed(batch.rows, self._shared(batch.shared))
        seconds = (time.monotonic() - start) / len(batch.rows) / launcher.place().world_size
        return [
            {
                "item": row.item,
                "subject": self._task.subjects[row.item],
                **row.notes,
                "tokens": len(row.ids),
                **fields,
                "seconds": round(seconds, SECOND_DIGITS),
            }
            for row, fields in zip(batch.rows, found, strict=True)
        ]

    def _shared(self, ids: Sequence[int]) -> SharedStates | None:
        if not ids:
            self._states = None
        elif self._states is None or self._states.ids != list(ids):
            self._states = SharedStates(self._model, ids)
        return self._states

    def _computed(self, rows: Sequence[Row], shared: SharedStates | None) -> list[Record]:
        """Half of the rows at a time if a GPU has too little memory for all."""
        import torch

        try:
            return self._prepared.compute(rows, shared)
        except torch.cuda.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside of the handler, whose exception holds what filled the memory.
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return [*self._computed(rows[:half], shared), *self._computed(rows[half:], shared)]
