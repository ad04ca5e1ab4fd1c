"""When a run saves, which of its checkpoints are kept, and how the last one becomes the model of the run."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.model.training_history import HISTORY_FILE, read_history
from colossal_llama2.storage.files import discard, errors_naming, is_stray, open_no_link, write_json
from colossal_llama2.storage.publishing import publish
from colossal_llama2.train.checkpointing.checkpoint_writer import CheckpointWriter
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import CARD_NAME, MODEL_NAME, PARTIAL_SUFFIX
from colossal_llama2.train.settings.config import SaveConfig
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.state import TrainState

if TYPE_CHECKING:
    from colossal_llama2.engine.engine import Engine


class Checkpointer:
    """Saves a run when a checkpoint is due. All ranks call its methods together.

    Attributes:
        pause_seconds: how long the last save paused the training; None before the first.
    """

    def __init__(
        self,
        engine: "Engine",
        writer: CheckpointWriter,
        saving: SaveConfig,
        *,
        total_steps: int,
        reporter: SilentReporter,
    ):
        """
        Args:
            total_steps: of the run, whose last step is always saved.
            reporter: records each save.
        """
        self._engine, self._writer, self._saving = engine, writer, saving
        self._total_steps, self._reporter = total_steps, reporter
        self._last_saved: tuple[int, Path] | None = None
        self.pause_seconds: float | None = None

    def save(self, state: TrainState, *, epoch_ends: bool) -> None:
        """Write a checkpoint if one is due after this step."""
        is_due = epoch_ends and (not self._saving.skip_epoch_ends or state.step == self._total_steps)
        if is_due or state.step % self._saving.interval == 0:
            self.save_now(state)

    def save_now(self, state: TrainState) -> Path:
        """Write a checkpoint, unless that of this step is already written; return its folder.

        Raises:
            RunError: on all ranks, if one of them cannot write.
        """
        if self._last_saved is not None and self._last_saved[0] == state.step:
            return self._last_saved[1]
        start = time.monotonic()
        self._reporter.before_save()
        written = self._writer.write(state)
        self._last_saved = state.step, written.folder
        self.pause_seconds = time.monotonic() - start
        self._reporter.saved(state.step, written.folder.name, self.pause_seconds)
        if written.figures:
            self._reporter.write(state.step, written.figures)
        logs.get_logger().info(
            "Saved %s: %s bytes; training paused for %.1f s, of which %.1f s to hash them and to wait for the disk",
            written.folder,
            f"{written.num_bytes:,}",
            self.pause_seconds,
            written.seal_seconds,
        )
        self._remove_old(written.folder)
        return written.folder

    def _remove_old(self, newest: Path) -> None:
        with self._engine.first_rank_only() as first:
            if first:
                saving = self._saving
                saving.folder.check_held()
                checkpoint_files.remove_old(newest, keep_last=saving.keep_last, keep_every=saving.keep_every)

    def finish(self, card: Callable[[], str | None] | None = None) -> Path:
        """Publish the model of the last checkpoint, which was saved after the last step, in <save_dir>/modeling.

        Its weights are hard links where the file system has links, so they take no space. `card` is called on rank 0
        and returns the text of its README.md, or None for no card.
        """
        with self._engine.first_rank_only() as first:
            if first:
                assert self._last_saved is not None, "the last step is saved"
                self._saving.folder.check_held()
                publish_model(self._last_saved[1], card() if card else None)
        return self._saving.folder.model


def publish_model(checkpoint: Path, card: str | None = None) -> None:
    """Publish the model of a checkpoint beside it, as the run's result, with a README.md; replace an earlier one."""
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
    """Add the hashes of the weights to the model's history; they were not known when the checkpoint was written."""
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
    # Weights are never changed in place; a small file may be edited, and its copy must not change with it.
    if source.endswith(".safetensors") and not os.path.islink(source):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
