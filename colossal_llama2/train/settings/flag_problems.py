"""Problems of flags, alone or in combination, that can be found without reading a file: one sentence each."""

import argparse
from collections import Counter
from collections.abc import Sequence

from colossal_llama2 import tracker_names
from colossal_llama2.cli.dependent_flags import unused_flags
from colossal_llama2.cli.train_flags import train_parser, train_sft_parser
from colossal_llama2.cli.value_types import task_list
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.engine.settings_problems import length_problems, settings_problems
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import check_is_utf8

# Steps of --benchmark that are not timed: the first allocate, tune kernels and fill caches, and the profiler slows down
# the last.
WARMUP_STEPS, PROFILED_STEPS = 3, 2
_ROWS_AND_EMBEDDINGS = (
    "--train_new_rows_only trains new rows of the embeddings, --freeze_non_embeds_params all of their rows; "
    "give one of them"
)
_ADAPTER_AND_EMBEDDINGS = (
    "--lora_rank trains an adapter of the layers, --freeze_non_embeds_params nothing of them; give one of them"
)


def flag_problems(
    given: argparse.Namespace, args: argparse.Namespace, settings: EngineSettings, world_size: int
) -> list[str]:
    """All problems.

    Args:
        given: the flags as they were parsed, in which dependent flags that were not given are None.
        args: the same with the defaults of dependent flags.
        world_size: number of processes.
    """
    problems = unused_flags(given)
    problems += settings_problems(settings, world_size=world_size)
    problems += _dry_run_problems(args) + _benchmark_problems(args, settings, world_size) + _utf8_problems(args)
    problems += length_problems(settings, args.max_length)
    if args.train_new_rows_only and args.freeze_non_embeds_params:
        problems.append(_ROWS_AND_EMBEDDINGS)
    if args.lora_rank is not None and args.freeze_non_embeds_params:
        problems.append(_ADAPTER_AND_EMBEDDINGS)
    return problems + _evaluation_problems(args) + _tracker_problems(args)


def _tracker_problems(args: argparse.Namespace) -> list[str]:
    return [
        f"--report_to {name}: its package is not installed; run {tracker_names.install_command(name)}, or leave it out"
        for name in args.report_to.split(",")
        if not tracker_names.is_installed(name)
    ]


def _dry_run_problems(args: argparse.Namespace) -> list[str]:
    if args.suggest:
        return suggestion_problems(args)
    if args.num_ranks is None or args.dry_run:
        return []
    return [f"--num_ranks {args.num_ranks} needs --dry_run; a run has the processes of its launcher"]


def suggestion_problems(args: argparse.Namespace) -> list[str]:
    """The problems of --dry_run --suggest, which refuses flags that it varies or does not use."""
    problems = [] if args.dry_run else ["--suggest needs --dry_run, which trains nothing"]
    if args.mixed_precision == "fp32":
        problems.append("--mixed_precision fp32 is for tests, and --suggest compares GPUs; give bf16 or fp16")
    if args.pretrained is not None and args.model_size is not None:
        problems.append(f"--model_size {args.model_size} takes the place of --pretrained {args.pretrained}; give one")
    if args.train_new_rows_only and args.pretrained is None:
        problems.append("--train_new_rows_only needs --pretrained, whose config.json lists the new rows")
    defaults = PARSERS[args.stage]().defaults
    problems += [
        f"--{name}{'' if value is True else f' {value}'} has no effect with --suggest, {why}; leave it out"
        for name, why in _NOT_SUGGESTED.items()
        if (value := getattr(args, name, None)) != defaults.get(name)
    ]
    if args.train_new_rows_only and args.freeze_non_embeds_params:
        problems.append(_ROWS_AND_EMBEDDINGS)
    if args.lora_rank is not None and args.freeze_non_embeds_params:
        problems.append(_ADAPTER_AND_EMBEDDINGS)
    return problems


