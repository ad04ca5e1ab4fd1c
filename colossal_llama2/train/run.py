"""One training run, from parsed flags to the final model: checks, builds the parts, and lets the loop go."""

import argparse
import contextlib
import functools
import math
import os
import platform
import sys
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional

from colossal_llama2 import __version__, logs
from colossal_llama2.arguments import unused_flags, used_flags, with_defaults
from colossal_llama2.dataset.buckets import Buckets, MeasuredPart
from colossal_llama2.dataset.eval_sets import resolve_eval_sets, target_bytes
from colossal_llama2.dataset.groups import Groups
from colossal_llama2.dataset.loader import (
    Collator,
    SampleOrder,
    StepLoader,
    check_lengths,
    dataset_fingerprints,
    highest_token_id,
    load_tokenized_dataset,
)
from colossal_llama2.dataset.manifest import check_parts_fit
from colossal_llama2.dataset.measuring import measure_parts
from colossal_llama2.dataset.sources import Data, resolve_data
from colossal_llama2.errors import Stopped, UserError
from colossal_llama2.files import check_can_create, write_json
from colossal_llama2.model.attention import choose_attention
from colossal_llama2.model.freezing import Ranges, freeze_non_embedding_parameters, read_new_rows
from colossal_llama2.model.loading import ModelFacts, check_model_folder, inspect_weights, load_llama
from colossal_llama2.model.neftune import NoNoise, embedding_noise
from colossal_llama2.tokenizer import CONFIG_FILE, fingerprint, load_tokenizer
from colossal_llama2.train import plan as plans
from colossal_llama2.train import resuming, save_folder
from colossal_llama2.train.bad_steps import BadSteps
from colossal_llama2.train.benchmark import benchmark
from colossal_llama2.train.checkpoint import (
    MODEL_NAME,
    OPTIMIZER_NAME,
    STATES_NAME,
    Checkpointer,
    LoadPlan,
    check_save_dir,
    expected_bytes,
    plan_loading,
)
from colossal_llama2.train.engine import exact, exchange
from colossal_llama2.train.engine.booster import Engine, EngineSettings, launch, leave, settings_problems
from colossal_llama2.train.engine.watch import watching
from colossal_llama2.train.evaluation import Alarm, Evaluator, LoadedSet, SilentEvaluator, history_of
from colossal_llama2.train.loop import TrainState, fit
from colossal_llama2.train.model_card import base_model
from colossal_llama2.train.reporting import SilentReporter, reporting, told_groups
from colossal_llama2.train.row_health import RowHealth
from colossal_llama2.train.run_report import RunReport, amounts_of_all, environment
from colossal_llama2.train.schedule import CosineSchedule, warmup_steps
from colossal_llama2.train.stopping import NoSignals, StopSignals, agreed_signal

if TYPE_CHECKING:
    import datasets


def train(args: argparse.Namespace) -> None:
    """Run train.py or train_sft.py. Called once per process of the job, with the same flags in each.

    Raises:
        UserError: something that was given cannot be used; found before anything is written.
        RunError: losses are no numbers, a checkpoint cannot be written.
        Stopped: a signal came.
    """
    if args.dry_run:
        # It takes its checks from this module.
        from colossal_llama2.train.dry_run import dry_run

        return dry_run(args)
    with contextlib.ExitStack() as around:
        stop = around.enter_context(StopSignals(has_partners=int(os.environ.get("WORLD_SIZE", "1")) > 1))
        plan = check_inputs(args)
        if logs.is_first_rank() and not args.benchmark:
            around.enter_context(save_folder.locked(args.save_dir))
            plan = check_again(args, plan)
        launch(args.seed, timeout_seconds=args.dist_timeout)
        stop.meet()
        command = Path(sys.argv[0]).name
        with watching(command, timeout_seconds=args.dist_timeout, before_end=save_folder.let_go):
            if args.benchmark:
                benchmark(with_defaults(args), stop)
            else:
                run(args, plan, stop)
            leave()


