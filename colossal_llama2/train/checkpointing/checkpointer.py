"""Checkpoints: when one is due, what it holds, where a run goes on from.

    <save_dir>/epoch-0_step-400/
        modeling/              Hugging Face model (safetensors), config and tokenizer
        optimizer/             Adam's moments (safetensors) and parameter groups
        master_weights/        in half precision: the float32 weights of every rank (safetensors)
        lr_scheduler           the schedule's numbers (JSON)
        running_states.json    epoch, step, samples and tokens consumed, random states, settings, versions
        manifest.json          every file with its bytes and sha256; written last
    <save_dir>/latest          the name of the checkpoint that was written last
    <save_dir>/modeling/       the model at the end of the run

A checkpoint is written under a name that ends in .tmp, and renamed when all of it is on the disk.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.patches.checkpoint_io import OPTIMIZER_INDEX
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.training_history import HISTORY_FILE, read_history
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import discard, errors_naming, is_stray, open_no_link, write_contents, write_json
from colossal_llama2.storage.publishing import publish
from colossal_llama2.train.checkpointing import running_states
from colossal_llama2.train.checkpointing.new_rows_report import RowHealth
from colossal_llama2.train.checkpointing.small_files import json_bytes, model_files
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.checkpoint_files import MODEL_NAME, OLD_SUFFIX, PARTIAL_SUFFIX
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.state import TrainState

if TYPE_CHECKING:
    from colossal_llama2.engine.engine import Engine

STATES_NAME = "running_states.json"
SCHEDULE_NAME = "lr_scheduler"
OPTIMIZER_NAME = "optimizer"
CARD_NAME = "README.md"
# Files of a checkpoint, and the folders in it, besides those that each rank writes.
LEAST_FILES = 16
# What a save needs besides the files of the checkpoint: its folders, its manifest, `latest` while it is replaced.
OTHER_FILES = 8


@dataclass(frozen=True)
class LoadPlan:
    """Where a run begins: which folder its weights come from, and the checkpoint it resumes, if it does.

    `is_newest` says that --resume auto chose it, and may choose the one before it.
    """

    model_path: str
    resume_path: str | None
    is_newest: bool = False

    def read_states(self) -> tuple[TrainState, dict[str, Any]]:
        """Where the resumed run was, and what else its running_states.json tells."""
        return running_states.read(Path(self.resume_path, STATES_NAME))

    def read_schedule(self) -> dict[str, Any]:
        """The learning-rate schedule of the resumed run."""
        path = Path(self.resume_path, SCHEDULE_NAME)
        try:
            return json_input.read_object(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: is not JSON as a checkpoint has it ({error}); resume from another checkpoint")


def plan_loading(pretrained: str, load_checkpoint: str | None) -> LoadPlan:
    """Decide by what `load_checkpoint` holds, not by its name, whether it resumes a run or only gives weights.

    Raises:
        UserError: it is neither a checkpoint nor a model folder.
    """
    if load_checkpoint is None:
        return LoadPlan(model_path=pretrained, resume_path=None)
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
                raise UserError(f"--load_checkpoint {load_checkpoint}: has no {part}; resume from another checkpoint")
        problem = checkpoint_files.sizes_problem(folder)
        if problem:
            raise UserError(f"--load_checkpoint {problem}; resume from another checkpoint")
        return LoadPlan(model_path=str(folder / MODEL_NAME), resume_path=str(folder))
    if (folder / "config.json").is_file():
        return LoadPlan(model_path=str(folder), resume_path=None)
    inside = _checkpoints_in(folder)
    cure = f"; it holds checkpoints: give {load_checkpoint}/{inside[-1]}" if inside else ""
    raise UserError(
        f"--load_checkpoint {load_checkpoint}: holds neither {STATES_NAME} (a checkpoint to resume) "
        f"nor config.json (a {MODEL_NAME} folder to take weights from){cure}"
    )


def _checkpoints_in(folder: Path) -> list[str]:
    """Names of the complete checkpoints in a --save_dir, the earliest first."""
    return [path.name for path in checkpoint_files.complete_checkpoints(folder)]


def check_save_dir(save_dir: str, resume_path: str | None) -> None:
    """Refuse a folder that holds another run's checkpoints.

    Raises:
        UserError: `save_dir` has checkpoints, and the run does not resume one of them.
    """
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save_dir {save_dir}: is a file; give a folder")
    named = sorted(path.name for path in folder.glob("epoch-*_step-*") if not checkpoint_files.is_unfinished(path))
    taken = named + [MODEL_NAME] * (folder / MODEL_NAME).exists()
    # A checkpoint in the folder may be a link to one elsewhere.
    resumes_here = resume_path is not None and Path(resume_path).absolute().parent.resolve() == folder.resolve()
    if taken and not resumes_here:
        complete = _checkpoints_in(folder)
        cure = f"resume with --resume auto or --load_checkpoint {save_dir}/{complete[-1]}, or " if complete else ""
        raise UserError(f"--save_dir {save_dir}: already holds {taken[0]} of another run; {cure}give a new folder")


def expected_bytes(parameters: int, precision: str, *, trained: int) -> int:
    """About how large a checkpoint of so many parameters will be: weights, Adam's two moments, master weights.

    Args:
        trained: how many of them are trained; the others have no moments and no master weights.
    """
    weights = 4 if precision == "fp32" else 2
    states = 8 + (0 if precision == "fp32" else 4)
    return parameters * weights + trained * states


class Checkpointer:
    """Saves a run when it is due. All ranks call its methods together."""

    def __init__(
        self,
        *,
        engine: "Engine",
        save_dir: str,
        save_interval: int,
        skip_epochs: bool = False,
        model_path: str,
        tokenizer_path: str,
        schedule: CosineSchedule,
        facts: dict[str, Any],
        keep_last: int | None = None,
        keep_every: int | None = None,
        expected_bytes: int = 0,
        row_health: RowHealth | None = None,
        history: Callable[[], dict[str, Any] | None] | None = None,
    ):
        """
        Args:
            save_interval: in optimizer steps.
            skip_epochs: that an epoch ends is no reason to save, unless the run ends with it.
            model_path, tokenizer_path: folders whose configuration and tokenizer go into every saved model. They are
                read here, since the checkpoint that the run resumed may be removed or moved away while it goes on.
            facts: what is true of the whole run and goes into running_states.json, such as seed and sample count.
            keep_last: how many of the newest checkpoints stay when a new one is complete; None: all.
            keep_every: those whose step is a multiple of it stay too.
            expected_bytes: room that a checkpoint needs, until one has shown it.
            row_health: on rank 0, what looks at each model that is saved.
            history: called on rank 0; what goes into training_history.json of a model that is saved, None for no file.
        """
        self._engine, self._save_interval, self._schedule, self._facts = engine, save_interval, schedule, facts
        self._skip_epochs = skip_epochs
        self._save_dir, self._model_files = Path(save_dir), {}
        self._keep_last, self._keep_every, self._expected_bytes = keep_last, keep_every, expected_bytes
        self._expected_files = LEAST_FILES + engine.world_size
        self._row_health, self._history = row_health, history
        # Is told of saves.
        self.reporter = SilentReporter()
        self._last_saved: Path | None = None
        self._last_step: int | None = None
        # How long the last save held up the training, None before the first.
        self.pause_seconds: float | None = None
        with engine.first_rank_only() as first:
            if first:
                self._model_files = model_files(model_path, tokenizer_path, engine.settings.precision)

    def save(self, state: TrainState, *, epoch_ends: bool) -> None:
        """Write a checkpoint if this step is one to save at."""
        is_due = epoch_ends and (not self._skip_epochs or state.step == self._schedule.total_steps)
        if is_due or state.step % self._save_interval == 0:
            self.save_now(state)

    def save_now(self, state: TrainState) -> Path:
        """Write a checkpoint, unless this step's is written already; returns its folder.

        Raises:
            RunError: on all ranks, if one of them cannot write.
        """
        if self._last_step == state.step:
            return self._last_saved
        start = time.monotonic()
        self.reporter.before_save()
        final = self._save_dir / f"epoch-{state.epoch}_step-{state.step}"
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        self.check_room()
        try:
            self._write_parts(state, partial)
            figures = self._look_at_rows(partial)
            written = time.monotonic()
            self._seal(partial, final)
        except (UserError, RunError) as error:
            # What is written takes the room, so it goes.
            self._remove(partial)
            raise RunError(f"{final} cannot be written ({error}); earlier checkpoints are whole")
        self._last_saved, self._last_step = final, state.step
        self.pause_seconds = time.monotonic() - start
        self.reporter.saved(state.step, final.name, self.pause_seconds)
        if figures:
            self.reporter.write(state.step, figures)
        logs.get_logger().info(
            "Saved %s: %s bytes; training paused for %.1f s, of which %.1f s to hash them and to wait for the disk",
            final,
            f"{self._expected_bytes:,}",
            self.pause_seconds,
            time.monotonic() - written,
        )
        with self._engine.first_rank_only() as first:
            if first:
                checkpoint_files.remove_old(final, keep_last=self._keep_last, keep_every=self._keep_every)
        return final

    def _look_at_rows(self, partial: Path) -> dict[str, float]:
        """What became of the rows of --train_new_rows_only, on rank 0. RunError, on all, if others have changed."""
        with self._engine.first_rank_only() as first:
            return self._row_health.tell(partial / MODEL_NAME) if first and self._row_health is not None else {}

    def check_room(self) -> None:
        """Raise RunError, on all ranks, unless there is room for a checkpoint. Makes --save_dir if there is none."""
        with self._engine.first_rank_only() as first:
            if first:
                self._save_dir.mkdir(parents=True, exist_ok=True)
                checkpoint_files.check_room(self._save_dir, self._expected_bytes, files=self._expected_files)

    def rehearse(self, state: TrainState) -> None:
        """Write a checkpoint without its tensors, give it another name, and remove it. Called on all ranks.

        What can fail by the folder, the names or the content of small files fails here, before step 1.

        Raises:
            UserError, RunError: on all ranks.
        """
        self.check_room()
        final = self._save_dir / f"epoch-{state.epoch}_step-{state.step}"
        # Names that a later run removes, if this one dies here.
        partial, aside = (final.with_name(final.name + suffix) for suffix in (PARTIAL_SUFFIX, OLD_SUFFIX))
        try:
            self._make_folders(partial)
            # Every rank writes files of its own, and it may be another host that does.
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
            raise type(error)(f"--save_dir {self._save_dir}: no checkpoint can be written there ({error})")
        self._remove(aside)

    def _remove(self, *folders: Path) -> None:
        # Nobody leaves before: whoever does takes the others along.
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
        """All that is not a tensor: configurations, tokenizer, and where the run is."""
        ranks = collectives.gather_values(resume_state.rank_states(self._engine))
        with self._engine.first_rank_only() as first:
            if first:
                write_contents(partial / MODEL_NAME, self._model_files)
                history = self._history() if self._history else None
                if history is not None:
                    write_json(partial / MODEL_NAME / HISTORY_FILE, history)
                write_json(partial / SCHEDULE_NAME, {**asdict(self._schedule), "step": state.step})
                states = {**state.to_dict(), **self._facts, "ranks": ranks}
                json_bytes(states, STATES_NAME)
                write_json(partial / STATES_NAME, states)

    def _seal(self, partial: Path, final: Path) -> None:
        """List the files, each rank hashing a share of them, and give the checkpoint its name."""
        engine = self._engine
        with collectives.all_or_none():
            mine = checkpoint_files.list_files(partial)
        # A shared file system may show a rank what others wrote only after a while; what it wrote itself, at once.
        own = mine if engine.rank == 0 else {n: size for n, size in mine.items() if f"rank-{engine.rank:05d}." in n}
        sizes = {name: size for listed in collectives.gather_values(own) for name, size in listed.items()}
        with collectives.all_or_none():
            entries = checkpoint_files.file_entries(partial, sizes, share=engine.rank, shares=engine.world_size)
        entries = [entry for share in collectives.gather_values(entries) for entry in share]
        with engine.first_rank_only() as first:
            if first:
                saved_at = checkpoint_files.later_than_all(self._save_dir, time.time())
                checkpoint_files.write_manifest(partial, entries, saved_at=saved_at)
                checkpoint_files.publish_checkpoint(partial, final)
        self._expected_bytes, self._expected_files = sum(sizes.values()), len(sizes) + OTHER_FILES

    def finish(self, card: Callable[[], str | None] | None = None) -> Path:
        """Put the model of the last checkpoint, which was saved at the last step, into <save_dir>/modeling.

        Its weights are hard links where the file system has links, so they cost no room. `card` is called on rank 0 and
        gives what is put into its README.md, or None.
        """
        with self._engine.first_rank_only() as first:
            if first:
                publish_model(self._last_saved, card() if card else None)
        return self._save_dir / MODEL_NAME


def publish_model(checkpoint: Path, card: str | None = None) -> None:
    """Put the model of a checkpoint beside it, as the result of the run, with a README.md; replaces an earlier one."""
    final = checkpoint.with_name(MODEL_NAME)
    partial = final.with_name(final.name + PARTIAL_SUFFIX)
    discard(partial)
    shutil.copytree(checkpoint / MODEL_NAME, partial, copy_function=_link_weights, ignore=_strays)
    _add_weights(partial, checkpoint)
    if card is not None:
        with errors_naming(partial / CARD_NAME), open_no_link(partial / CARD_NAME, "wb") as file:
            file.write(card.encode())
    publish(partial, final, replace=True)


def _add_weights(folder: Path, checkpoint: Path) -> None:
    """Note the hashes of the weights, which were not known when the checkpoint was written, in the model's history."""
    history = read_history(folder)
    if not history.stages:
        return
    with contextlib.suppress(UserError):
        weights = checkpoint_files.recorded_weights(checkpoint)
        *before, last = history.stages
        content = history._replace(stages=before).followed_by({**last, "weights": weights}, base_model="")
        write_json(folder / HISTORY_FILE, content)


def _strays(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if is_stray(name)]


def _link_weights(source: str, target: str) -> None:
    # Weights are never changed in place; a small file may be edited, and its copy must not follow.
    if source.endswith(".safetensors") and not os.path.islink(source):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
