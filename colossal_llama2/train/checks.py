"""What is wrong with the flags of a run and with what they name: found before anything is written."""

import argparse
from collections import Counter
from pathlib import Path

from colossal_llama2.cli.dependent_flags import unused_flags, with_defaults
from colossal_llama2.dataset.layout.manifest import check_parts_fit
from colossal_llama2.dataset.read.eval_sets import resolve_eval_sets
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import highest_token_id
from colossal_llama2.dataset.read.untrained import log_untrained, untrained_samples
from colossal_llama2.dataset.write.sample_lengths import check_max_length, check_samples_fit
from colossal_llama2.encoding.encoder import load_tokenizer
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.engine.engine import Engine, settings_problems
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import ModelFacts, check_model
from colossal_llama2.model.positions import described
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.storage.files import check_is_utf8
from colossal_llama2.storage.output_paths import check_output_folder
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.checkpointer import (
    MODEL_NAME,
    STATES_NAME,
    LoadPlan,
    check_save_dir,
    plan_loading,
)
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.settings import flags

# Steps of --benchmark that are not on the clock: the first allocate, tune kernels and fill caches, the last are slowed
# down by the profiler.
WARMUP_STEPS, PROFILED_STEPS = 3, 2


def check_inputs(args: argparse.Namespace) -> LoadPlan:
    """Check flags and folders, quickly and before torch is imported; every problem that is found is told at once.

    Returns:
        Where the weights come from.
    """
    settings = flags.engine_settings(args)
    problems = unused_flags(args)
    problems += settings_problems(settings, world_size=flags.world_size_of(args))
    problems += dry_run_problems(args) + benchmark_problems(args) + utf8_problems(args)
    if args.max_length % settings.sequence_shards:
        problems.append(f"--max_length {args.max_length} cannot be split in {settings.sequence_shards} equal parts")
    if args.train_new_rows_only and args.chunked_loss == "off":
        problems.append("--train_new_rows_only needs the chunked loss; leave out --chunked_loss off")
    if args.train_new_rows_only and args.freeze_non_embeds_params:
        problems.append(
            "--train_new_rows_only trains new rows of the embeddings, --freeze_non_embeds_params all of their rows; "
            "give one of them"
        )
    plan = LoadPlan(model_path=args.pretrained, resume_path=None)
    needs_weights = not (args.benchmark and args.dry_run)
    checks = [lambda: _check_pretrained(args, needs_weights=needs_weights)]
    if args.profile is not None and args.benchmark:
        checks.append(lambda: check_output_folder(Path(args.profile), "--profile"))
    checks += [lambda: flags.data_of(args), lambda: resolve_eval_sets(args.eval_dataset)]
    problems += evaluation_problems(args)
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    if not args.benchmark:
        plan = _checked_plan(args, plan, problems)
    if problems:
        raise UserError("; and ".join(problems))
    return plan


def _check_pretrained(args: argparse.Namespace, *, needs_weights: bool) -> None:
    check_model(args.pretrained, "--pretrained", needs_weights=needs_weights)
    check_max_length(args.max_length, args.pretrained)


def _checked_plan(args: argparse.Namespace, plan: LoadPlan, problems: list[str]) -> LoadPlan:
    """Where the weights of a run that writes come from, with what is wrong added to `problems`."""
    try:
        plan = plan_loading(args.pretrained, args.load_checkpoint)
        plan = resuming.newest_plan(args.save_dir, otherwise=plan) if args.resume else plan
        if plan.model_path != args.pretrained:
            check_model(plan.model_path, "--load_checkpoint")
        check_save_dir(args.save_dir, plan.resume_path)
        if args.continue_data and plan.resume_path is None and not Path(plan.model_path, "..", STATES_NAME).is_file():
            problems.append(
                f"--continue_data needs --load_checkpoint CHECKPOINT/{MODEL_NAME}, whose {STATES_NAME} records the "
                f"place in the data"
            )
        run_outputs.check_places(args.save_dir, args.tensorboard_dir, args.config_file)
        flags.rows_to_train(args, plan)
        if not problems:
            tokenizer_path = flags.find_tokenizer(args, plan)
            check_tokenizer_files(tokenizer_path)
            check_parts_fit(flags.data_of(args).paths, stage=args.stage, tokenizer_dir=tokenizer_path)
            eval_paths = [one.path for one in resolve_eval_sets(args.eval_dataset)]
            check_parts_fit(eval_paths, stage=args.stage, tokenizer_dir=tokenizer_path, flag="--eval_dataset")
            check_samples_fit(flags.data_of(args).paths, plan.model_path)
            check_samples_fit(eval_paths, plan.model_path, flag="--eval_dataset")
    except UserError as error:
        problems.append(str(error))
    return plan


