"""The settings of the self-test, resolved from its flags once, and those of the training runs that it starts."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.cli import train_flags
from colossal_llama2.cli.dependent_flags import unused_flags, with_defaults
from colossal_llama2.engine.settings_problems import settings_problems
from colossal_llama2.errors import UserError

if TYPE_CHECKING:
    from colossal_llama2.train.settings.config import TrainConfig

MAX_LENGTH = 128
# In --work_dir.
MODEL_NAME, DATA_NAME = "model", "part-00000"


@dataclass(frozen=True)
class SelftestConfig:
    """What the self-test trains, and how the plain loop repeats it.

    The plain loop computes with the values of the flags, not with the settings of the runs that it checks.

    Attributes:
        work_dir: new folder that all hosts share.
        steps: optimizer steps of a run.
        samples_per_step: samples of a step, over all ranks.
        precision: fp32 or bf16.
        max_norm: gradients are clipped to this norm.
        warmup_steps: optimizer steps of linear warm-up; None for a share of all steps.
        seed: of the data order.
        document_mask: auto, on or off.
        embeddings_only: whether all other parameters are frozen.
        training_flags: the flags of train.py that the self-test has too, by name.
    """

    work_dir: Path
    steps: int
    samples_per_step: int
    plugin: str
    precision: str
    learning_rate: float
    weight_decay: float
    max_norm: float
    warmup_steps: int | None
    seed: int
    document_mask: str
    embeddings_only: bool
    training_flags: Mapping[str, Any]

    def home(self, name: str) -> Path:
        """The folder of one of the training runs."""
        return self.work_dir / name

    @property
    def model_dir(self) -> Path:
        """The folder of the model that is trained, with its tokenizer."""
        return self.work_dir / MODEL_NAME

    @property
    def data_dir(self) -> Path:
        """The folder of the prepared samples."""
        return self.work_dir / DATA_NAME

    @property
    def middle(self) -> int:
        """The step after which the runs save a checkpoint."""
        return self.steps // 2

    def run_config(self, name: str, *, load_checkpoint: Path | None = None) -> "TrainConfig":
        """The settings of one training run, as train.py resolves them.

        Raises:
            UserError: the model or the data cannot be used.
        """
        from colossal_llama2.train.settings import from_flags

        args = _train_args(self.training_flags, work_dir=self.work_dir, name=name, save_interval=self.middle)
        args.load_checkpoint = None if load_checkpoint is None else str(load_checkpoint)
        return from_flags.resolve(args)


def resolve(args: argparse.Namespace, *, ranks: int) -> SelftestConfig:
    """The settings for parsed flags and a number of ranks.

    Raises:
        UserError: the flags do not fit each other or the ranks, or --work_dir is not a new folder.
    """
    from colossal_llama2.train.settings import from_flags

    work_dir, own = Path(args.work_dir), ("work_dir", "steps")
    flags = {name: value for name, value in vars(args).items() if name not in own}
    train_args = _train_args(flags, work_dir=work_dir, name="whole", save_interval=args.steps // 2)
    engine = from_flags.engine_settings(with_defaults(train_args))
    problems = unused_flags(args) + settings_problems(engine, world_size=ranks)
    if logs.is_first_rank() and os.path.lexists(work_dir):
        problems.append(f"--work_dir {work_dir} already exists; give a new folder, which all hosts share")
    if args.mixed_precision == "fp16":
        problems.append("--mixed_precision fp16 is not compared, it is bf16 with a loss scale; give bf16 or fp32")
    if problems:
        raise UserError("; and ".join(problems))
    return SelftestConfig(
        work_dir=work_dir,
        steps=args.steps,
        samples_per_step=args.micro_batch_size * args.accumulation_steps * (ranks // engine.model_ranks),
        plugin=args.plugin,
        precision=args.mixed_precision,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        max_norm=args.gradient_clipping,
        warmup_steps=args.warmup_steps,
        seed=args.seed,
        document_mask=args.document_mask,
        embeddings_only=args.freeze_non_embeds_params,
        training_flags=flags,
    )


def _train_args(flags: Mapping[str, Any], *, work_dir: Path, name: str, save_interval: int) -> argparse.Namespace:
    """The flags of one training command in the work folder."""
    required = ["--pretrained", str(work_dir / MODEL_NAME), "--dataset", str(work_dir / DATA_NAME)]
    args = train_flags.train_parser().parse_args(required)
    paths = {"save_dir": "checkpoints", "tensorboard_dir": "logs", "config_file": "config.json"}
    vars(args).update({key: value for key, value in flags.items() if hasattr(args, key)})
    vars(args).update({key: str(work_dir / name / path) for key, path in paths.items()})
    vars(args).update(max_length=MAX_LENGTH, num_epochs=1, save_interval=save_interval)
    return args
