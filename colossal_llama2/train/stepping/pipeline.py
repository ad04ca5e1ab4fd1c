"""One optimizer step through pipeline stages, each with some of the model's layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.batch import Batch
from colossal_llama2.model.documents import one_document_each

if TYPE_CHECKING:
    import torch

    from colossal_llama2.engine.engine import Engine
    from colossal_llama2.model.neftune import NoNoise


def regroup(batches: Sequence[Batch], size: int) -> list[Batch]:
    """The rows of all batches in order, `size` per batch, padded on the right to the longest of all."""
    import torch
    from torch.nn.functional import pad

    width = max(batch.input_ids.shape[1] for batch in batches)

    def joined(rows: Sequence["torch.Tensor"], values: Sequence[int]) -> Sequence["torch.Tensor"]:
        whole = [pad(part, (0, width - part.shape[1]), value=value) for part, value in zip(rows, values, strict=True)]
        return torch.cat(whole).split(size)

    # Padding is masked, so it may be any token.
    ids = joined([batch.input_ids for batch in batches], [int(batch.input_ids[0, -1]) for batch in batches])
    labels = joined([batch.labels for batch in batches], [IGNORE_INDEX] * len(batches))
    documents: Sequence[torch.Tensor | None] = [None] * len(ids)
    if any(batch.documents is not None for batch in batches):
        documents = joined([_documents_of(batch) for batch in batches], [0] * len(batches))
    lengths = torch.cat([batch.lengths for batch in batches]).split(size)
    return [_batch(*parts) for parts in zip(ids, labels, lengths, documents, strict=True)]


def _documents_of(batch: Batch) -> "torch.Tensor":
    if batch.documents is not None:
        return batch.documents
    return one_document_each(batch.lengths, batch.input_ids.shape[1])


def _batch(
    input_ids: "torch.Tensor", labels: "torch.Tensor", lengths: "torch.Tensor", documents: "torch.Tensor"
) -> Batch:
    mask = one_document_each(lengths, input_ids.shape[1])
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=None if bool(mask.all()) else mask,
        lengths=lengths,
        predicted=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        documents=documents,
    )


def pipeline_loss(engine: "Engine", batches: list[Batch], *, noise: "NoNoise", step: int, predicted: int) -> float:
    """Forward and backward of all micro batches of a step, regrouped into the smaller ones that stages pass on.

    All accumulated micro batches are in the pipeline together: the more there are, the less each stage waits.

    Args:
        predicted: labels that count, over all ranks and micro batches of the step.

    Returns:
        The loss of this rank's samples, weighted as in `train_step`, on every stage.
    """
    import torch

    parts = regroup(batches, engine.settings.microbatch_size)

    def more_inputs(index: int) -> dict[str, Any]:
        part = parts[index]
        noise.prepare(step=step, micro_step=index, lengths=part.lengths, documents=part.documents)
        return engine.attention_inputs(part)

    def criterion(outputs: Any, index: int) -> "torch.Tensor":
        if parts[index].predicted or outputs.logits is None:
            return outputs.loss * (parts[index].predicted * engine.data_size / predicted)
        # The mean over no tokens is NaN.
        return outputs.logits[:, :1, :1].float().sum() * 0.0

    inputs = {
        "input_ids": torch.cat([part.input_ids for part in parts]),
        "labels": torch.cat([part.labels for part in parts]),
    }
    return engine.run_pipeline(inputs, more_inputs=more_inputs, criterion=criterion)


def pipeline_tokens(engine: "Engine", batch: Batch) -> list[int]:
    """The most likely token after the last one of each row, on every stage. Called on all ranks, in `evaluating`."""
    import torch

    parts = regroup([batch], engine.settings.microbatch_size)
    # The last stage is asked for the microbatches in their order.
    forwards = iter(parts)

    def places() -> "torch.Tensor":
        return (next(forwards).lengths - 1).to(engine.device)

    with engine.choosing_next(places):
        chosen = _through_stages(engine, parts)
    ids = torch.zeros(len(batch.lengths), dtype=torch.long, device=engine.device) if chosen is None else chosen
    return engine.max_over_stages(ids).tolist()


def pipeline_logits(engine: "Engine", batch: Batch, candidates: "torch.Tensor") -> "torch.Tensor":
    """The logits of the (batch, candidates) ids that may follow each row, on every stage.

    Called on all ranks, in `evaluating`.
    """
    import torch

    size = engine.settings.microbatch_size
    parts = regroup([batch], size)
    forwards = zip(parts, candidates.split(size), strict=True)

    def asked() -> tuple["torch.Tensor", "torch.Tensor"]:
        part, ids = next(forwards)
        return (part.lengths - 1).to(engine.device), ids.to(engine.device)

    with engine.scoring_next(asked):
        found = _through_stages(engine, parts)
    if found is None:
        found = torch.full(tuple(candidates.shape), -torch.inf, device=engine.device)
    return engine.max_over_stages(found.float())


def _through_stages(engine: "Engine", parts: Sequence[Batch]) -> "torch.Tensor | None":
    """What the head of the last stage returns for all rows; None on the other stages."""
    import torch

    returned: list[torch.Tensor] = []

    def criterion(outputs: Any, _: int) -> "torch.Tensor":
        returned.append(outputs.logits)
        return torch.zeros((), device=engine.device)

    engine.run_pipeline(
        {"input_ids": torch.cat([part.input_ids for part in parts])},
        more_inputs=lambda index: engine.attention_inputs(parts[index]),
        criterion=criterion,
    )
    return torch.cat(returned) if returned else None