def run(args: argparse.Namespace, plan: LoadPlan, stop: Optional[NoSignals] = None) -> None:
    """Train inside a process group, which stays open: the flags are checked, `plan` says where weights come from."""
    stop, args = stop or NoSignals(), with_defaults(args)
    plan = resuming.settle(plan, args.save_dir)
    # A rank may see what the others do not, such as a file that its host cannot read: all must hear of it.
    with exchange.all_or_none():
        given = read_given(args, plan)
        settings = engine_settings(args, trained_rows=rows_to_train(args, plan))
    engine = Engine(settings, given.model.parameters)
    check_token_ids(given.samples, given.model, engine)
    for one in given.eval_sets:
        check_token_ids(one.samples, given.model, engine, flag=f"--eval_dataset {one.name}")
    order = sample_order(args, len(given.samples), engine, buckets=plans.buckets_of(given.data, given.measured))
    tokenizer_path = find_tokenizer(args, plan)
    with exchange.all_or_none():
        run_facts = describe_run(args, engine, order, tokenizer_path, given.data)
        state = initial_state(args, plan, run_facts, order)
    report = make_report(args, engine, plan, given, run_facts)
    if resuming.is_done(plan, state, order, num_epochs=args.num_epochs, max_steps=args.max_steps):
        return finish_again(args, plan, engine, state, report)
    attention = choose_attention(args.use_flash_attn, precision=args.mixed_precision, replaced=args.plugin == "3d")
    with exchange.all_or_none():
        schedule = make_schedule(args, plan, state, order)
        report.know_steps(schedule.total_steps, schedule.warmup_steps)
        collator = make_collator(args, tokenizer_path, told_groups(report.amounts, engine.loss_tally))
    loader = StepLoader(given.samples, order, collator, engine.data_rank, pins=engine.pins_batches)
    save_folder.prepare(args.save_dir)
    tell_plan(args, engine, order, schedule, given.model)
    with engine.first_rank_only() as first:
        if first:
            write_config(args, report.settings)
            plans.tell_and_save(make_plan(args, given, order, schedule, state), args.save_dir)
    checkpointer = make_checkpointer(args, plan, engine, schedule, given.model, run_facts)
    checkpointer.check_room()
    load_model(args, plan, engine, attention, run_facts, ties_embeddings=given.model.ties_embeddings)
    with contextlib.ExitStack() as parts:
        checkpointer.reporter = parts.enter_context(
            reporting(
                engine=engine, state=state, report=report, plan=plan, order=order, parameters=given.model.parameters,
                tensorboard_dir=args.tensorboard_dir, peak_tflops=args.peak_tflops,
            )
        )  # fmt: skip
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
            evaluator=make_evaluator(args, plan, engine, given.eval_sets, run_facts, metrics=checkpointer.reporter),
        )
    final = checkpointer.finish(card=lambda: report.card(tokens_seen=state.tokens_seen))
    tell_end(args, engine, state, order, run_facts, final, stop)


class Given(NamedTuple):
    """What the flags name: the model's shape, samples, how they are counted, and what to evaluate on.

    `measured` is empty where nobody asks for it: without buckets, only rank 0 has a plan to tell.
    """

    model: ModelFacts
    data: Data
    samples: "datasets.Dataset"
    measured: List[MeasuredPart]
    eval_sets: List[LoadedSet]


def read_given(args: argparse.Namespace, plan: LoadPlan) -> Given:
    """Open model and data, and check them against each other and the flags. Raises UserError."""
    model = inspect_weights(plan.model_path)
    check_model_fits(args, model)
    data = data_of(args)
    samples = load_tokenized_dataset(data.paths, args.document_mask)
    check_lengths(samples, args.max_length)
    measured = measure_parts(data.parts) if data.is_ordered or logs.is_first_rank() else []
    return Given(model, data, samples, measured, load_eval_sets(args))


def make_plan(
    args: argparse.Namespace, given: Given, order: SampleOrder, schedule: CosineSchedule, state: TrainState
) -> Dict[str, Any]:
    """What will be read, as plan.json holds it."""
    return plans.build_plan(
        given.data, given.measured, order, num_epochs=args.num_epochs, schedule=schedule, state=state
    )


def tell_end(
    args: argparse.Namespace,
    engine: Engine,
    state: TrainState,
    order: SampleOrder,
    run_facts: Dict[str, Any],
    final: Path,
    stop: NoSignals,
) -> None:
    """Say that all is done. Raises Stopped if a signal came meanwhile."""
    number = agreed_signal(engine.sum_over_data(stop.received()))
    if number is not None:
        raise Stopped(number, f"{number.name} after step {state.step}, which is the last; the model is in {final}")
    unread = args.num_epochs * order.num_samples - run_facts.get("first_sample", 0) - state.samples_seen
    logs.get_logger().info(
        "Done: %d steps, %s tokens; samples that were not read: %s. The model is in %s",
        state.step, f"{state.tokens_seen:,}", f"{unread:,}", final,
    )  # fmt: skip


