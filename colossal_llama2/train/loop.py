"""The training loop: what one optimizer step is, and what happens between steps.

It depends neither on the command line nor on ColossalAI: `engine` splits the model, `loader` reads the data,
`checkpointer` decides when to save, `evaluator` when to evaluate, and `reporter` shows the figures.

A step consumes a number of samples, and most steps update the weights. There is no update, and neither Adam nor the
learning rate advances, if none of a step's tokens is trained (a zero gradient would still decay the weights and move
them by earlier gradients), or if the loss or the gradient norm is NaN/Inf. If fp16 gradients overflow, the step is
repeated on the same samples at half the loss scale, so that no sample is lost.
"""

import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from colossal_llama2 import logs
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.errors import Stopped
from colossal_llama2.train.stepping.nonfinite_steps import NonfiniteSteps
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.state import TrainState
from colossal_llama2.train.stepping.step import StepParts, step_totals, train_step
from colossal_llama2.train.stepping.stopping import log_stop

if TYPE_CHECKING:
    from colossal_llama2.train.checkpointing.checkpointer import Checkpointer
    from colossal_llama2.train.evaluation.evaluator import SilentEvaluator
    from colossal_llama2.train.stepping.silent_reporter import SilentReporter


@dataclass(frozen=True)
class RunParts(StepParts):
    """What a run is made of, besides its state.

    Attributes:
        schedule: the learning rate of each update, and the number of steps.
        nonfinite_steps: ends the run after too many steps with a NaN/Inf loss or gradient norm.
    """

    schedule: CosineSchedule
    checkpointer: "Checkpointer"
    reporter: "SilentReporter"
    evaluator: "SilentEvaluator"
    nonfinite_steps: NonfiniteSteps


def fit(state: TrainState, parts: RunParts, *, num_epochs: int) -> None:
    """Train from `state` to the end of the last epoch or of the schedule, updating `state` after each step.

    Raises:
        RunError: too many steps had a NaN/Inf loss or gradient norm, a checkpoint cannot be written, or the evaluation
            ends the run.
        Stopped: a signal came to a rank; what was trained is saved.
    """
    engine, schedule, loader, reporter = parts.engine, parts.schedule, parts.loader, parts.reporter
    checkpointer, evaluator = parts.checkpointer, parts.evaluator
    parts.stop.begin()
    is_over = state.step == schedule.total_steps
    evaluator.before_training(state, run_ends=is_over, save_now=checkpointer.save_now)
    if is_over:
        # The run only repeated the evaluation after its last step, which the checkpoint lacks.
        checkpointer.save_now(state)
    first_step = state.step
    while state.epoch < num_epochs and state.step < schedule.total_steps:
        steps_left = loader.order.steps_after(state.sample_start_index)
        _log_dropped(loader, state)
        start = time.monotonic()
        for batches, taken in reporter.timer.each("data", loader.steps(state.epoch, state.sample_start_index)):
            learning_rate = schedule.learning_rate(state.updates)
            engine.set_learning_rate(learning_rate)
            totals = step_totals(engine, batches, parts.stop)
            if totals.signal is not None:
                _stop(totals.signal, checkpointer, state, is_trained=state.step > first_step)
            result = train_step(engine, batches, totals, noise=parts.noise, step=state.step, timer=reporter.timer)
            parts.nonfinite_steps.check(result, state, loader.order, taken)
            state.count(result, taken)
            steps_left -= 1
            ends = steps_left == 0 or state.step == schedule.total_steps
            seconds = time.monotonic() - start
            reporter.step(state, totals, result, learning_rate=learning_rate, taken=taken, seconds=seconds)
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
    log_stop(number, save_seconds=checkpointer.pause_seconds)
    folder = checkpointer.save_now(state)
    raise Stopped(
        number, f"{number.name} after step {state.step}, which is saved; continue with --load_checkpoint {folder}"
    )


def _log_dropped(loader: StepLoader, state: TrainState) -> None:
    dropped = loader.order.dropped_after(state.sample_start_index)
    if dropped:
        logs.get_logger().info(
            "epoch %d: %d of %d samples are left over, too few for a micro batch on every rank",
            state.epoch,
            dropped,
            loader.order.num_samples,
        )
