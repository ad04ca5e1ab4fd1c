"""Score items by the logits of what follows them, computed by a model of transformers."""

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from colossal_llama2.evaluation.task import LogitItems, Row
from colossal_llama2.inference.prompt_batch import cache_argument

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from colossal_llama2.inference.prompt_batch import SharedStates


def records_by_logits(
    model: "LlamaForCausalLM", items: LogitItems, rows: Sequence[Row], shared: "SharedStates | None"
) -> list[dict[str, Any]]:
    """The fields of the records of some rows, see `PreparedTask.compute`."""
    ids = [row.ids for row in rows]
    return records_of_logits(items, rows, next_logits(model, ids, shared))


def next_logits(
    model: "LlamaForCausalLM", rows: Sequence[Sequence[int]], shared: "SharedStates | None" = None
) -> "torch.Tensor":
    """(rows, vocabulary): of what follows each row, without states to continue them.

    Padding behind a row is not seen by it, so no mask of it is needed, without which attention is faster.

    Args:
        shared: states of what all rows begin with; each row is longer.
    """
    import torch

    before = 0 if shared is None else len(shared.ids)
    states: dict[str, Any] = {"use_cache": shared is not None}
    if shared is not None:
        states[cache_argument(model.model)] = shared.for_rows(len(rows))
    lengths = torch.tensor([len(row) - before for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row[before:]) for row in rows], batch_first=True)
    with torch.inference_mode():
        hidden = model.model(input_ids=padded.to(model.device), **states).last_hidden_state
        last = hidden[torch.arange(len(rows), device=hidden.device), (lengths - 1).to(hidden.device)]
        return model.get_output_embeddings()(last)


def records_of_logits(items: LogitItems, rows: Sequence[Row], logits: "torch.Tensor") -> list[dict[str, Any]]:
    """The same from the (rows, vocabulary) logits of what follows."""
    import torch

    # Together, since a GPU is waited for at each copy.
    wanted = [of_row[list(row.candidates)] for row, of_row in zip(rows, logits, strict=True)]
    values = iter(torch.cat(wanted).float().tolist())
    return [items.record(row, list(islice(values, len(row.candidates)))) for row in rows]