def rows_to_train(args: argparse.Namespace, plan: LoadPlan) -> Optional[Ranges]:
    """The rows of --train_new_rows_only, None without it. Raises UserError if the model does not tell which are new."""
    return read_new_rows(plan.model_path) if args.train_new_rows_only else None


def world_size_of(args: argparse.Namespace) -> int:
    """Processes of the job: those of the launcher, or with --dry_run those that --num_ranks names."""
    return args.num_ranks or int(os.environ.get("WORLD_SIZE", "1"))


def engine_settings(args: argparse.Namespace, *, trained_rows: Optional[Ranges] = None) -> EngineSettings:
    """The flags that decide how a step is computed."""
    args = with_defaults(args)
    return EngineSettings(
        plugin=args.plugin,
        precision=args.mixed_precision,
        tp_size=args.tp,
        zero_stage=args.zero,
        max_norm=args.gradient_clipping,
        accumulation_steps=args.accumulation_steps,
        use_flash_attn=args.use_flash_attn,
        chunked_loss=args.chunked_loss,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        micro_batch_size=args.micro_batch_size,
        pp_size=args.pp,
        microbatch_size=args.microbatch_size,
        sp_size=args.sp,
        sp_mode=args.sp_mode if args.enable_sequence_parallelism else None,
        embeddings_only=trains_embeddings_alone(args),
        trained_rows=trained_rows,
    )


def trains_embeddings_alone(args: argparse.Namespace) -> bool:
    """Whether all but the embeddings is frozen."""
    # The self-test's own flags lack the second.
    return args.freeze_non_embeds_params or getattr(args, "train_new_rows_only", False)


def trained_parameters(args: argparse.Namespace, facts: ModelFacts) -> int:
    """Elements of the weights that have an optimizer state; new rows have it with all of their embeddings."""
    return facts.embedding_parameters if trains_embeddings_alone(args) else facts.parameters


def check_inputs(args: argparse.Namespace) -> LoadPlan:
    """Check flags and folders, quickly and before torch is imported; every problem that is found is told at once.

    Returns:
        Where the weights come from.
    """
    settings = engine_settings(args)
    problems = unused_flags(args)
    problems += settings_problems(settings, world_size=world_size_of(args))
    problems += dry_run_problems(args)
    if args.max_length % settings.sequence_shards:
        problems.append(f"--max_length {args.max_length} cannot be split in {settings.sequence_shards} equal parts")
    if args.train_new_rows_only and args.chunked_loss == "off":
        problems.append("--train_new_rows_only needs the chunked loss; leave out --chunked_loss off")
    plan = LoadPlan(model_path=args.pretrained, resume_path=None)
    checks = [lambda: check_model_folder(args.pretrained, "--pretrained")]
    if args.profile is not None:
        if args.benchmark:
            checks.append(lambda: check_can_create(Path(args.profile), "--profile"))
        else:
            problems.append("--profile needs --benchmark")
    checks += [lambda: data_of(args), lambda: resolve_eval_sets(args.eval_dataset)]
    problems += evaluation_problems(args)
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if args.benchmark:
        if problems:
            raise UserError("; and ".join(problems))
        return plan
    try:
        plan = plan_loading(args.pretrained, args.load_checkpoint)
        plan = resuming.newest_plan(args.save_dir, otherwise=plan) if args.resume else plan
        if plan.model_path != args.pretrained:
            check_model_folder(plan.model_path, "--load_checkpoint")
        check_save_dir(args.save_dir, plan.resume_path)
        if args.continue_data and plan.resume_path is None and not Path(plan.model_path, "..", STATES_NAME).is_file():
            problems.append(
                f"--continue_data needs --load_checkpoint CHECKPOINT/{MODEL_NAME}, whose {STATES_NAME} tells the place "
                f"in the data"
            )
        for name in ("save_dir", "tensorboard_dir", "config_file"):
            check_can_create(Path(getattr(args, name)), f"--{name}")
        rows_to_train(args, plan)
        if not problems:
            tokenizer_path = find_tokenizer(args, plan)
            check_parts_fit(data_of(args).paths, stage=args.stage, tokenizer_dir=tokenizer_path)
            eval_paths = [one.path for one in resolve_eval_sets(args.eval_dataset)]
            check_parts_fit(eval_paths, stage=args.stage, tokenizer_dir=tokenizer_path, flag="--eval_dataset")
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError("; and ".join(problems))
    return plan


