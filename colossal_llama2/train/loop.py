"""The training loop: what one optimizer step is, and what happens between steps.

It knows neither the command line nor ColossalAI: `engine` splits the model, `loader` reads the data, `checkpointer`
decides when to save, `metrics` shows the figures.

A step is a number of samples, and most steps update the weights. No update is made, and neither Adam nor the learning
rate advances, where none of a step's tokens is trained (a zero gradient would still decay the weights and move them by
earlier gradients), and where loss or gradient norm is not finite. Where fp16 gradients overflow, the step is repeated
on the same samples at half the loss scale, so that no sample is lost.
"""

import signal
import time
from typing import TYPE_CHECKING, NoReturn

from colossal_llama2 import logs
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.errors import Stopped
from colossal_llama2.train.stepping.nonfinite_steps import BadSteps
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.state import TrainState
from colossal_llama2.train.stepping.step import step_totals, train_step
from colossal_llama2.train.stepping.stopping import NoSignals, tell_stop

if TYPE_CHECKING:
    from colossal_llama2.engine.engine import Engine
    from colossal_llama2.model.neftune import NoNoise
    from colossal_llama2.train.checkpointing.checkpointer import Checkpointer
    from colossal_llama2.train.evaluation.evaluator import SilentEvaluator
    from colossal_llama2.train.stepping.silent_reporter import SilentReporter


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