PARSERS = {"pretrain": train_parser, "sft": train_sft_parser}
_VARIED = "which compares all of them"
_SAME_COST, _NO_EVALUATION = "since it changes neither memory nor time", "which evaluates nothing"
_NO_OUTPUT = "which writes nothing"
_NOT_SUGGESTED = {
    **dict.fromkeys(("plugin", "tp", "pp", "sp", "zero", "sp_mode", "enable_sequence_parallelism"), _VARIED),
    **dict.fromkeys(("micro_batch_size", "microbatch_size", "accumulation_steps"), _VARIED),
    **dict.fromkeys(("dataset", "eval_dataset", "num_samples"), "which reads no data (--tokens is their number)"),
    **dict.fromkeys(("bucketed", "mixture", "mixture_end", "group_by_length", "continue_data"), "which reads no data"),
    "document_mask": "which plans for samples of several documents",
    **dict.fromkeys(("lr", "weight_decay", "warmup_steps", "seed", "lora_alpha", "use_neft", "neft_alpha"), _SAME_COST),
    **dict.fromkeys(("num_epochs", "max_steps"), "which plans for --tokens"),
    **dict.fromkeys(("max_bad_steps", "dist_timeout"), "which trains nothing"),
    **dict.fromkeys(("eval_tasks", "eval_limit", "eval_num_fewshot"), _NO_EVALUATION),
    **dict.fromkeys(("eval_interval", "eval_prompts", "eval_prompt_tokens"), _NO_EVALUATION),
    **dict.fromkeys(("forgetting_alarm", "on_forgetting"), _NO_EVALUATION),
    **dict.fromkeys(("save_dir", "save_interval", "skip_save_each_epoch", "keep_last", "keep_every"), _NO_OUTPUT),
    **dict.fromkeys(("report_to", "tensorboard_dir", "config_file"), _NO_OUTPUT),
    **dict.fromkeys(("load_checkpoint", "resume"), "which reads no checkpoint"),
    **dict.fromkeys(("benchmark", "profile"), "which measures nothing"),
    "peak_tflops": "which plans for a --gpu",
}


def _benchmark_problems(args: argparse.Namespace, settings: EngineSettings, world_size: int) -> list[str]:
    if not args.benchmark:
        return ["--profile needs --benchmark"] if args.profile is not None else []
    problems = []
    if args.profile is not None and args.dry_run:
        problems.append(f"--profile {args.profile} has no effect with --dry_run, which runs no step; leave it out")
    if args.continue_data:
        problems.append("--continue_data has no effect with --benchmark, which reads no data; leave it out")
    data_size = max(world_size // settings.model_ranks, 1)
    order = SampleOrder(args.num_samples, settings.micro_batch_size, data_size, settings.accumulation_steps, args.seed)
    least, steps = WARMUP_STEPS + 1 + PROFILED_STEPS, order.steps_after(0)
    if steps < least:
        needed = least * order.samples_per_micro_step * order.accumulation_steps
        problems.append(f"--num_samples {args.num_samples}: only {counted(steps, 'step')}; give at least {needed}")
    return problems


def _utf8_problems(args: argparse.Namespace) -> list[str]:
    """Flags that cannot be recorded in a checkpoint, since they are not UTF-8; a path may have any bytes."""
    problems = []
    for name, value in vars(args).items():
        for word in value if isinstance(value, (list, tuple)) else [value]:
            try:
                check_is_utf8(str(word), f"--{name}")
            except UserError as error:
                problems.append(str(error))
    return problems


def _evaluation_problems(args: argparse.Namespace) -> list[str]:
    sets = [word.partition("=")[0] for word in args.eval_dataset or ()]
    tasks = [name for name, _ in task_list(args.eval_tasks)] if args.eval_tasks else []
    names = [*sets, *tasks]
    problems = [
        f"--eval_dataset {name}: --eval_tasks has a task of this name; give the data another name"
        for name in dict.fromkeys(sets)
        if name in tasks
    ]
    problems += _alarm_problems(args.forgetting_alarm or (), names, tasks)
    if args.eval_interval is not None and not names:
        problems.append("--eval_interval needs --eval_dataset or --eval_tasks")
    if args.benchmark:
        problems += [
            f"{flag} has no effect with --benchmark; leave one of them out"
            for flag, given in (("--eval_dataset", sets), ("--eval_tasks", tasks))
            if given
        ]
    return problems


def _alarm_problems(given: Sequence[str], names: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """The problems of --forgetting_alarm, given what is measured, and which of that are tasks."""
    words = [word.rpartition("=") for word in given]
    alarms = Counter(name for name, _, _ in words)
    problems = [
        f"--forgetting_alarm: {name} is named {count} times; name it once"
        for name, count in alarms.items()
        if count > 1
    ]
    problems += [
        f"--forgetting_alarm {name}: there is no --eval_dataset or task of --eval_tasks of that name; give one of "
        f"{', '.join(names) or 'none'}"
        for name in alarms
        if name not in names
    ]
    problems += [
        f"--forgetting_alarm {name}={limit}: an accuracy cannot fall by that much; give a number below 1, such as 0.1 "
        "for 10 points"
        for name, _, limit in words
        if name in tasks and float(limit) >= 1
    ]
    return problems
