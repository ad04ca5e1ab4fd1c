"""One optimizer step: forward and backward over the micro batches, then one update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama2 import logs
from colossal_llama2.dataset.read.batch import Batch
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.train.stepping.pipeline import pipeline_loss
from colossal_llama2.train.stepping.state import StepResult, StepTotals
from colossal_llama2.train.stepping.step_timer import NoTimer
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    import torch

    from colossal_llama2.engine.engine import Engine
    from colossal_llama2.model.neftune import NoNoise

NO_TIMER = NoTimer()


@dataclass(frozen=True)
class StepParts:
    """What steps are made with: a model with its weights, and batches.

    Attributes:
        noise: NEFTune's, if it is on.
        stop: the signals that end the run.
    """

    engine: "Engine"
    loader: StepLoader
    noise: "NoNoise"
    stop: NoSignals


def step_totals(engine: "Engine", batches: list[Batch], stop: NoSignals) -> StepTotals:
    """Sum the micro batches and signals of all ranks."""
    counts = [sum(batch.predicted for batch in batches), sum(batch.tokens for batch in batches)]
    counts.append(sum(batch.input_ids.numel() for batch in batches))
    counts.append(sum(batch.predicted == 0 for batch in batches))
    sums = engine.sum_over_data([*counts, *stop.received()], known_to_host=True)
    predicted, tokens, places, untrained = map(int, sums[: len(counts)])
    return StepTotals(predicted, tokens, places, untrained, signal=agreed_signal(sums[len(counts) :]))


def train_step(
    engine: "Engine",
    batches: list[Batch],
    totals: StepTotals,
    *,
    noise: "NoNoise",
    step: int,
    timer: NoTimer = NO_TIMER,
) -> StepResult:
    """Forward and backward over this rank's micro batches, then one update.

    Each micro batch is weighted by its number of predicted tokens, so that the gradient is that of the mean over all
    tokens of the step, however they are split over micro batches and ranks.

    If fp16 gradients overflow, the pass over the same micro batches is repeated at half the loss scale. The scale of
    the successful pass is kept. If no scale down to 1 helps, or the loss is NaN/Inf, the scale was not the cause, and
    it is reset to its value before the step. Loss and overflow are equal on all ranks, so all ranks repeat the pass.
    """
    scaler_before = engine.remember_loss_scale()
    overflows = 0
    while True:
        loss, by_group = summed_pass(engine, batches, totals, noise=noise, step=step, timer=timer)
        is_untrained = totals.predicted == 0
        with timer.part("optimizer"):
            grad_norm = engine.step(update=math.isfinite(loss) and not is_untrained)
        is_lowered = grad_norm is None and engine.next_loss_scale < engine.used_loss_scale
        if not is_lowered or not math.isfinite(loss):
            break
        overflows += 1
        logs.get_logger().info(
            "step %d: gradients overflowed fp16 at a loss scale of %s; the step is repeated at %s",
            step + 1,
            f"{engine.used_loss_scale:,.0f}",
            f"{engine.next_loss_scale:,.0f}",
        )
    result = StepResult(
        loss=None if is_untrained else loss,
        grad_norm=None if is_untrained else grad_norm,
        tokens=totals.tokens,
        by_group=by_group,
        overflows=overflows,
        loss_scale=None if scaler_before is None else engine.used_loss_scale,
    )
    if result.is_untrained or result.problem is not None:
        engine.put_back_loss_scale(scaler_before)
    return result


def summed_pass(
    engine: "Engine", batches: list[Batch], totals: StepTotals, *, noise: "NoNoise", step: int, timer: NoTimer
) -> tuple[float, list[float]]:
    """Forward and backward once over this rank's micro batches.

    Returns:
        The step's mean loss over all ranks, and the sums of `LossTally.take` over all ranks.
    """
    predicted = max(totals.predicted, 1)
    if engine.is_pipelined:
        with timer.part("forward and backward"):
            loss_sum = pipeline_loss(engine, batches, noise=noise, step=step, predicted=predicted)
    else:
        loss_sum = accumulated_loss(engine, batches, noise=noise, step=step, predicted=predicted, timer=timer)
    # The tallies are reduced together with the loss, for which the host waits in any case.
    return global_mean(engine, float(loss_sum), sums=engine.loss_tally.take(batches))


def global_mean(engine: "Engine", value: float, *, sums: Sequence[float] = ()) -> tuple[float, list[float]]:
    """The mean of a value over the data-parallel ranks, and the sums of others, by one reduction."""
    mean, *totals = engine.sum_over_data([value / engine.data_size, *sums])
    return mean, totals


def accumulated_loss(
    engine: "Engine", batches: list[Batch], *, noise: "NoNoise", step: int, predicted: int, timer: NoTimer
) -> "torch.Tensor | float":
    """Forward and backward of each micro batch in turn; returns the sum of their weighted losses on this rank."""
    loss_sum = 0.0
    for micro_step, batch in enumerate(batches):
        noise.prepare(step=step, micro_step=micro_step, lengths=batch.lengths, documents=batch.documents)
        # The engine averages gradients over ranks; the factor data_size turns that into their sum.
        weight = batch.predicted * engine.data_size / predicted
        with engine.micro_batch(last=micro_step == len(batches) - 1):
            with timer.part("forward"):
                loss = weighted_loss(engine, batch, weight)
            with timer.part("backward"):
                engine.backward(loss)
        loss_sum = loss_sum + loss.detach().float()
    return loss_sum


def weighted_loss(engine: "Engine", batch: Batch, weight: float) -> "torch.Tensor":
    """The model's mean loss over the batch's predicted tokens, times `weight`."""
    engine.loss_tally.expect(batch.groups)
    outputs = engine.model(
        input_ids=batch.input_ids.to(engine.device, non_blocking=True),
        labels=batch.labels.to(engine.device, non_blocking=True),
        use_cache=False,
        **engine.attention_inputs(batch),
    )
    if batch.predicted or outputs.logits is None:
        return outputs.loss * weight
    # The mean over no tokens is NaN. A zero loss that depends on the weights makes this rank join all collectives.
    return outputs.logits[:, :1, :1].float().sum() * 0.0
