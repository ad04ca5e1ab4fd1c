"""--dry_run: all checks of a run before its first step, its plan, its memory and its disk space, and no step.

It needs neither a process group nor a GPU, reads no weights and writes nothing, so a laptop can check a cluster's run.
"""

from colossal_llama2 import logs
from colossal_llama2.model.loading import model_without_weights
from colossal_llama2.terminal_text import show, show_line
from colossal_llama2.train.checkpointing.checkpoint_writer import checkpoint_bytes
from colossal_llama2.train.checks import DryRunChecks
from colossal_llama2.train.forecast import data_plan
from colossal_llama2.train.forecast.disk_space import disk_lines, saved_steps
from colossal_llama2.train.forecast.memory_report import memory_lines
from colossal_llama2.train.inputs import RunInputs, open_inputs
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.settings.from_flags import Problems


def dry_run(config: TrainConfig, problems: Problems) -> None:
    """Check everything that the settings name, and print what the run would do.

    Args:
        problems: those of the flags, see `resolve_with_problems`.

    Raises:
        UserError: with everything that is wrong.
    """
    inputs = open_inputs(config, DryRunChecks(problems))
    if not logs.is_first_rank():
        return
    if inputs.schedule.total_steps == inputs.start.state.step:
        end = config.source.checkpoint
        show_line(f"dry run: {end} is the end of its run, which would run no step; nothing was written")
        return
    content = data_plan.build_plan(
        config.data.parts,
        inputs.data.measured,
        inputs.order,
        num_epochs=config.recipe.num_epochs,
        schedule=inputs.schedule,
        state=inputs.start.state,
    )
    run_metadata.log_sizes(config, inputs.ranks, inputs.model)
    run_metadata.log_steps(config, inputs.ranks, inputs.order, inputs.schedule)
    for line in data_plan.plan_lines(content):
        logs.get_logger().info("%s", line)
    llama_config = model_without_weights(config.source.weights_folder).config
    show(memory_lines(config, llama_config, has_documents=inputs.has_documents))
    show(_disk_lines(config, inputs))
    show_line("dry run: nothing was trained, nothing was written")


def _disk_lines(config: TrainConfig, inputs: RunInputs) -> str:
    steps = saved_steps(
        inputs.order,
        inputs.start.state,
        config.recipe.num_epochs,
        config.saving.interval,
        total_steps=inputs.schedule.total_steps,
        skip_epochs=config.saving.skip_epoch_ends,
    )
    return disk_lines(config.saving, checkpoint_bytes(inputs.model, config.engine), steps)
