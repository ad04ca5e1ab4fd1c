"""Writes one checkpoint: its content, and the order in which it is written.

    <save_dir>/epoch-0_step-400/
        modeling/              Hugging Face model (safetensors), config and tokenizer
        optimizer/             Adam's moments (safetensors) and parameter groups
        master_weights/        in half precision: the float32 weights of every rank (safetensors)
        lr_scheduler           the schedule's numbers (JSON)
        running_states.json    epoch, step, samples and tokens consumed, random states, settings, versions
        manifest.json          every file with its bytes and sha256; written last
    <save_dir>/latest          the name of the checkpoint that was written last

A checkpoint is written under a name that ends in .tmp, and renamed when all of it is on the disk. Each job uses another
such name. So if a job was cut off and comes back, after another one has taken over and has removed what it left, there
is nothing that it could rename.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.dataset.layout.chat_data import ChatData
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.model.training_history import HISTORY_FILE
from colossal_llama2.storage.files import discard, write_contents, write_json
from colossal_llama2.storage.publishing import publish
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory
from colossal_llama2.train.checkpointing.new_rows_report import NewRowsReport
from colossal_llama2.train.checkpointing.run_facts import RunFacts
from colossal_llama2.train.checkpointing.small_files import json_bytes, model_files
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import (
    MODEL_NAME,
    OLD_SUFFIX,
    OPTIMIZER_NAME,
    PARTIAL_SUFFIX,
    SCHEDULE_NAME,
    STATES_NAME,
)
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.model_source import ModelSource
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.state import TrainState

if TYPE_CHECKING:
    from colossal_llama2.engine.engine import Engine

# Files of a checkpoint, and the folders in it, besides those that each rank writes.
LEAST_FILES = 16
# What a save needs besides the files of the checkpoint: its folders, its manifest, `latest` while it is replaced.
OTHER_FILES = 8


@dataclass(frozen=True)
class Written:
    """A checkpoint that is complete.

    Attributes:
        num_bytes: of all its files.
        seal_seconds: the time to hash the files and to wait for the disk.
        figures: of the new rows, to be reported; see NewRowsReport.
    """

    folder: Path
    num_bytes: int
    seal_seconds: float
    figures: dict[str, float]


@dataclass(frozen=True)
class CheckpointContent:
    """The content of every checkpoint of a run besides weights and optimizer.

    Attributes:
        source: the model whose configuration and tokenizer are copied into every saved model.
        stage: pretrain or sft, which every saved model records.
        schedule: the learning rate.
        facts: what does not change during the run.
        evaluations: grows during the run; each checkpoint has those so far.
        chat: the template of the conversations in the data.
        new_rows: on rank 0, examines each saved model with --train_new_rows_only.
        adapter_files: the small files of an adapter, see `small_files.files_of_adapter`; none for a whole model.
        history: called on rank 0; returns the content of a saved model's training_history.json, None for no file.
    """

    source: ModelSource
    stage: str
    schedule: CosineSchedule
    facts: RunFacts
    evaluations: EvaluationHistory
    chat: ChatData | None = None
    new_rows: NewRowsReport | None = None
    adapter_files: dict[str, bytes] = field(default_factory=dict)
    history: Callable[[], dict[str, Any] | None] | None = None


class CheckpointWriter:
    """Writes checkpoints to a run's folder. All ranks call its methods together."""

    def __init__(self, engine: "Engine", folder: RunFolder, content: CheckpointContent, *, expected_bytes: int = 0):
        """
        Args:
            expected_bytes: size of a checkpoint, as far as it is known before the first is written.
        """
        self._engine, self._folder, self._content = engine, folder, content
        self._partial_suffix = partial_suffix()
        self._expected_bytes, self._expected_files = expected_bytes, LEAST_FILES + engine.world_size
        # Read now: the checkpoint that the run resumed may be removed or moved during the run.
        self._model_files: dict[str, bytes] = {}
        with engine.first_rank_only() as first:
            if first:
                source = content.source
                self._model_files = model_files(
                    source.weights_folder,
                    source.tokenizer,
                    engine.settings.precision,
                    stage=content.stage,
                    chat=content.chat,
                )
                self._model_files.update(content.adapter_files)

    def check_room(self) -> None:
        """Raise RunError, on all ranks, unless there is room for a checkpoint. Creates --save_dir if needed."""
        with self._engine.first_rank_only() as first:
            if first:
                self._folder.check_held()
                self._folder.check_room(self._expected_bytes, files=self._expected_files)

    def write(self, state: TrainState) -> Written:
        """Write the checkpoint of this state.

        Raises:
            RunError: on all ranks, if one of them cannot write; then nothing of it is left.
        """
        final = self._folder.checkpoint(epoch=state.epoch, step=state.step)
        partial = final.with_name(final.name + self._partial_suffix)
        self.check_room()
        try:
            self._write_parts(state, partial)
            figures = self._new_rows_figures(partial)
            written = time.monotonic()
            self._seal(partial, final)
        except (UserError, RunError) as error:
            # Free the space that the incomplete checkpoint takes.
            self._remove(partial)
            raise RunError(f"{final} cannot be written ({error}); earlier checkpoints are complete")
        return Written(final, self._expected_bytes, time.monotonic() - written, figures)

    def rehearse(self, state: TrainState) -> None:
        """Write a checkpoint without its tensors, rename it, and remove it. Called on all ranks.

        What can fail because of the folder, file names or the content of small files fails here, before step 1.

        Raises:
            UserError, RunError: on all ranks.
        """
        self.check_room()
        final = self._folder.checkpoint(epoch=state.epoch, step=state.step)
        # Names that a later run removes, if this one dies here.
        partial, aside = (final.with_name(final.name + suffix) for suffix in (self._partial_suffix, OLD_SUFFIX))
        try:
            self._make_folders(partial)
            # Every rank writes files of its own, perhaps from another host.
            own = partial / (resume_state.MASTERS_NAME if resume_state.has_masters(self._engine) else OPTIMIZER_NAME)
            with collectives.all_or_none():
                own.mkdir(exist_ok=True)
                (own / f"rank-{self._engine.rank:05d}").touch()
            self._write_small_files(state, partial)
            with self._engine.first_rank_only() as first:
                if first:
                    entries = checkpoint_files.file_entries(partial, checkpoint_files.list_files(partial))
                    json_bytes(entries, f"the names of the files in {partial}")
                    publish(partial, aside, replace=True)
        except (UserError, RunError) as error:
            self._remove(partial, aside)
            raise type(error)(f"--save_dir {self._folder}: no checkpoint can be written there ({error})")
        self._remove(aside)

    def _new_rows_figures(self, partial: Path) -> dict[str, float]:
        """The figures of --train_new_rows_only, on rank 0. Raises RunError, on all ranks, if other rows changed."""
        new_rows = self._content.new_rows
        with self._engine.first_rank_only() as first:
            return new_rows.examine(partial / MODEL_NAME) if first and new_rows is not None else {}

    def _remove(self, *folders: Path) -> None:
        # With a barrier: a rank that exits early would kill the others, rank 0 in the middle of this.
        with self._engine.first_rank_only() as first:
            for folder in folders if first else ():
                discard(folder)

    def _write_parts(self, state: TrainState, partial: Path) -> None:
        self._make_folders(partial)
        self._engine.save_model(str(partial / MODEL_NAME))
        self._engine.save_optimizer(str(partial / OPTIMIZER_NAME))
        self._engine.save_masters(str(partial / resume_state.MASTERS_NAME))
        self._write_small_files(state, partial)

    def _make_folders(self, partial: Path) -> None:
        with self._engine.first_rank_only() as first:
            if first:
                discard(partial)
                for folder in (partial, partial / MODEL_NAME, partial / OPTIMIZER_NAME):
                    folder.mkdir()

    def _write_small_files(self, state: TrainState, partial: Path) -> None:
        """Write everything that is not a tensor: configurations, tokenizer, and the state of the run."""
        content = self._content
        ranks = collectives.gather_values(resume_state.rank_states(self._engine))
        with self._engine.first_rank_only() as first:
            if first:
                write_contents(partial / MODEL_NAME, self._model_files)
                history = content.history() if content.history else None
                if history is not None:
                    write_json(partial / MODEL_NAME / HISTORY_FILE, history)
                write_json(partial / SCHEDULE_NAME, {**asdict(content.schedule), "step": state.step})
                states = {**state.to_dict(), **content.facts.entries(), **content.evaluations.entries()}
                states["ranks"] = ranks
                json_bytes(states, STATES_NAME)
                write_json(partial / STATES_NAME, states)

    def _seal(self, partial: Path, final: Path) -> None:
        """List the files, each rank hashing a share of them, and give the checkpoint its final name."""
        engine = self._engine
        with collectives.all_or_none():
            found = checkpoint_files.list_files(partial)
        # A shared file system may show a rank's files to other ranks only after a while.
        own = found if engine.rank == 0 else {n: size for n, size in found.items() if f"rank-{engine.rank:05d}." in n}
        sizes = {name: size for listed in collectives.gather_values(own) for name, size in listed.items()}
        with collectives.all_or_none():
            entries = checkpoint_files.file_entries(partial, sizes, share=engine.rank, shares=engine.world_size)
        entries = [entry for share in collectives.gather_values(entries) for entry in share]
        with engine.first_rank_only() as first:
            if first:
                saved_at = checkpoint_files.later_than_all(final.parent, time.time())
                checkpoint_files.write_manifest(partial, entries, saved_at=saved_at)
                self._folder.check_held()
                checkpoint_files.publish_checkpoint(partial, final)
        self._expected_bytes, self._expected_files = sum(sizes.values()), len(sizes) + OTHER_FILES


def partial_suffix() -> str:
    """What follows the name of a checkpoint while this job writes it. Called on all ranks."""
    return f".{collectives.first_rank_value(secrets.token_hex(4))}{PARTIAL_SUFFIX}"


def checkpoint_bytes(model: ModelFacts, settings: EngineSettings) -> int:
    """The approximate size of a checkpoint of a run, in bytes."""
    trainable = settings.trainable
    saved, trained = trainable.saved_parameters(model), trainable.parameters(model)
    return expected_bytes(saved, settings.precision, trained=trained)


def expected_bytes(parameters: int, precision: str, *, trained: int) -> int:
    """The approximate size of a checkpoint in bytes: weights, Adam's two moments, master weights.

    Args:
        parameters: elements of the weights that are saved.
        trained: how many of them are trained; the others have no moments and no master weights.
    """
    weights = 4 if precision == "fp32" else 2
    states = 8 + (0 if precision == "fp32" else 4)
    return parameters * weights + trained * states
