"""Score items by the logits of what follows them, computed by a model of transformers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2.evaluation.task import LogitItems, Row
from colossal_llama2.inference.prompt_batch import PromptBatch

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from colossal_llama2.inference.prompt_batch import SharedStates


def records_by_logits(
    model: "LlamaForCausalLM", items: LogitItems, rows: Sequence[Row], shared: "SharedStates | None"
) -> list[dict[str, Any]]:
    """The fields of the records of some rows, see `PreparedTask.compute`."""
    logits = PromptBatch(model, [row.ids for row in rows], shared=shared).logits()
    return records_of_logits(items, rows, logits)


def records_of_logits(items: LogitItems, rows: Sequence[Row], logits: "torch.Tensor") -> list[dict[str, Any]]:
    """The same from the (rows, vocabulary) logits of what follows."""
    return [
        items.record(row, of_row[list(row.candidates)].float().tolist())
        for row, of_row in zip(rows, logits, strict=True)
    ]
