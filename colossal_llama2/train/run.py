"""One training run, from its settings to the final model: read the inputs, build the parts, train, publish."""

import contextlib
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.engine.process_group import launch, leave
from colossal_llama2.engine.ranks.liveness import Watch
from colossal_llama2.errors import Stopped
from colossal_llama2.plurals import counted
from colossal_llama2.train.benchmark import benchmark
from colossal_llama2.train.build_run import build_run, make_record
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checks import JobChecks
from colossal_llama2.train.inputs import RunInputs, open_inputs
from colossal_llama2.train.loop import RunParts, fit
from colossal_llama2.train.report.stage_record import StageRecord
from colossal_llama2.train.same_everywhere import check_same_everywhere
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.settings.from_flags import resolved_again
from colossal_llama2.train.stepping.nonfinite_steps import log_overflows, without_update
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal


def train_on_all(config: TrainConfig, stop: NoSignals, watch: Watch) -> None:
    """Meet the other ranks, then train or measure. Called on all ranks, by start.py."""
    with contextlib.ExitStack() as around:
        if logs.is_first_rank() and config.benchmark is None:
            around.enter_context(config.saving.folder.locked())
            config = resolved_again(config)
        watch.reach_out()
        launch(config.recipe.seed, timeout_seconds=config.timeout_seconds, meet=watch.wait)
        stop.meet()
        watch.settle()
        config = resuming.with_first_ranks_source(config)
        check_same_everywhere(config)
        if config.benchmark is not None:
            benchmark(config, config.benchmark, stop)
        else:
            run(config, stop)
        leave()


def run(config: TrainConfig, stop: NoSignals | None = None) -> None:
    """Train inside a process group, which stays open. Called on all ranks.

    Raises:
        UserError: something that the settings name cannot be used; found before the first step.
        RunError: too many steps with a NaN/Inf loss, or a checkpoint cannot be written.
        Stopped: a signal came; what was trained is saved.
    """
    stop = stop or NoSignals()
    config = resuming.settle(config)
    inputs = open_inputs(config, JobChecks())
    record = make_record(config, inputs)
    if resuming.is_done(config, inputs.start, inputs.order):
        _finish_again(config, inputs, record)
        return
    with build_run(config, inputs, record, stop) as parts:
        fit(inputs.start.state, parts, num_epochs=config.recipe.num_epochs)
    final = parts.checkpointer.finish(card=record.card)
    _log_end(config, inputs, parts, final)


def _finish_again(config: TrainConfig, inputs: RunInputs, record: StageRecord) -> None:
    """The end of a run that died after its last save."""
    saved = inputs.start.resumed
    assert saved is not None, "only a run that resumes can be done"
    config.saving.folder.prepare()
    if inputs.engine.rank == 0:
        record.report.write_files()
    resuming.finish_again(saved, inputs.engine, config.saving, card=record.card)


def _log_end(config: TrainConfig, inputs: RunInputs, parts: RunParts, final: Path) -> None:
    """Log the end of the run. Raises Stopped if a signal came during the last step."""
    state = inputs.start.state
    number = agreed_signal(parts.engine.sum_over_data(parts.stop.received()))
    if number is not None:
        raise Stopped(number, f"{number.name} after step {state.step}, which is the last; the model is in {final}")
    unread = config.recipe.num_epochs * inputs.order.num_samples - inputs.facts.first_sample - state.samples_seen
    log_overflows(state)
    logs.get_logger().info(
        "Done: %s%s, %s; unread samples: %s. The model is in %s",
        counted(state.step, "step"),
        without_update(state),
        counted(state.tokens_seen, "token"),
        f"{unread:,}",
        final,
    )
