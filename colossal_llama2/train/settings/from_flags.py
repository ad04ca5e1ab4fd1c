"""Flags to TrainConfig, once: quickly, before torch is imported, and with all problems in one message."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import used_flags, with_defaults
from colossal_llama2.cli.value_types import task_list
from colossal_llama2.dataset.layout.chat_data import chat_data_of
from colossal_llama2.dataset.layout.manifest import check_parts_fit
from colossal_llama2.dataset.read.eval_sets import resolve_eval_sets
from colossal_llama2.dataset.read.sources import Data, resolve_data
from colossal_llama2.dataset.write.sample_lengths import check_max_length, check_samples_fit
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.registry import holds_tokenizer
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.settings import place_of
from colossal_llama2.evaluation.task import LogitTask
from colossal_llama2.evaluation.tasks import read_tasks
from colossal_llama2.inference.prompt_file import FilePrompt, read_prompts
from colossal_llama2.launcher import place
from colossal_llama2.layer_matrices import LAYER_MATRICES
from colossal_llama2.model.loading import check_model
from colossal_llama2.model.lora import LoraShape
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.storage.output_paths import check_output_folder
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.run_folder.file_names import MODEL_NAME, STATES_NAME
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.config import (
    BenchmarkConfig,
    DataConfig,
    EvaluationConfig,
    RecipeConfig,
    ReportConfig,
    SaveConfig,
    TrainConfig,
)
from colossal_llama2.train.settings.flag_problems import flag_problems
from colossal_llama2.train.settings.model_source import ModelSource, find_source, newest_source

# All of their answers are logged.
MOST_EVAL_PROMPTS = 32
# The default of python -m colossal_llama2.evaluation.
TASK_SEED = 0


class Problems(list[str]):
    """Everything that is wrong, collected."""

    def check(self, action: Callable[[], Any]) -> Any:
        """Return what `action` returns; None, with its UserError added, if it raises one."""
        try:
            return action()
        except UserError as error:
            self.append(str(error))
            return None

    def raise_any(self) -> None:
        """Raise a UserError that names all problems once, if there are any."""
        if self:
            raise UserError("; and ".join(dict.fromkeys(self)))


def resolve(args: argparse.Namespace) -> TrainConfig:
    """The settings of a run, after all checks that are quick.

    Raises:
        UserError: with all problems of the flags and of the files that they name.
    """
    config, problems = resolve_with_problems(args)
    problems.raise_any()
    return config


def resolve_with_problems(args: argparse.Namespace) -> tuple[TrainConfig, Problems]:
    """The settings of a run, and their problems; settings that cannot be resolved are missing then."""
    given, args = args, with_defaults(args)
    settings, world_size = engine_settings(args), args.num_ranks or place().world_size
    problems = Problems(flag_problems(given, args, settings, world_size))
    source = ModelSource.of_pretrained(args.pretrained)
    problems.check(lambda: _check_pretrained(source, max_length=args.max_length, needs_weights=not args.dry_run))
    if args.profile is not None and args.benchmark:
        problems.check(lambda: check_output_folder(Path(args.profile), "--profile"))
    config = TrainConfig(
        flags=vars(args),
        used_flags=used_flags(args),
        stage=args.stage,
        source=source,
        data=_data_config(args, problems),
        engine=settings,
        recipe=_recipe(args),
        saving=_saving(args),
        evaluation=_evaluation(args, problems),
        reporting=ReportConfig(args.report_to.split(","), args.tensorboard_dir, args.config_file, args.peak_tflops),
        benchmark=BenchmarkConfig(args.num_samples, args.profile) if args.benchmark else None,
        world_size=world_size,
        planned_ranks=args.num_ranks,
        timeout_seconds=args.dist_timeout,
    )
    checked = problems.check(lambda: _with_source(config, args.load_checkpoint, problems))
    return config if problems else checked, problems


def engine_settings(args: argparse.Namespace) -> EngineSettings:
    """How a step is computed, except for the rows of --train_new_rows_only, which the model's folder lists."""
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
        trainable=Trainable.from_flags(
            embeddings=args.freeze_non_embeds_params, new_rows=args.train_new_rows_only, adapter=lora_shape(args)
        ),
    )


def lora_shape(args: argparse.Namespace) -> LoraShape | None:
    """The adapter of --lora_rank; None without the flag, and for a command that has none."""
    rank = getattr(args, "lora_rank", None)
    if rank is None:
        return None
    return LoraShape(
        rank=rank,
        alpha=float(2 * rank if args.lora_alpha is None else args.lora_alpha),
        dropout=args.lora_dropout,
        targets=LAYER_MATRICES if args.lora_targets == "all" else tuple(args.lora_targets.split(",")),
        seed=args.seed,
    )


def _data_config(args: argparse.Namespace, problems: Problems) -> DataConfig:
    """With --benchmark there may be no data."""

    def parts() -> Data:
        words = args.dataset or ()
        return resolve_data(
            words,
            bucketed=args.bucketed,
            mixture=args.mixture,
            mixture_end=args.mixture_end,
            # A flag of train_sft.py alone.
            groups_by_length=getattr(args, "group_by_length", False),
        )

    found = problems.check(parts) or Data([])
    return DataConfig(found, args.max_length, args.document_mask, args.pad_token, args.continue_data)


def _recipe(args: argparse.Namespace) -> RecipeConfig:
    return RecipeConfig(
        num_epochs=args.num_epochs,
        max_steps=args.max_steps,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        gradient_checkpointing=args.use_grad_checkpoint,
        # A flag of train_sft.py alone.
        neft_alpha=args.neft_alpha if getattr(args, "use_neft", False) else None,
        max_nonfinite_steps=args.max_bad_steps,
    )