def check_again(args: argparse.Namespace, plan: LoadPlan) -> LoadPlan:
    """The plan, now that --save_dir is held: another run may have saved there after the checks, and ended."""
    plan = resuming.newest_plan(args.save_dir, otherwise=plan) if args.resume else plan
    check_save_dir(args.save_dir, plan.resume_path)
    return plan


def dry_run_problems(args: argparse.Namespace) -> List[str]:
    """What is wrong with the flags of --dry_run, one sentence each."""
    problems = []
    if args.num_ranks is not None and not args.dry_run:
        problems.append(f"--num_ranks {args.num_ranks} needs --dry_run; a run has the processes of its launcher")
    if args.dry_run and args.benchmark:
        problems.append("--dry_run takes no step, --benchmark measures some; give one of them")
    return problems


def check_model_fits(args: argparse.Namespace, facts: ModelFacts) -> None:
    """Refuse samples longer than the model has positions, and ranks among which it cannot be split."""
    if args.max_length > facts.max_position_embeddings:
        raise UserError(
            f"--max_length {args.max_length} given, the model has {facts.max_position_embeddings} positions "
            f"(max_position_embeddings of its config.json); give at most that"
        )
    # Ranks of --sp exchange whole heads, as ranks of --tp hold them.
    splits = args.tp * args.sp
    if facts.attention_heads % splits or facts.key_value_heads % splits:
        given = f"--tp {args.tp}" if args.sp == 1 else f"--tp {args.tp} x --sp {args.sp}"
        raise UserError(
            f"{given} does not divide the model's {facts.attention_heads} attention heads "
            f"and {facts.key_value_heads} key-value heads; give a number that does"
        )
    if facts.layers < args.pp:
        raise UserError(f"--pp {args.pp} given, the model has {facts.layers} layers; give at most that many stages")


def check_token_ids(dataset, facts: ModelFacts, engine: Engine, *, flag: str = "--dataset") -> None:
    """Refuse data of another tokenizer; each rank looks through its share."""
    with exchange.all_or_none():
        highest = highest_token_id(dataset, share=engine.rank, shares=engine.world_size)
    check_highest_id(engine.max_over_ranks(highest), facts, flag=flag)


def check_highest_id(highest: int, facts: ModelFacts, *, flag: str = "--dataset") -> None:
    """Raise a UserError if a token id is beyond the model's vocabulary."""
    if highest >= facts.vocab_size:
        raise UserError(
            f"{flag} has token id {highest}, the model's vocabulary ends at {facts.vocab_size - 1}; "
            f"prepare the data with the tokenizer of the model"
        )


def load_eval_sets(args: argparse.Namespace) -> List[LoadedSet]:
    """The data of --eval_dataset, checked as that of --dataset is."""
    sets = []
    for name, path in resolve_eval_sets(args.eval_dataset):
        flag = f"--eval_dataset {name}"
        samples = load_tokenized_dataset([path], args.document_mask, flag=flag)
        check_lengths(samples, args.max_length, flag=flag)
        known_bytes = target_bytes(path)
        if not known_bytes:
            logs.get_logger().warning("%s: %s does not say how many bytes of text it has: no bits per byte", flag, path)
        sets.append(LoadedSet(name, samples, known_bytes))
    return sets


def make_evaluator(
    args: argparse.Namespace,
    plan: LoadPlan,
    engine: Engine,
    sets: List[LoadedSet],
    run_facts: Dict[str, Any],
    *,
    metrics: SilentReporter,
) -> SilentEvaluator:
    """What measures the model on --eval_dataset; checkpoints get what it finds."""
    saved = plan.read_states()[1] if plan.resume_path is not None else {}
    fingerprints = {one.name: dataset_fingerprints([one.path])[0] for one in resolve_eval_sets(args.eval_dataset)}
    # Kept through a run that is not measured, too.
    run_facts["evaluations"] = history_of(saved, fingerprints)
    run_facts["eval_fingerprints"] = {**(saved.get("eval_fingerprints") or {}), **fingerprints}
    if not sets:
        return SilentEvaluator()
    collator = make_collator(args, find_tokenizer(args, plan))
    return Evaluator(
        engine, sets, collator, interval=args.eval_interval, metrics=metrics, history=run_facts["evaluations"],
        alarm=Alarm(alarm_limits(args), stops=args.on_forgetting == "stop"),
    )  # fmt: skip


