"""Score items by the logits of what follows them, computed by a model of transformers."""

from collections.abc import Sequence
from itertools import islice
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
    import torch

    # Together, since a GPU is waited for at each copy.
    wanted = [of_row[list(row.candidates)] for row, of_row in zip(rows, logits, strict=True)]
    values = iter(torch.cat(wanted).float().tolist())
    return [items.record(row, list(islice(values, len(row.candidates)))) for row in rows]
