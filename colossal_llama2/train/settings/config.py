"""All settings of a training run, resolved: files that flags name are found, and all values are typed.

`from_flags.resolve` makes a TrainConfig once, from the parsed flags. Code below it does not use the flags.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from colossal_llama2.dataset.layout.chat_data import ChatData
from colossal_llama2.dataset.read.eval_sets import EvalSet
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.evaluation.task import LogitTask
from colossal_llama2.inference.prompt_file import FilePrompt
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.model_source import ModelSource, check_adapter


@dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes batches.

    Attributes:
        parts: the prepared folders with their sources, buckets and mixture; without any for --benchmark.
        max_length: tokens of the longest sample.
        document_mask: auto, on or off.
        pad_token: unk or eos, the token that pads a batch.
        continues: start where the checkpoint whose weights are loaded stopped reading (--continue_data).
    """

    parts: Data
    max_length: int
    document_mask: str
    pad_token: str
    continues: bool


@dataclass(frozen=True)
class RecipeConfig:
    """How the model is trained, besides the engine's settings.

    Attributes:
        num_epochs: passes over the data. `max_steps` ends the run earlier; None does not.
        warmup_steps: optimizer steps of linear warm-up; None for a share of all steps.
        seed: of the data order and of NEFTune.
        gradient_checkpointing: recompute activations in the backward pass.
        neft_alpha: scale of NEFTune's noise; None for no noise.
        max_nonfinite_steps: steps with a NaN/Inf loss or gradient norm that may be skipped.
    """

    num_epochs: int
    max_steps: int | None
    warmup_steps: int | None
    seed: int
    gradient_checkpointing: bool
    neft_alpha: float | None
    max_nonfinite_steps: int


@dataclass(frozen=True)
class SaveConfig:
    """Where and when checkpoints are saved.

    Attributes:
        interval: optimizer steps between two checkpoints.
        skip_epoch_ends: do not save at the end of an epoch, unless the run ends with it.
        keep_last: number of the newest checkpoints to keep; None for all.
        keep_every: also keep checkpoints whose step is a multiple of this.
        resumes_newest: resume the newest checkpoint in `folder`, if there is one (--resume auto).
    """

    folder: RunFolder
    interval: int
    skip_epoch_ends: bool
    keep_last: int | None
    keep_every: int | None
    resumes_newest: bool


@dataclass(frozen=True)
class EvaluationConfig:
    """What the model is evaluated on.

    Attributes:
        sets: name and folder of each --eval_dataset.
        tasks: those of --eval_tasks, with their items.
        interval: optimizer steps between two evaluations; None for only the ends of epochs.
        limits: name of a set -> share of the first value by which its figure may rise; name of a task -> by how much
            its accuracy may fall (--forgetting_alarm).
        stops: end the run when a figure is beyond its limit, instead of a warning.
        prompts: those of --eval_prompts, which are answered at each evaluation.
        prompt_tokens: of an answer, at most.
    """

    sets: Sequence[EvalSet]
    tasks: Sequence[LogitTask]
    interval: int | None
    limits: Mapping[str, float]
    stops: bool
    prompts: Sequence[FilePrompt]
    prompt_tokens: int

    @property
    def measures(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self.sets or self.tasks)


@dataclass(frozen=True)
class ReportConfig:
    """Where the run is reported, and the peak of one device in TFLOPS, if it was given.

    Attributes:
        trackers: names of --report_to.
        tensorboard_dir: folder for the local files of trackers.
    """

    trackers: Sequence[str]
    tensorboard_dir: str
    config_file: str
    peak_tflops: float | None


@dataclass(frozen=True)
class BenchmarkConfig:
    """Number of random samples, and the folder for the profiler's trace, if any."""

    num_samples: int
    profile_dir: str | None


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training command.

    Attributes:
        flags: every flag by name, with its value or default, as checkpoints record them.
        used_flags: those that have an effect beside the others, as settings.json records them.
        stage: pretrain or sft.
        chat: the template of the conversations in the data; None if it has none.
        benchmark: None unless steps are measured instead of trained.
        world_size: number of processes of the job, or of the one that a dry run plans for.
        planned_ranks: the number that --num_ranks gives; None without the flag.
        timeout_seconds: how long ranks wait for each other.
        has_tokenizer: False only in a dry run for a model without a tokenizer, which then is compared with nothing.
    """

    flags: Mapping[str, Any]
    used_flags: Mapping[str, Any]
    stage: str
    source: ModelSource
    data: DataConfig
    engine: EngineSettings
    recipe: RecipeConfig
    saving: SaveConfig
    evaluation: EvaluationConfig
    reporting: ReportConfig
    benchmark: BenchmarkConfig | None
    world_size: int
    planned_ranks: int | None
    timeout_seconds: float
    chat: ChatData | None = None
    has_tokenizer: bool = True

    def with_source(self, source: ModelSource) -> "TrainConfig":
        """The same settings for other weights.

        Raises:
            UserError: --train_new_rows_only finds no new rows, or --lora_rank an adapter that it cannot continue.
        """
        source = source.sharing(self.source)
        check_adapter(source, self.engine.trainable)
        trainable = self.engine.trainable.of_model(source.weights_folder)
        return replace(self, source=source, engine=replace(self.engine, trainable=trainable))