def alarm_limits(args: argparse.Namespace) -> Dict[str, float]:
    """--forgetting_alarm: by which share each set's bits per byte may rise."""
    pairs = (word.rpartition("=") for word in args.forgetting_alarm or ())
    return {name: float(limit) for name, _, limit in pairs}


def evaluation_problems(args: argparse.Namespace) -> List[str]:
    """What is wrong with the flags of evaluation, one sentence each."""
    names = [word.partition("=")[0] for word in args.eval_dataset or ()]
    alarms = Counter(word.rpartition("=")[0] for word in args.forgetting_alarm or ())
    problems = [
        f"--forgetting_alarm: {name} is named {count} times; name it once"
        for name, count in alarms.items()
        if count > 1
    ]
    problems += [
        f"--forgetting_alarm {name}: there is no --eval_dataset of that name; give one of {', '.join(names) or 'none'}"
        for name in alarms
        if name not in names
    ]
    if args.eval_interval is not None and not names:
        problems.append("--eval_interval needs --eval_dataset")
    if names and args.benchmark:
        problems.append("--eval_dataset does nothing with --benchmark; leave one of them out")
    return problems


def data_of(args: argparse.Namespace) -> Data:
    """The parts that the flags name, quickly; with --benchmark there may be none."""
    args = with_defaults(args)
    return resolve_data(args.dataset or (), bucketed=args.bucketed, mixture=args.mixture, mixture_end=args.mixture_end)


def sample_order(
    args: argparse.Namespace, num_samples: int, engine: Engine, buckets: Optional[Buckets] = None
) -> SampleOrder:
    """The order of samples, if there are enough for one micro batch on every rank."""
    return plans.make_order(
        num_samples,
        micro_batch_size=args.micro_batch_size,
        data_size=engine.data_size,
        accumulation_steps=args.accumulation_steps,
        seed=args.seed,
        buckets=buckets,
    )


def describe_run(
    args: argparse.Namespace, engine: Engine, order: SampleOrder, tokenizer_path: str, data: Data
) -> Dict[str, Any]:
    """What running_states.json says of the whole run."""
    return {
        "num_samples": order.num_samples,
        "dataset_fingerprints": dataset_fingerprints(data.paths),
        **data.facts(),
        "tokenizer": fingerprint(tokenizer_path),
        "pretrained_tokenizer": fingerprint(args.pretrained) if has_tokenizer(args.pretrained) else None,
        "model_shape": resuming.model_shape(args.pretrained),
        "seed": order.seed,
        "freeze_non_embeds_params": trains_embeddings_alone(args),
        "trained_rows": engine.settings.trained_rows and [list(borders) for borders in engine.settings.trained_rows],
        "world_size": engine.world_size,
        "data_parallel_size": engine.data_size,
        "layout": exact.layout(engine),
        "settings": vars(args),
        "versions": versions(),
        "machine": resuming.machine(),
    }


# What must be as in the checkpoint: it decides the place in the data, what the data means, or which states Adam has.
DATA_FACTS = {
    "num_samples": "--dataset",
    "dataset_fingerprints": "--dataset",
    "bucketed": "--bucketed",
    "mixture": "--mixture",
    "mixture_end": "--mixture_end",
    "sources": "--dataset",
    "seed": "--seed",
}
RESUMED_FACTS = {
    **DATA_FACTS,
    "pretrained_tokenizer": "--pretrained",
    "model_shape": "--pretrained",
    "trained_rows": "--train_new_rows_only",
    "freeze_non_embeds_params": "--freeze_non_embeds_params",
}


def initial_state(
    args: argparse.Namespace, plan: LoadPlan, run_facts: Dict[str, Any], order: SampleOrder
) -> TrainState:
    """The state to begin from: that of the resumed checkpoint, if this run goes on with the same things."""
    if plan.resume_path is None:
        if not args.continue_data:
            return TrainState()
        state = resuming.continued_state(plan, run_facts, order, num_epochs=args.num_epochs, data_facts=DATA_FACTS)
        run_facts["first_sample"] = state.epoch * order.num_samples + state.sample_start_index
        return state
    state, saved = plan.read_states()
    run_facts["first_sample"] = saved.get("first_sample", 0)
    weights_alone = f"or take its weights alone: --load_checkpoint {plan.model_path}"
    for name, flag in RESUMED_FACTS.items():
        if saved.get(name) != run_facts[name]:
            raise UserError(
                f"--load_checkpoint {plan.resume_path}: {resuming.difference(name, saved.get(name), run_facts[name])}; "
                f"resume with the same {flag}, {weights_alone}"
            )
    if state.epoch >= args.num_epochs:
        raise UserError(f"--load_checkpoint {plan.resume_path}: is of epoch {state.epoch}, give a higher --num_epochs")
    resuming.tell_verdict(plan, state, saved, run_facts)
    return state


