"""One optimizer step through the stages of a pipeline, each of which holds some layers of the model."""

from typing import TYPE_CHECKING, List, Sequence

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.loader import Batch

if TYPE_CHECKING:
    from colossal_llama2.model.neftune import NoNoise
    from colossal_llama2.train.engine.booster import Engine


def join(batches: Sequence[Batch]) -> Batch:
    """The rows of all batches, one below the other, padded on the right to the longest."""
    import torch
    from torch.nn.functional import pad

    lengths = torch.cat([batch.lengths for batch in batches])
    width = max(batch.input_ids.shape[1] for batch in batches)

    def widened(rows, value: int):
        return pad(rows, (0, width - rows.shape[1]), value=value)

    mask = torch.arange(width) < lengths[:, None]
    return Batch(
        input_ids=torch.cat([widened(batch.input_ids, int(batch.input_ids[0, -1])) for batch in batches]),
        labels=torch.cat([widened(batch.labels, IGNORE_INDEX) for batch in batches]),
        attention_mask=None if bool(mask.all()) else mask.long(),
        lengths=lengths,
        predicted=sum(batch.predicted for batch in batches),
    )


def pipeline_loss(engine: "Engine", batches: List[Batch], *, noise: "NoNoise", step: int, predicted: int) -> float:
    """Forward and backward of all micro batches of a step, cut into the smaller ones that the stages pass on.

    Accumulated micro batches go through together: the more there are on the way, the less a stage waits.

    Args:
        predicted: labels that count, over all ranks and micro batches of the step.

    Returns:
        The loss of this rank's samples, weighed as in `train_step`; known on every stage.
    """
    whole = join(batches)
    counts = predicted_counts(whole.labels, engine.settings.microbatch_size)
    row_lengths = whole.lengths.split(engine.settings.microbatch_size)

    def before_forward(index: int) -> None:
        noise.prepare(step=step, micro_step=index, lengths=row_lengths[index])

    def criterion(outputs, index: int):
        # The mean over no token is NaN.
        if not counts[index]:
            return outputs.logits[:, :1, :1].float().sum() * 0.0
        return outputs.loss * (counts[index] * engine.data_size / predicted)

    inputs = {"input_ids": whole.input_ids, "labels": whole.labels}
    if whole.attention_mask is not None:
        inputs["attention_mask"] = whole.attention_mask
    return engine.run_pipeline(inputs, before_forward=before_forward, criterion=criterion)


def predicted_counts(labels, size: int) -> List[int]:
    """Labels that count in the loss, for each `size` rows of (batch, length) labels."""
    counted = (labels[:, 1:] != IGNORE_INDEX).sum(1)
    return [int(rows.sum()) for rows in counted.split(size)]
