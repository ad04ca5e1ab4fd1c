"""What the flags of a run mean, as its parts take them."""

import argparse
from pathlib import Path

from colossal_llama2.cli.dependent_flags import with_defaults
from colossal_llama2.dataset.read.batch import Collator
from colossal_llama2.dataset.read.buckets import Buckets
from colossal_llama2.dataset.read.loss_groups import Groups
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Data, resolve_data
from colossal_llama2.encoding.encoder import CONFIG_FILE, load_tokenizer
from colossal_llama2.engine.settings import EngineSettings, Ranks
from colossal_llama2.launcher import place
from colossal_llama2.model.freezing import Ranges, read_new_rows
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.train.checkpointing.checkpointer import LoadPlan
from colossal_llama2.train.forecast import data_plan as plans


def engine_settings(args: argparse.Namespace, *, trained_rows: Ranges | None = None) -> EngineSettings:
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


def rows_to_train(args: argparse.Namespace, plan: LoadPlan) -> Ranges | None:
    """The rows of --train_new_rows_only, None without it. Raises UserError if the model does not tell which are new."""
    return read_new_rows(plan.model_path) if args.train_new_rows_only else None


def world_size_of(args: argparse.Namespace) -> int:
    """Processes of the job: those of the launcher, or with --dry_run those that --num_ranks names."""
    return args.num_ranks or place().world_size


def data_of(args: argparse.Namespace) -> Data:
    """The parts that the flags name, quickly; with --benchmark there may be none."""
    args = with_defaults(args)
    return resolve_data(args.dataset or (), bucketed=args.bucketed, mixture=args.mixture, mixture_end=args.mixture_end)


def sample_order(
    args: argparse.Namespace, num_samples: int, engine: Ranks, buckets: Buckets | None = None
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


def find_tokenizer(args: argparse.Namespace, plan: LoadPlan) -> str:
    """The folder that has the run's tokenizer: the loaded checkpoint, or --pretrained if that holds none."""
    return plan.model_path if has_tokenizer(plan.model_path) else args.pretrained


def has_tokenizer(folder: str) -> bool:
    """True if a model folder has a tokenizer too."""
    return Path(folder, CONFIG_FILE).is_file()


def make_collator(
    args: argparse.Namespace, tokenizer_path: str, groups: Groups | None = None, *, keeps_apart: bool = True
) -> Collator:
    """Pads with <unk> in pre-training and with </s> in fine-tuning, as the original does."""
    tokenizer = load_tokenizer(tokenizer_path, pad_token=args.pad_token)
    return Collator(
        pad_token_id=tokenizer.pad_token_id,
        max_length=args.max_length,
        length_divisor=engine_settings(args).sequence_shards,
        groups=groups,
        keeps_apart=keeps_apart,
    )