def make_schedule(
    args: argparse.Namespace, plan: LoadPlan, state: TrainState, order: SampleOrder
) -> CosineSchedule:
    """The learning rate over all steps of the run, those before a resume included."""
    steps_left = order.steps_after(state.sample_start_index)
    steps_left += (args.num_epochs - state.epoch - 1) * order.steps_after(0)
    if steps_left == 0:
        raise UserError(
            f"--load_checkpoint {plan.resume_path}: its {args.num_epochs} epochs are trained, the model is in "
            f"{plan.model_path}; give a higher --num_epochs to go on"
        )
    if state.step >= (args.max_steps or math.inf):
        raise UserError(
            f"--load_checkpoint {plan.resume_path}: its step {state.step} is not before --max_steps {args.max_steps}, "
            f"the model is in {plan.model_path}; give a higher --max_steps to go on"
        )
    total_steps = min(state.step + steps_left, args.max_steps or math.inf)
    schedule = CosineSchedule(args.lr, total_steps, warmup_steps(args.warmup_steps, total_steps))
    if schedule.warmup_steps >= total_steps:
        logs.get_logger().warning(
            "--warmup_steps %d: the run has %d steps, so the learning rate only rises",
            schedule.warmup_steps,
            total_steps,
        )
    if plan.resume_path is not None:
        _tell_changed_schedule(plan.read_schedule(), schedule)
    return schedule


