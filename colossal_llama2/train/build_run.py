"""Build the parts of a run from its inputs: everything that the training loop uses, with the weights loaded.

The self-test builds its runs here too, and `build_steps`, which loads the weights, is also for --benchmark.
"""

import contextlib
from collections.abc import Iterator

from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.train.checkpointing.checkpoint_writer import CheckpointContent, CheckpointWriter, checkpoint_bytes
from colossal_llama2.train.checkpointing.checkpointer import Checkpointer
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory
from colossal_llama2.train.checkpointing.new_rows_report import NewRowsReport
from colossal_llama2.train.checkpointing.small_files import files_of_adapter
from colossal_llama2.train.evaluation.evaluation_setup import make_evaluator, read_history
from colossal_llama2.train.forecast import data_plan
from colossal_llama2.train.inputs import JobInputs, RunInputs
from colossal_llama2.train.load_weights import attention_of, embedding_noise_of, load_weights, restore
from colossal_llama2.train.loop import RunParts
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.report.reporter import loss_groups, reporting
from colossal_llama2.train.report.run_report import RunReport, amounts_of_all, environment
from colossal_llama2.train.report.stage_record import Beginning, StageRecord, begin_stage
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.settings.collating import make_collator
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.stepping.nonfinite_steps import NonfiniteSteps
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.step import StepParts
from colossal_llama2.train.stepping.stopping import NoSignals


@contextlib.contextmanager
def build_steps(
    config: TrainConfig, inputs: JobInputs, loader: StepLoader, stop: NoSignals, *, attention: str
) -> Iterator[StepParts]:
    """Load the weights into the engine. Called on all ranks."""
    load_weights(config, inputs.engine, inputs.model, attention=attention)
    with embedding_noise_of(config, inputs.engine) as noise:
        yield StepParts(inputs.engine, loader, noise, stop)


@contextlib.contextmanager
def build_run(
    config: TrainConfig, inputs: RunInputs, record: StageRecord, stop: NoSignals, *, reports: bool = True
) -> Iterator[RunParts]:
    """The parts of a run, ready for its first step. Called on all ranks.

    Whatever can fail is tried before the weights are read, which takes longest. At the end of the context the reports
    of the run are written, also after an error.

    Args:
        reports: False leaves out the reports of the steps, as the benchmark of their cost does.

    Raises:
        UserError, RunError: on all ranks; nothing was trained.
    """
    engine, attention = inputs.engine, attention_of(config)
    with collectives.all_or_none():
        groups = loss_groups(record.report.amounts, engine.loss_tally) if reports else None
        collator = make_collator(config, groups)
        history = read_history(config, inputs.start)
    loader = StepLoader(inputs.data.samples, inputs.order, collator, engine.data_rank, pins=engine.pins_batches)
    config.saving.folder.prepare()
    writer = _make_writer(config, inputs, record, history)
    writer.rehearse(inputs.start.state)
    _log_beginning(config, inputs, record.report)
    with contextlib.ExitStack() as opened:
        steps = opened.enter_context(build_steps(config, inputs, loader, stop, attention=attention))
        if inputs.start.resumed is not None:
            restore(inputs.start.resumed, engine, inputs.facts)
        reporter = opened.enter_context(_reporting(config, inputs, record.report)) if reports else SilentReporter()
        total_steps = inputs.schedule.total_steps
        yield RunParts(
            **vars(steps),
            schedule=inputs.schedule,
            checkpointer=Checkpointer(engine, writer, config.saving, total_steps=total_steps, reporter=reporter),
            reporter=reporter,
            evaluator=make_evaluator(
                config,
                engine,
                inputs.data.eval_sets,
                inputs.data.eval_tasks,
                inputs.data.eval_prompts,
                history,
                eval_pending=inputs.start.eval_pending,
                reporter=reporter,
                stop=stop,
            ),
            nonfinite_steps=NonfiniteSteps(config.recipe.max_nonfinite_steps),
        )


def _reporting(
    config: TrainConfig, inputs: RunInputs, report: RunReport
) -> contextlib.AbstractContextManager[SilentReporter]:
    return reporting(
        engine=inputs.engine,
        state=inputs.start.state,
        report=report,
        source=config.source,
        order=inputs.order,
        parameters=inputs.model.parameters,
        settings=config.reporting,
    )


def make_record(config: TrainConfig, inputs: RunInputs) -> StageRecord:
    """What the run reports at its end, and records in its models. Called on all ranks."""
    state, versions = inputs.start.state, inputs.facts.versions
    report = RunReport(
        folder=config.saving.folder,
        settings={
            **config.used_flags,
            "world_size": inputs.ranks.world_size,
            "versions": versions,
            "total_steps": inputs.schedule.total_steps,
            "warmup_steps": inputs.schedule.warmup_steps,
        },
        environment=environment(versions),
        amounts=amounts_of_all(inputs.data.samples),
        base_model=inputs.facts.base_model,
        sources=list(dict.fromkeys(part.source for part in config.data.parts.parts)),
    )
    with collectives.all_or_none():
        is_first = collectives.place()[0] == 0
        beginning = begin_stage(config.source, inputs.start, inputs.facts) if is_first else Beginning()
    return StageRecord(report, beginning, config.data.parts, inputs.data.measured, inputs.order, state, inputs.facts)


def _make_writer(
    config: TrainConfig, inputs: RunInputs, record: StageRecord, history: EvaluationHistory
) -> CheckpointWriter:
    engine, settings = inputs.engine, inputs.engine.settings
    new_rows = None
    with engine.first_rank_only() as first:
        if first and settings.trainable.rows is not None:
            new_rows = NewRowsReport(config.source.trained, settings.trainable.rows, settings.precision)
        adapter = files_of_adapter(settings.trainable, config.source, inputs.base) if first else {}
    content = CheckpointContent(
        source=config.source,
        stage=config.stage,
        schedule=inputs.schedule,
        facts=inputs.facts,
        evaluations=history,
        chat=config.chat,
        new_rows=new_rows,
        adapter_files=adapter,
        history=record.history,
    )
    size = checkpoint_bytes(inputs.model, settings)
    return CheckpointWriter(engine, config.saving.folder, content, expected_bytes=size)


def _log_beginning(config: TrainConfig, inputs: RunInputs, report: RunReport) -> None:
    """Log what the run is going to do, and write it to plan.json and --config_file."""
    state, schedule, folder = inputs.start.state, inputs.schedule, config.saving.folder
    engine = inputs.engine
    run_metadata.log_sizes(config, engine, inputs.model)
    run_metadata.log_steps(config, engine, inputs.order, schedule)
    with engine.first_rank_only() as first:
        if not first:
            return
        run_outputs.write_settings(config.reporting.config_file, report.settings, run_folder=folder)
        # A run that only repeats an evaluation reads nothing.
        if schedule.total_steps > state.step:
            plan = data_plan.build_plan(
                config.data.parts,
                inputs.data.measured,
                inputs.order,
                num_epochs=config.recipe.num_epochs,
                schedule=schedule,
                state=state,
            )
            data_plan.log_and_save(plan, folder)