def check_again(args: argparse.Namespace, plan: LoadPlan) -> LoadPlan:
    """The plan, now that --save_dir is held: another run may have saved there after the checks, and ended."""
    plan = resuming.newest_plan(args.save_dir, otherwise=plan) if args.resume else plan
    check_save_dir(args.save_dir, plan.resume_path)
    return plan


def dry_run_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of --dry_run, one sentence each."""
    problems = []
    if args.num_ranks is not None and not args.dry_run:
        problems.append(f"--num_ranks {args.num_ranks} needs --dry_run; a run has the processes of its launcher")
    return problems


def benchmark_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of --benchmark, one sentence each."""
    if not args.benchmark:
        return ["--profile needs --benchmark"] if args.profile is not None else []
    problems = []
    if args.profile is not None and args.dry_run:
        problems.append(f"--profile {args.profile} does nothing with --dry_run, which takes no step; leave it out")
    if args.continue_data:
        problems.append("--continue_data does nothing with --benchmark, which reads no data; leave it out")
    given = with_defaults(args)
    data_size = max(flags.world_size_of(args) // flags.engine_settings(args).model_ranks, 1)
    order = SampleOrder(given.num_samples, args.micro_batch_size, data_size, args.accumulation_steps, args.seed)
    least, steps = WARMUP_STEPS + 1 + PROFILED_STEPS, order.steps_after(0)
    if steps < least:
        needed = least * order.samples_per_micro_step * order.accumulation_steps
        problems.append(f"--num_samples {given.num_samples} make {steps} steps; give at least {needed}")
    return problems


def utf8_problems(args: argparse.Namespace) -> list[str]:
    """Flags that no checkpoint could hold: one sentence for each that is not UTF-8, as a path may be."""
    problems = []
    for name, value in vars(args).items():
        for word in value if isinstance(value, (list, tuple)) else [value]:
            try:
                check_is_utf8(str(word), f"--{name}")
            except UserError as error:
                problems.append(str(error))
    return problems


def evaluation_problems(args: argparse.Namespace) -> list[str]:
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


def check_model_fits(args: argparse.Namespace, facts: ModelFacts) -> None:
    """Refuse samples longer than the model has positions, and ranks among which it cannot be split."""
    if args.max_length > facts.positions:
        # What `check_max_length` says, for a checkpoint whose positions are others than those of --pretrained.
        has = described(facts.positions, facts.scaling)
        raise UserError(f"--max_length {args.max_length} given, {has}; give at most that")
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


def check_tokenizer_fits(args: argparse.Namespace, plan: LoadPlan, facts: ModelFacts) -> None:
    """Refuse a tokenizer with more tokens than the model has rows: the trained model could not be used with it."""
    path = flags.find_tokenizer(args, plan)
    tokens = len(load_tokenizer(path, pad_token=args.pad_token))
    if tokens > facts.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {tokens:,} tokens, the model's vocabulary {facts.vocab_size:,}; "
            f"the tokenizer was extended and the model was not: run init_model.py, and give --pretrained the folder "
            f"that it writes"
        )


def check_samples(dataset, facts: ModelFacts, engine: Engine, *, flag: str = "--dataset") -> None:
    """Refuse data of another tokenizer, or without a trained token; each rank looks through its share."""
    with collectives.all_or_none():
        highest = highest_token_id(dataset, share=engine.rank, shares=engine.world_size)
        untrained = untrained_samples(dataset, share=engine.rank, shares=engine.world_size)
    check_highest_id(collectives.max_over_ranks(highest), facts, flag=flag)
    log_untrained(sum(collectives.gather_values(untrained)), len(dataset), flag=flag)


def check_numbers_of(model_path: str, precision: str) -> None:
    """Refuse weights with numbers that are not finite in `precision`.

    The ranks of a host share the work. Each host looks through all weights, since the folder may be on its own disk.
    """
    cure = "use --mixed_precision bf16 or fp32" if precision == "fp16" else "use --mixed_precision fp32"
    share, shares = collectives.place_on_host()
    with collectives.all_or_none():
        check_numbers(model_path, precision, cure=cure, share=share, shares=shares)


def check_highest_id(highest: int, facts: ModelFacts, *, flag: str = "--dataset") -> None:
    """Raise a UserError if a token id is beyond the model's vocabulary."""
    if highest >= facts.vocab_size:
        raise UserError(
            f"{flag} has token id {highest}, the model's vocabulary ends at {facts.vocab_size - 1}; "
            f"prepare the data with the tokenizer of the model"
        )
