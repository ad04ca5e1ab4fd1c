"""The training loop: what one optimizer step is, and what happens between steps.

It knows neither the command line nor ColossalAI: `engine` splits the model, `loader` reads the data, `checkpointer`
decides when to save, `metrics` shows the figures.
"""

import math
import signal
import time
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Dict, List, NoReturn, Optional, Sequence

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


@dataclass
class TrainState:
    """Where a run is. Saved and restored whole; all counts are over all ranks.

    Attributes:
        epoch: passes over the data that are complete.
        step: optimizer steps taken since the first epoch began.
        sample_start_index: samples of the current epoch that are consumed.
        samples_seen: samples consumed since the first epoch began.
        tokens_seen: tokens consumed since the first epoch began, padding not counted.
    """

    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0

    def to_dict(self) -> Dict[str, int]:
        """The fields by name, as running_states.json holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "TrainState":
        """The state of a running_states.json. Raises KeyError or ValueError if a field is missing or no such count."""
        return cls(**{field.name: json_input.whole_number(values, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know when a step begins, by one reduction.

    Attributes:
        predicted: tokens that count in the step's loss.
        tokens: consumed by the step, padding not counted.
        places: of the step, padding counted.
        signal: that came to a rank before now, None if none did.
    """

    predicted: int
    tokens: int
    places: int
    signal: Optional[signal.Signals]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave. No update was made if a figure is no number.

    Attributes:
        loss: mean over the predicted tokens of all ranks and micro batches, in nats.
        grad_norm: before clipping; None if fp16 overflowed and no update was made.
        tokens: consumed by all ranks, padding not counted.
        by_group: what `LossTally.take` gave, summed over all ranks; empty if there is none.
    """

    loss: float
    grad_norm: Optional[float]
    tokens: int
    by_group: Sequence[float] = ()

    @property
    def problem(self) -> Optional[str]:
        """Which of the figures is no number, None if both are numbers. An overflow of fp16 is no problem."""
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            if value is not None and not math.isfinite(value):
                return f"{name} is {value}"
        return None


def step_totals(engine: "Engine", batches: List[Batch], stop: NoSignals) -> StepTotals:
    """Add up this rank's micro batches and signals with those of all ranks."""
    counts = [sum(batch.predicted for batch in batches), sum(batch.tokens for batch in batches)]
    counts.append(sum(batch.input_ids.numel() for batch in batches))
    predicted, tokens, places, *signals = engine.sum_over_data([*counts, *stop.received()], known_to_host=True)
    number = agreed_signal(signals)
    return StepTotals(predicted=int(predicted), tokens=int(tokens), places=int(places), signal=number)


def train_step(
    engine: "Engine",
    batches: List[Batch],
    totals: StepTotals,
    *,
    noise: "NoNoise",
    step: int,
    timer: NoTimer = NO_TIMER,
) -> StepResult:
    """Forward and backward over this rank's micro batches, then one update.

    Each micro batch weighs by its number of predicted tokens, so that the gradient is that of the mean over all tokens
    of the step, however they are split over micro batches and ranks.
    """
    predicted = max(totals.predicted, 1)
    if engine.is_pipelined:
        with timer.part("forward and backward"):
            loss_sum = pipeline_loss(engine, batches, noise=noise, step=step, predicted=predicted)
    else:
        loss_sum = accumulated_loss(engine, batches, noise=noise, step=step, predicted=predicted, timer=timer)
    # What is tallied comes with the loss, for which the host waits in any case.
    loss = float(loss_sum) / engine.data_size
    loss_total, *by_group = engine.sum_over_data([loss, *engine.loss_tally.take(batches)])
    with timer.part("optimizer"):
        grad_norm = engine.step(update=math.isfinite(loss_total))
    return StepResult(loss=loss_total, grad_norm=grad_norm, tokens=totals.tokens, by_group=by_group)


def accumulated_loss(
    engine: "Engine", batches: List[Batch], *, noise: "NoNoise", step: int, predicted: int, timer: NoTimer
):
    """Forward and backward of one micro batch after the other; returns the sum of their losses on this rank."""
    loss_sum = 0.0
    for micro_step, batch in enumerate(batches):
        noise.prepare(step=step, micro_step=micro_step, lengths=batch.lengths)
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
            learning_rate = schedule.learning_rate(state.step)
            engine.set_learning_rate(learning_rate)
            totals = step_totals(engine, batches, stop)
            if totals.signal is not None:
                _stop(totals.signal, checkpointer, state, is_trained=state.step > first_step)
            result = train_step(engine, batches, totals, noise=noise, step=state.step, timer=metrics.timer)
            bad_steps.check(result, state, loader.order, taken)
            state.step += 1
            state.sample_start_index += taken
            state.samples_seen += taken
            state.tokens_seen += result.tokens
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
            state.epoch, dropped, loader.order.num_samples,
        )  # fmt: skip
