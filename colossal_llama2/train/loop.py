"""The training loop: what one optimizer step is, and what happens between steps.

It knows neither the command line nor ColossalAI: `engine` splits the model, `loader` reads the data, `checkpointer`
decides when to save, `metrics` shows the figures.

A step is a number of samples, and most steps update the weights. No update is made, and neither Adam nor the learning
rate advances, where none of a step's tokens is trained (a zero gradient would still decay the weights and move them by
earlier gradients), and where loss or gradient norm is not finite. Where fp16 gradients overflow, the step is repeated
on the same samples at half the loss scale, so that no sample is lost.
"""

import math
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

from colossal_llama2 import json_input, logs
from colossal_llama2.dataset.loader import Batch, StepLoader
from colossal_llama2.errors import Stopped
from colossal_llama2.train.bad_steps import BadSteps
from colossal_llama2.train.pipeline import pipeline_loss
from colossal_llama2.train.schedule import CosineSchedule
from colossal_llama2.train.step_timer import NoTimer
from colossal_llama2.train.stopping import NoSignals, agreed_signal, tell_stop

if TYPE_CHECKING:
    from colossal_llama2.model.neftune import NoNoise
    from colossal_llama2.train.checkpoint import Checkpointer
    from colossal_llama2.train.engine.booster import Engine
    from colossal_llama2.train.evaluation import SilentEvaluator
    from colossal_llama2.train.reporting import SilentReporter

NO_TIMER = NoTimer()
COUNTED_LATER = ("untrained_steps", "bad_steps", "overflows")


