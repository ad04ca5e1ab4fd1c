"""One training run, from parsed flags to the final model: checks, builds the parts, and lets the loop go."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import used_flags, with_defaults
from colossal_llama2.dataset.read.buckets import MeasuredPart
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import check_lengths, load_tokenized_dataset
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.dataset.read.token_counts import measure_parts
from colossal_llama2.engine.engine import Engine, launch, leave
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.ranks.liveness import Watch
from colossal_llama2.errors import Stopped
from colossal_llama2.model.attention import choose_attention
from colossal_llama2.model.loading import ModelFacts, inspect_weights
from colossal_llama2.train import checks
from colossal_llama2.train.benchmark import benchmark
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.checkpointer import Checkpointer, LoadPlan, expected_bytes
from colossal_llama2.train.checkpointing.new_rows_report import RowHealth
from colossal_llama2.train.evaluation import evaluation_setup
from colossal_llama2.train.evaluation.evaluator import LoadedSet
from colossal_llama2.train.forecast import data_plan as plans
from colossal_llama2.train.loop import fit
from colossal_llama2.train.model_setup import load_model, noise_of
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.report.model_card import base_model
from colossal_llama2.train.report.reporter import reporting, told_groups
from colossal_llama2.train.report.run_report import RunReport, amounts_of_all, environment
from colossal_llama2.train.report.stage_record import Beginning, StageRecord, begin_stage
from colossal_llama2.train.run_folder import run_lock, run_outputs
from colossal_llama2.train.settings import flags
from colossal_llama2.train.stepping.nonfinite_steps import BadSteps, log_overflows, without_update
from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps
from colossal_llama2.train.stepping.state import TrainState
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    import datasets


def train_on_all(args: argparse.Namespace, stop: NoSignals, watch: Watch) -> None:
    """Check, meet the other ranks, train. Called on all ranks, by start.py."""
    plan = checks.check_inputs(args)
    with contextlib.ExitStack() as around:
        if logs.is_first_rank() and not args.benchmark:
            around.enter_context(run_lock.locked(args.save_dir))
            plan = checks.check_again(args, plan)
        watch.reach_out()
        launch(args.seed, timeout_seconds=args.dist_timeout, meet=watch.wait)
        stop.meet()
        watch.settle()
        if args.benchmark:
            benchmark(with_defaults(args), stop)
        else:
            run(args, plan, stop)
        leave()


def run(args: argparse.Namespace, plan: LoadPlan, stop: NoSignals | None = None) -> None:
    """Train inside a process group, which stays open: the flags are checked, `plan` says where weights come from."""
    stop, args = stop or NoSignals(), with_defaults(args)
    plan = resuming.settle(plan, args.save_dir)
    # A rank may see what the others do not, such as a file that its host cannot read: all must hear of it.
    with collectives.all_or_none():
        given = read_given(args, plan)
        settings = flags.engine_settings(args, trained_rows=flags.rows_to_train(args, plan))
    engine = Engine(settings, given.model.parameters)
    check_contents(args, plan, given, engine)
    order = flags.sample_order(args, len(given.samples), engine, buckets=plans.buckets_of(given.data, given.measured))
    tokenizer_path = flags.find_tokenizer(args, plan)
    with collectives.all_or_none():
        run_facts = run_metadata.describe_run(args, engine, order, tokenizer_path, given.data)
        state = resuming.initial_state(args, plan, run_facts, order)
        owes = evaluation_setup.owes_evaluation(args, plan)
    report, record = make_report(args, engine, plan, given, order, state, run_facts)
    if resuming.is_done(plan, state, order, num_epochs=args.num_epochs, max_steps=args.max_steps, owes_evaluation=owes):
        return finish_again(args, plan, engine, record)
    attention = choose_attention(args.use_flash_attn, precision=args.mixed_precision, replaced=args.plugin == "3d")
    with collectives.all_or_none():
        schedule = resuming.make_schedule(args, plan, state, order, owes_evaluation=owes)
        report.know_steps(schedule.total_steps, schedule.warmup_steps)
        collator = flags.make_collator(args, tokenizer_path, told_groups(report.amounts, engine.loss_tally))
    loader = StepLoader(given.samples, order, collator, engine.data_rank, pins=engine.pins_batches)
    run_lock.prepare(args.save_dir)
    checkpointer = make_checkpointer(args, plan, engine, schedule, given.model, run_facts, record)
    checkpointer.rehearse(state)
    tell_beginning(args, engine, given, order, schedule, state, report)
    load_model(args, plan, engine, attention, run_facts, ties_embeddings=given.model.ties_embeddings)
    with contextlib.ExitStack() as parts:
        checkpointer.reporter = parts.enter_context(
            reporting(
                engine=engine,
                state=state,
                report=report,
                plan=plan,
                order=order,
                parameters=given.model.parameters,
                tensorboard_dir=args.tensorboard_dir,
                peak_tflops=args.peak_tflops,
            )
        )
        fit(
            state,
            num_epochs=args.num_epochs,
            engine=engine,
            loader=loader,
            schedule=schedule,
            noise=parts.enter_context(noise_of(args, engine)),
            checkpointer=checkpointer,
            stop=stop,
            bad_steps=BadSteps(args.max_bad_steps),
            metrics=checkpointer.reporter,
            evaluator=evaluation_setup.make_evaluator(
                args,
                plan,
                engine,
                given.eval_sets,
                run_facts,
                tokenizer_path=tokenizer_path,
                owes=owes,
                metrics=checkpointer.reporter,
                stop=stop,
            ),
        )
    final = checkpointer.finish(card=record.card)
    tell_end(args, engine, state, order, run_facts, final, stop)


class Given(NamedTuple):
    """What the flags name: the model's shape, samples, how they are counted, and what to evaluate on.

    `measured` is empty where nobody asks for it: without buckets, only rank 0 has a plan to tell.
    """

    model: ModelFacts
    data: Data
    samples: "datasets.Dataset"
    measured: list[MeasuredPart]
    eval_sets: list[LoadedSet]


def read_given(args: argparse.Namespace, plan: LoadPlan) -> Given:
    """Open model and data, and check them against each other and the flags. Raises UserError."""
    model = inspect_weights(plan.model_path)
    checks.check_model_fits(args, model)
    checks.check_tokenizer_fits(args, plan, model)
    data = flags.data_of(args)
    samples = load_tokenized_dataset(data.paths, args.document_mask)
    check_lengths(samples, args.max_length)
    measured = measure_parts(data.parts) if data.is_ordered or logs.is_first_rank() else []
    return Given(model, data, samples, measured, evaluation_setup.load_eval_sets(args))


def check_contents(args: argparse.Namespace, plan: LoadPlan, given: Given, engine: Engine) -> None:
    """Look through token ids and weights, of which each rank takes a share. Called on all ranks."""
    checks.check_samples(given.samples, given.model, engine)
    for one in given.eval_sets:
        checks.check_samples(one.samples, given.model, engine, flag=f"--eval_dataset {one.name}")
    checks.check_numbers_of(plan.model_path, args.mixed_precision)


def tell_beginning(
    args: argparse.Namespace,
    engine: Engine,
    given: Given,
    order: SampleOrder,
    schedule: CosineSchedule,
    state: TrainState,
    report: RunReport,
) -> None:
    """Log what the run is going to do, and write it to plan.json and --config_file. Called on all ranks."""
    run_metadata.tell_plan(args, engine, order, schedule, given.model)
    with engine.first_rank_only() as first:
        if not first:
            return
        run_outputs.write_settings(args.config_file, report.settings, save_dir=args.save_dir)
        # A run that only makes up for an evaluation reads nothing.
        if schedule.total_steps > state.step:
            plan = plans.build_plan(
                given.data, given.measured, order, num_epochs=args.num_epochs, schedule=schedule, state=state
            )
            plans.tell_and_save(plan, args.save_dir)


def tell_end(
    args: argparse.Namespace,
    engine: Engine,
    state: TrainState,
    order: SampleOrder,
    run_facts: dict[str, Any],
    final: Path,
    stop: NoSignals,
) -> None:
    """Say that all is done. Raises Stopped if a signal came meanwhile."""
    number = agreed_signal(engine.sum_over_data(stop.received()))
    if number is not None:
        raise Stopped(number, f"{number.name} after step {state.step}, which is the last; the model is in {final}")
    unread = args.num_epochs * order.num_samples - run_facts.get("first_sample", 0) - state.samples_seen
    log_overflows(state)
    logs.get_logger().info(
        "Done: %d steps%s, %s tokens; samples that were not read: %s. The model is in %s",
        state.step,
        without_update(state),
        f"{state.tokens_seen:,}",
        f"{unread:,}",
        final,
    )


def make_checkpointer(
    args: argparse.Namespace,
    plan: LoadPlan,
    engine: Engine,
    schedule: CosineSchedule,
    facts: ModelFacts,
    run_facts: dict[str, Any],
    record: StageRecord,
) -> Checkpointer:
    """What saves to --save_dir."""
    trained = engine.settings.trained_rows
    with engine.first_rank_only() as first:
        watches_rows = first and trained is not None
        row_health = RowHealth(plan.model_path, trained, args.mixed_precision) if watches_rows else None
    return Checkpointer(
        row_health=row_health,
        history=record.history,
        engine=engine,
        save_dir=args.save_dir,
        save_interval=args.save_interval,
        skip_epochs=args.skip_save_each_epoch,
        model_path=plan.model_path,
        tokenizer_path=flags.find_tokenizer(args, plan),
        schedule=schedule,
        facts=run_facts,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        expected_bytes=expected_bytes(
            facts.parameters, args.mixed_precision, trained=flags.trained_parameters(args, facts)
        ),
    )


def make_report(
    args: argparse.Namespace,
    engine: Engine,
    plan: LoadPlan,
    given: Given,
    order: SampleOrder,
    state: TrainState,
    run_facts: dict[str, Any],
) -> tuple[RunReport, StageRecord]:
    """What the run leaves at its end, and in its models; checkpoints get the name of its base model.

    Called on all ranks.
    """
    settings = {**used_flags(args), "world_size": engine.world_size, "versions": run_metadata.versions()}
    with engine.first_rank_only() as first:
        name = base_model(plan.model_path) if first else None
    run_facts["base_model"] = collectives.first_rank_value(name)
    report = RunReport(
        save_dir=args.save_dir,
        settings=settings,
        environment=environment(settings["versions"]),
        amounts=amounts_of_all(given.samples),
        base_model=run_facts["base_model"],
        sources=list(dict.fromkeys(part.source for part in given.data.parts)),
    )
    with engine.first_rank_only() as first:
        beginning = begin_stage(args, plan, state, run_facts) if first else Beginning()
    return report, StageRecord(report, beginning, given.data, given.measured, order, state, run_facts)


def finish_again(args: argparse.Namespace, plan: LoadPlan, engine: Engine, record: StageRecord) -> None:
    """The end of a run that died after its last save."""
    report, step = record.report, record.state.step
    report.know_steps(step, warmup_steps(args.warmup_steps, step))
    run_lock.prepare(args.save_dir)
    if engine.rank == 0:
        report.write_files()
    resuming.finish_again(plan, engine, keep_last=args.keep_last, keep_every=args.keep_every, card=record.card)