def _tell_changed_schedule(saved: Dict[str, Any], schedule: CosineSchedule) -> None:
    now = asdict(schedule)
    changed = [f"{name} {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
    if changed:
        logs.get_logger().warning("The learning rate goes on along another curve: %s", ", ".join(changed))


def versions() -> Dict[str, Optional[str]]:
    """Versions of what a result depends on, by name; None for a kernel that is not installed."""
    found = {name: metadata.version(name) for name in ("colossalai", "torch", "transformers", "datasets")}
    kernels: Dict[str, Optional[str]] = dict.fromkeys(("flash-attn", "liger-kernel"))
    for name in kernels:
        with contextlib.suppress(metadata.PackageNotFoundError):
            kernels[name] = metadata.version(name)
    return {**found, **kernels, "python": platform.python_version(), "colossal_llama2": __version__}


def write_config(args: argparse.Namespace, settings: Dict[str, Any]) -> None:
    """Write the resolved flags and the versions they ran with to --config_file."""
    path = Path(args.config_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def tell_plan(
    args: argparse.Namespace, engine: Engine, order: SampleOrder, schedule: CosineSchedule, facts: ModelFacts
) -> None:
    """Log what the run is going to do."""
    batch = order.samples_per_micro_step * args.accumulation_steps
    logs.get_logger().info(
        "%.1f M parameters, vocabulary %d; plugin %s, %s; %d processes, data parallel over %d",
        facts.parameters / 1e6, facts.vocab_size, args.plugin, args.mixed_precision,
        engine.world_size, engine.data_size,
    )  # fmt: skip
    logs.get_logger().info(
        "%d samples; epochs: %d; samples a step: %d (%d per rank x %d ranks x %d accumulated); steps: %d, warm-up: %d",
        order.num_samples, args.num_epochs, batch, args.micro_batch_size, engine.data_size, args.accumulation_steps,
        schedule.total_steps, schedule.warmup_steps,
    )  # fmt: skip


def load_model(
    args: argparse.Namespace, plan: LoadPlan, engine: Engine, attention: str, run_facts: Dict[str, Any],
    *, ties_embeddings: bool,
) -> None:
    """Load the weights and hand them to the engine; when resuming, the optimizer's state too."""
    with exchange.all_or_none(), engine.initializing(ties_embeddings=ties_embeddings):
        model = load_llama(plan.model_path, precision=args.mixed_precision, attention=attention)
    if args.use_grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if trains_embeddings_alone(args):
        trainable, frozen = freeze_non_embedding_parameters(model)
        rows = sum(end - begin for begin, end in engine.settings.trained_rows or ())
        logs.get_logger().info(
            "%s alone are trained: %.1f M parameters, %.1f M frozen",
            f"{rows:,} new rows of the embeddings" if rows else "Embeddings", trainable / 1e6, frozen / 1e6,
        )  # fmt: skip
    model.train()
    engine.boost(model)
    if plan.resume_path is not None:
        engine.load_optimizer(str(Path(plan.resume_path, OPTIMIZER_NAME)))
        resuming.restore_exactly(plan, engine, run_facts)
        logs.get_logger().info("Resumed %s", plan.resume_path)
    elif plan.model_path != args.pretrained:
        logs.get_logger().info("Took the weights of %s, and nothing else of that run", plan.model_path)


def find_tokenizer(args: argparse.Namespace, plan: LoadPlan) -> str:
    """The folder that has the run's tokenizer: the loaded checkpoint, or --pretrained if that holds none."""
    return plan.model_path if has_tokenizer(plan.model_path) else args.pretrained


def has_tokenizer(folder: str) -> bool:
    """True if a model folder has a tokenizer too."""
    return Path(folder, CONFIG_FILE).is_file()


def make_collator(args: argparse.Namespace, tokenizer_path: str, groups: Optional[Groups] = None) -> Collator:
    """Pads with <unk> in pre-training and with </s> in fine-tuning, as the original does."""
    tokenizer = load_tokenizer(tokenizer_path, pad_token=args.pad_token)
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        max_length=args.max_length,
        length_divisor=engine_settings(args).sequence_shards,
        groups=groups,
    )


def make_checkpointer(
    args: argparse.Namespace,
    plan: LoadPlan,
    engine: Engine,
    schedule: CosineSchedule,
    facts: ModelFacts,
    run_facts: Dict[str, Any],
) -> Checkpointer:
    """What saves to --save_dir."""
    trained = engine.settings.trained_rows
    with engine.first_rank_only() as first:
        watches_rows = first and trained is not None
        row_health = RowHealth(plan.model_path, trained, args.mixed_precision) if watches_rows else None
    return Checkpointer(
        row_health=row_health,
        engine=engine,
        save_dir=args.save_dir,
        save_interval=args.save_interval,
        model_path=plan.model_path,
        tokenizer_path=find_tokenizer(args, plan),
        schedule=schedule,
        facts=run_facts,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        expected_bytes=expected_bytes(facts.parameters, args.mixed_precision, trained=trained_parameters(args, facts)),
    )


def noise_of(args: argparse.Namespace, engine: Engine) -> contextlib.AbstractContextManager:
    """NEFTune if it was asked for."""
    if not getattr(args, "use_neft", False):
        return contextlib.nullcontext(NoNoise())
    logs.get_logger().info("NEFTune: noise of alpha %g on the embeddings", args.neft_alpha)
    return embedding_noise(engine.unwrapped_model, alpha=args.neft_alpha, seed=args.seed, data_rank=engine.data_rank)


def make_report(
    args: argparse.Namespace, engine: Engine, plan: LoadPlan, given: Given, run_facts: Dict[str, Any]
) -> RunReport:
    """What the run leaves at its end; checkpoints get the name of its base model. Called on all ranks."""
    settings = {**used_flags(args), "world_size": engine.world_size, "versions": versions()}
    run_facts["base_model"] = exchange.first_rank_value(base_model(plan.model_path))
    return RunReport(
        save_dir=args.save_dir,
        settings=settings,
        environment=environment(settings["versions"]),
        amounts=amounts_of_all(given.samples),
        base_model=run_facts["base_model"],
        sources=list(dict.fromkeys(part.source for part in given.data.parts)),
    )


def finish_again(
    args: argparse.Namespace, plan: LoadPlan, engine: Engine, state: TrainState, report: RunReport
) -> None:
    """The end of a run that died after its last save."""
    report.know_steps(state.step, warmup_steps(args.warmup_steps, state.step))
    save_folder.prepare(args.save_dir)
    if engine.rank == 0:
        report.write_files()
    card = functools.partial(report.card, tokens_seen=state.tokens_seen)
    resuming.finish_again(plan, engine, keep_last=args.keep_last, keep_every=args.keep_every, card=card)