@dataclass
class TrainState:
    """Where a run is. Saved and restored whole; all counts are over all ranks.

    Attributes:
        epoch: passes over the data that are complete.
        step: steps since the first epoch began, those without an update included.
        sample_start_index: samples of the current epoch that are consumed.
        samples_seen: samples consumed since the first epoch began.
        tokens_seen: tokens consumed since the first epoch began, padding not counted.
        untrained_steps: steps without an update, since they had no trained token.
        bad_steps: steps without an update, since loss or gradient norm was not finite.
        overflows: passes over a step's samples that were repeated, since fp16 gradients overflowed.
    """

    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    untrained_steps: int = 0
    bad_steps: int = 0
    overflows: int = 0

    @property
    def updates(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.untrained_steps - self.bad_steps

    def count(self, result: "StepResult", taken: int) -> None:
        """Add a step that took so many samples, over all ranks."""
        self.step += 1
        self.sample_start_index += taken
        self.samples_seen += taken
        self.tokens_seen += result.tokens
        self.untrained_steps += result.is_untrained
        self.bad_steps += result.problem is not None
        self.overflows += result.overflows

    def to_dict(self) -> dict[str, int]:
        """The fields by name, as running_states.json holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The state of a running_states.json. Raises KeyError or ValueError if a field is missing or impossible."""
        # Checkpoints of earlier versions lack what was not counted then.
        values = {**dict.fromkeys(COUNTED_LATER, 0), **values}
        state = cls(**{field.name: json_input.whole_number(values, field.name) for field in fields(cls)})
        if state.updates < 0:
            without = state.untrained_steps + state.bad_steps
            raise ValueError(f"{without} steps made no update (untrained_steps, bad_steps), but step is {state.step}")
        return state


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know when a step begins, by one reduction.

    Attributes:
        predicted: tokens that count in the step's loss.
        tokens: consumed by the step, padding not counted.
        places: of the step, padding counted.
        untrained_micro_batches: of the step, those without a token that counts in the loss.
        signal: that came to a rank before now, None if none did.
    """

    predicted: int
    tokens: int
    places: int
    untrained_micro_batches: int
    signal: signal.Signals | None


@dataclass(frozen=True)
class StepResult:
    """What one step gave. No update was made if it is untrained or has a problem.

    Attributes:
        loss: mean over the predicted tokens of all ranks and micro batches, in nats; None if there are none.
        grad_norm: before clipping; None if there are no predicted tokens, or if fp16 overflowed at every loss scale.
        tokens: consumed by all ranks, padding not counted.
        by_group: what `LossTally.take` gave, summed over all ranks; empty if there is none.
        overflows: passes before the last one, in which fp16 gradients overflowed.
        loss_scale: of fp16, in the last pass; None in other precisions.
    """

    loss: float | None
    grad_norm: float | None
    tokens: int
    by_group: Sequence[float] = ()
    overflows: int = 0
    loss_scale: float | None = None

    @property
    def is_untrained(self) -> bool:
        """True if the step had no predicted token."""
        return self.loss is None

    @property
    def problem(self) -> str | None:
        """Which of the figures is not finite, None if all that there are are finite."""
        if self.is_untrained:
            return None
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        if self.grad_norm is None:
            return f"gradient norm is not finite, even at a loss scale of {self.loss_scale:,.0f},"
        return None if math.isfinite(self.grad_norm) else f"gradient norm is {self.grad_norm}"


def step_totals(engine: "Engine", batches: list[Batch], stop: NoSignals) -> StepTotals:
    """Add up this rank's micro batches and signals with those of all ranks."""
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

    Each micro batch weighs by its number of predicted tokens, so that the gradient is that of the mean over all tokens
    of the step, however they are split over micro batches and ranks.

    Where fp16 gradients overflow, the same micro batches are passed again at half the loss scale. That of the pass that
    succeeds stays. If none does, down to a scale of 1, or the loss is not finite, the scale was not the cause, and is
    what it was before the step. All ranks know the same loss and overflow, and so pass equally often.
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
        The step's mean loss, and what `LossTally.take` gave; summed over all ranks.
    """
    predicted = max(totals.predicted, 1)
    if engine.is_pipelined:
        with timer.part("forward and backward"):
            loss_sum = pipeline_loss(engine, batches, noise=noise, step=step, predicted=predicted)
    else:
        loss_sum = accumulated_loss(engine, batches, noise=noise, step=step, predicted=predicted, timer=timer)
    # What is tallied comes with the loss, for which the host waits in any case.
    own = float(loss_sum) / engine.data_size
    loss, *by_group = engine.sum_over_data([own, *engine.loss_tally.take(batches)])
    return loss, by_group


def accumulated_loss(
    engine: "Engine", batches: list[Batch], *, noise: "NoNoise", step: int, predicted: int, timer: NoTimer
):
    """Forward and backward of one micro batch after the other; returns the sum of their losses on this rank."""
    loss_sum = 0.0
    for micro_step, batch in enumerate(batches):
        noise.prepare(step=step, micro_step=micro_step, lengths=batch.lengths, documents=batch.documents)
        # The engine averages gradients over ranks; data_size undoes that, for the sum over ranks is wanted.
        weight = batch.predicted * engine.data_size / predicted
        with engine.micro_batch(last=micro_step == len(batches) - 1):
            with timer.part("forward"):
                loss = weighted_loss(engine, batch, weight)
            with timer.part("backward"):
                engine.backward(loss)
        loss_sum = loss_sum + loss.detach().float()
    return loss_sum


def weighted_loss(engine: "Engine", batch: Batch, weight: float):
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
    # The mean over no token is NaN; a loss of zero that depends on the weights keeps the ranks' collectives in step.
    return outputs.logits[:, :1, :1].float().sum() * 0.0


def fit(
    state: TrainState,
    *,
    num_epochs: int,
    engine: "Engine",
    loader: StepLoader,
    schedule: CosineSchedule,
    noise: "NoNoise",
    checkpointer: "Checkpointer",
    metrics: "SilentReporter",
    stop: NoSignals,
    bad_steps: BadSteps,
    evaluator: "SilentEvaluator",
) -> None:
    """Train from `state` to the end of the last epoch or of the schedule, updating `state` as it goes.

    Raises:
        RunError: too many steps gave no numbers, a checkpoint cannot be written, or the evaluation ends the run.
        Stopped: a signal came to a rank; what was trained is saved.
    """
    stop.begin()
    is_over = state.step == schedule.total_steps
    evaluator.before_training(state, run_ends=is_over, save_now=checkpointer.save_now)
    if is_over:
        # It made up for the evaluation after its last step, which the checkpoint lacks.
        checkpointer.save_now(state)
    first_step = state.step
    while state.epoch < num_epochs and state.step < schedule.total_steps:
        steps_left = loader.order.steps_after(state.sample_start_index)
        _tell_dropped(loader, state)
        start = time.monotonic()
        for batches, taken in metrics.timer.each("data", loader.steps(state.epoch, state.sample_start_index)):
            learning_rate = schedule.learning_rate(state.updates)
            engine.set_learning_rate(learning_rate)
            totals = step_totals(engine, batches, stop)
            if totals.signal is not None:
                _stop(totals.signal, checkpointer, state, is_trained=state.step > first_step)
            result = train_step(engine, batches, totals, noise=noise, step=state.step, timer=metrics.timer)
            bad_steps.check(result, state, loader.order, taken)
            state.count(result, taken)
            steps_left -= 1
            ends = steps_left == 0 or state.step == schedule.total_steps
            seconds = time.monotonic() - start
            metrics.step(state, totals, result, learning_rate=learning_rate, taken=taken, seconds=seconds)
            evaluator.after_step(
                state, epoch_ends=ends, run_ends=state.step == schedule.total_steps, save_now=checkpointer.save_now
            )
            checkpointer.save(state, epoch_ends=ends)
            if ends:
                break
            start = time.monotonic()
        state.epoch += 1
        state.sample_start_index = 0


def _stop(number: signal.Signals, checkpointer: "Checkpointer", state: TrainState, *, is_trained: bool) -> NoReturn:
    if not is_trained:
        raise Stopped(number, f"{number.name} came before the first step; nothing was trained")
    tell_stop(number, save_seconds=checkpointer.pause_seconds)
    folder = checkpointer.save_now(state)
    raise Stopped(
        number, f"{number.name} after step {state.step}, which is saved; go on with --load_checkpoint {folder}"
    )


def _tell_dropped(loader: StepLoader, state: TrainState) -> None:
    dropped = loader.order.dropped_after(state.sample_start_index)
    if dropped:
        logs.get_logger().info(
            "epoch %d: %d of %d samples are left over, too few for a micro batch on every rank",
            state.epoch,
            dropped,
            loader.order.num_samples,
        )