def _saving(args: argparse.Namespace) -> SaveConfig:
    return SaveConfig(
        folder=RunFolder(Path(args.save_dir)),
        interval=args.save_interval,
        skip_epoch_ends=args.skip_save_each_epoch,
        keep_last=args.keep_last,
        keep_every=args.keep_every,
        resumes_newest=args.resume == "auto",
    )


def _evaluation(args: argparse.Namespace, problems: Problems) -> EvaluationConfig:
    limits = [word.rpartition("=") for word in args.forgetting_alarm or ()]
    return EvaluationConfig(
        sets=problems.check(lambda: resolve_eval_sets(args.eval_dataset)) or (),
        tasks=problems.check(lambda: _eval_tasks(args)) or (),
        interval=args.eval_interval,
        limits={name: float(limit) for name, _, limit in limits},
        stops=args.on_forgetting == "stop",
        prompts=problems.check(lambda: _eval_prompts(args.eval_prompts)) or (),
        prompt_tokens=args.eval_prompt_tokens,
    )


def _eval_tasks(args: argparse.Namespace) -> list[LogitTask]:
    """The tasks of --eval_tasks with their items. Raises UserError, with file:line for what is wrong in a file."""
    if args.eval_tasks is None:
        return []
    flag = "--eval_tasks"
    places = [(name, place_of(name, path, flag=flag)) for name, path in task_list(args.eval_tasks)]
    try:
        tasks = read_tasks(places, num_fewshot=args.eval_num_fewshot, limit=args.eval_limit, seed=TASK_SEED)
    except UserError as error:
        # The readers of sets name the flag of their command.
        raise UserError(f"{flag}: {str(error).replace('--num_fewshot', '--eval_num_fewshot')}")
    return [cast(LogitTask, task) for task in tasks]


def _eval_prompts(path: str | None) -> list[FilePrompt]:
    prompts = [] if path is None else read_prompts(Path(path), flag="--eval_prompts")
    if len(prompts) > MOST_EVAL_PROMPTS:
        raise UserError(
            f"--eval_prompts {path}: has {len(prompts)} prompts; give at most {MOST_EVAL_PROMPTS}, since each "
            "evaluation answers them"
        )
    return prompts


def _check_pretrained(source: ModelSource, *, max_length: int, needs_weights: bool) -> None:
    check_model(source.pretrained_folder, "--pretrained", needs_weights=needs_weights)
    check_max_length(max_length, source.pretrained_folder)


def _with_source(config: TrainConfig, load_checkpoint: str | None, problems: Problems) -> TrainConfig:
    """The settings with the weights that are loaded; other problems are added to `problems` or raised."""
    if config.benchmark:
        return config if problems else config.with_source(config.source)
    folder = config.saving.folder
    source = find_source(config.source.pretrained, load_checkpoint)
    source = newest_source(folder, otherwise=source) if config.saving.resumes_newest else source
    source = source.sharing(config.source)
    if source.weights != source.pretrained:
        check_model(source.weights_folder, "--load_checkpoint")
    folder.check_unclaimed(source.checkpoint)
    if config.data.continues and source.checkpoint is None and not Path(source.trained, "..", STATES_NAME).is_file():
        problems.append(
            f"--continue_data needs --load_checkpoint CHECKPOINT/{MODEL_NAME}, whose {STATES_NAME} records the "
            f"place in the data"
        )
    run_outputs.check_places(folder, config.reporting.tensorboard_dir, config.reporting.config_file)
    config = config.with_source(source)
    return config if problems else _with_data(config)


def _with_data(config: TrainConfig) -> TrainConfig:
    """The settings with the data's chat template, after its manifests are compared with the stage and the model."""
    tokenizer_dir: str | None = config.source.tokenizer
    if config.evaluation.tasks and not holds_tokenizer(config.source.tokenizer):
        raise UserError(
            f"--eval_tasks needs the tokenizer of the model, and {config.source.tokenizer} has none; copy its files "
            "there, or leave --eval_tasks out"
        )
    if config.flags["dry_run"] and not holds_tokenizer(config.source.tokenizer):
        logs.get_logger().info("%s has no tokenizer, so none is compared with data and model", config.source.tokenizer)
        config, tokenizer_dir = replace(config, has_tokenizer=False), None
    check_tokenizer_files(config.source.tokenizer)
    paths, eval_paths = config.data.parts.paths, [eval_set.path for eval_set in config.evaluation.sets]
    check_parts_fit(paths, stage=config.stage, tokenizer_dir=tokenizer_dir)
    check_parts_fit(eval_paths, stage=config.stage, tokenizer_dir=tokenizer_dir, flag="--eval_dataset")
    check_samples_fit(paths, config.source.weights_folder)
    check_samples_fit(eval_paths, config.source.weights_folder, flag="--eval_dataset")
    if config.stage != "sft":
        return config
    chat = chat_data_of(paths)
    if chat is not None:
        chat_data_of(eval_paths, flag="--eval_dataset", other=chat)
    return replace(config, chat=chat)


def resolved_again(config: TrainConfig) -> TrainConfig:
    """The settings when the run folder is locked: another run may have saved there after they were resolved.

    Raises:
        UserError: as `resolve`.
    """
    if config.saving.resumes_newest:
        config = config.with_source(newest_source(config.saving.folder, otherwise=config.source))
    config.saving.folder.check_unclaimed(config.source.checkpoint)
    return config
