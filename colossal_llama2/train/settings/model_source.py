"""Where a run gets its weights from: the folder that --pretrained names, and what is loaded instead of it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.encoding.file_names import CONFIG_FILE as TOKENIZER_CONFIG
from colossal_llama2.engine.patches.checkpoint_io import OPTIMIZER_INDEX
from colossal_llama2.errors import UserError
from colossal_llama2.model.adapter_files import check_adapter_weights, check_same_adapter, is_adapter, read_adapter
from colossal_llama2.model.config_fields import ModelFolder
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import MODEL_NAME, OPTIMIZER_NAME, SCHEDULE_NAME, STATES_NAME
from colossal_llama2.train.run_folder.run_folder import RunFolder

OTHER_CHECKPOINT = "; resume from another checkpoint"


@dataclass(frozen=True)
class ModelSource:
    """The model that a run names, the weights that it loads, and the checkpoint that it resumes.

    Attributes:
        pretrained: the folder that --pretrained names.
        weights: the folder that the weights come from: `pretrained`, or the modeling/ folder of a checkpoint.
        adapter: the folder of the adapter that is loaded in addition; None without one.
        checkpoint: the checkpoint that the run resumes; None if it starts at step 0.
        is_newest: --resume auto chose the checkpoint, and may choose the one before it.
        folders: the model folders by path, which keep what was read of them.
    """

    pretrained: str
    weights: str
    checkpoint: str | None = None
    adapter: str | None = None
    is_newest: bool = False
    folders: dict[str, ModelFolder] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_pretrained(cls, pretrained: str) -> "ModelSource":
        """The weights of --pretrained itself."""
        return cls(pretrained, pretrained)

    @property
    def pretrained_folder(self) -> ModelFolder:
        """The folder of --pretrained, whose config.json is read once."""
        return self.folders.setdefault(self.pretrained, ModelFolder(self.pretrained))

    @property
    def weights_folder(self) -> ModelFolder:
        """The folder of the weights, whose config.json is read once."""
        return self.folders.setdefault(self.weights, ModelFolder(self.weights))

    def sharing(self, other: "ModelSource") -> "ModelSource":
        """The same source, with the folders that another one has read."""
        return replace(self, folders=other.folders)

    def as_values(self) -> dict[str, Any]:
        """The arguments that make this source on another rank, as JSON values."""
        names = ("pretrained", "weights", "checkpoint", "adapter", "is_newest")
        return {name: getattr(self, name) for name in names}

    @property
    def trained(self) -> str:
        """The folder that was trained last: the adapter, or else the weights. It has the history of both."""
        return self.adapter or self.weights

    @property
    def tokenizer(self) -> str:
        """The folder of the run's tokenizer: that of the weights, or --pretrained if that one has no tokenizer."""
        return self.weights if has_tokenizer(self.weights) else self.pretrained


def has_tokenizer(folder: str) -> bool:
    """Whether a model folder has a tokenizer too."""
    return Path(folder, TOKENIZER_CONFIG).is_file()


def find_source(pretrained: str, load_checkpoint: str | None) -> ModelSource:
    """What --load_checkpoint requests, by the folder's content and not by its name: a resumed run, or only weights.

    Raises:
        UserError: it is neither a checkpoint nor a model folder.
    """
    if load_checkpoint is None:
        return ModelSource.of_pretrained(pretrained)
    folder = Path(load_checkpoint)
    if not folder.is_dir() and folder.name == "modelling" and folder.with_name(MODEL_NAME).is_dir():
        folder = folder.with_name(MODEL_NAME)
    if not folder.is_dir():
        raise UserError(
            f"--load_checkpoint {load_checkpoint}: no such folder; give a checkpoint, or its {MODEL_NAME} folder"
        )
    if (folder / STATES_NAME).is_file():
        for part in (f"{OPTIMIZER_NAME}/{OPTIMIZER_INDEX}", SCHEDULE_NAME):
            if not (folder / part).is_file():
                raise UserError(f"--load_checkpoint {load_checkpoint}: has no {part}{OTHER_CHECKPOINT}")
        problem = checkpoint_files.sizes_problem(folder)
        if problem:
            raise UserError(f"--load_checkpoint {problem}{OTHER_CHECKPOINT}")
        return _source_of(pretrained, folder / MODEL_NAME, checkpoint=str(folder))
    if (folder / "config.json").is_file() or is_adapter(folder):
        return _source_of(pretrained, folder)
    inside = checkpoint_files.complete_checkpoints(folder)
    cure = f"; it holds checkpoints: give {load_checkpoint}/{inside[-1].name}" if inside else ""
    raise UserError(
        f"--load_checkpoint {load_checkpoint}: holds neither {STATES_NAME} (a checkpoint to resume) "
        f"nor config.json (a {MODEL_NAME} folder to load weights from){cure}"
    )


def _source_of(pretrained: str, model: Path, *, checkpoint: str | None = None) -> ModelSource:
    """The source for a saved model, or for an adapter, whose base is --pretrained."""
    if is_adapter(model):
        return ModelSource(pretrained, pretrained, checkpoint, adapter=str(model))
    return ModelSource(pretrained, str(model), checkpoint)


def check_adapter(source: ModelSource, trainable: Trainable) -> None:
    """Raise a UserError if a run with --lora_rank loads other things than adapters, or one without it loads one."""
    if trainable.adapter is not None and source.weights != source.pretrained:
        raise UserError(
            f"--load_checkpoint {source.checkpoint or source.weights}: holds a whole model, but --lora_rank trains an "
            f"adapter of --pretrained; give --pretrained {source.weights}, and leave --load_checkpoint out"
        )
    if source.adapter is None:
        return
    if trainable.adapter is None:
        raise UserError(
            f"--load_checkpoint {source.checkpoint or source.adapter}: holds an adapter; give the --lora_rank of its "
            f"run, or merge it and name the result with --pretrained (python -m colossal_llama2.model.merge_lora)"
        )
    adapter = read_adapter(source.adapter)
    check_same_adapter(adapter, trainable, flag="--load_checkpoint")
    check_adapter_weights(adapter, source.weights_folder.fields)


def newest_source(folder: RunFolder, *, otherwise: ModelSource, before: str | None = None) -> ModelSource:
    """Resume the newest checkpoint of a run whose files have the right sizes (--resume auto).

    Args:
        otherwise: what to return if the folder has no checkpoint at all.
        before: a checkpoint; only those written before it are considered.

    Raises:
        UserError: there are checkpoints, and none of them is complete.
    """
    complete = folder.checkpoints()
    if before is not None:
        complete = complete[: complete.index(Path(before))] if Path(before) in complete else []
    problem = first_problem = None
    for checkpoint in reversed(complete):
        try:
            found = find_source(otherwise.pretrained, str(checkpoint))
            return replace(found, is_newest=True)
        except UserError as error:
            problem = str(error).removeprefix("--load_checkpoint ").removesuffix(OTHER_CHECKPOINT)
            first_problem = first_problem or problem
            log_skipped(problem)
    if problem or before is not None:
        why = f" ({first_problem})" if first_problem else ""
        cure = "give a new --save_dir to start from the beginning"
        raise UserError(f"--resume auto: no checkpoint in {folder} is complete and intact{why}; {cure}")
    return otherwise


def log_skipped(problem: str) -> None:
    """Log why --resume auto does not resume a checkpoint."""
    logs.get_logger().warning("--resume auto: %s; trying the checkpoint before it", problem)
