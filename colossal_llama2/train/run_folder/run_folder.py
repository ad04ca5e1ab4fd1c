"""The folder that a run saves to (--save_dir): the names of everything in it, and its use by one run at a time.

<save_dir>/epoch-0_step-400/    a checkpoint, see train/checkpointing/checkpoint_writer.py
<save_dir>/latest               the name of the newest checkpoint
<save_dir>/modeling/            the model at the end of the run
<save_dir>/train_log.jsonl      the figures of each step, evaluation and save
<save_dir>/plan.json            what the run was going to read, written before its first step
<save_dir>/settings.json        resolved flags, versions and the id of the run
<save_dir>/environment.json     software, hosts and devices
<save_dir>/loss.png             the loss curve
<save_dir>/trackers.json        the ids of the run in the trackers of --report_to
<save_dir>/.lock                while a run is writing to the folder
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.train.run_folder import checkpoint_files, run_lock
from colossal_llama2.train.run_folder.file_names import (
    ENVIRONMENT_NAME,
    LOG_NAME,
    MODEL_NAME,
    PLAN_NAME,
    PLOT_NAME,
    SETTINGS_NAME,
    TRACKERS_NAME,
)


@dataclass(frozen=True)
class RunFolder:
    """A --save_dir. `str(folder)` is its path, as messages name it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def model(self) -> Path:
        """The folder of the final model."""
        return self.path / MODEL_NAME

    @property
    def log(self) -> Path:
        """The records of all steps, evaluations and saves (JSON lines)."""
        return self.path / LOG_NAME

    @property
    def data_plan(self) -> Path:
        """What the run is going to read (JSON)."""
        return self.path / PLAN_NAME

    @property
    def settings(self) -> Path:
        """The resolved flags and versions (JSON)."""
        return self.path / SETTINGS_NAME

    @property
    def environment(self) -> Path:
        """Software, hosts and devices (JSON)."""
        return self.path / ENVIRONMENT_NAME

    @property
    def loss_plot(self) -> Path:
        """The loss curve (PNG)."""
        return self.path / PLOT_NAME

    @property
    def trackers(self) -> Path:
        """The ids of the run in its trackers (JSON)."""
        return self.path / TRACKERS_NAME

    def checkpoint(self, *, epoch: int, step: int) -> Path:
        """Where the checkpoint of that step goes."""
        return self.path / f"epoch-{epoch}_step-{step}"

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, the earliest first."""
        return checkpoint_files.complete_checkpoints(self.path)

    def check_unclaimed(self, resumed: str | None) -> None:
        """Refuse a folder with the checkpoints of another run.

        Args:
            resumed: the checkpoint that the run resumes; the folder it is in belongs to the run.

        Raises:
            UserError: the folder has checkpoints or a final model, and the run does not resume one of them.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--save_dir {self}: is a file; give a folder")
        entries = self.path.glob("epoch-*_step-*")
        found = sorted(path.name for path in entries if not checkpoint_files.is_unfinished(path))
        found += [MODEL_NAME] * self.model.exists()
        # A checkpoint in the folder may be a link to one elsewhere.
        resumes_here = resumed is not None and Path(resumed).absolute().parent.resolve() == self.path.resolve()
        if found and not resumes_here:
            complete = self.checkpoints()
            newest = f"{self}/{complete[-1].name}" if complete else ""
            cure = f"resume with --resume auto or --load_checkpoint {newest}, or " if complete else ""
            raise UserError(f"--save_dir {self}: already holds {found[0]} of another run; {cure}give a new folder")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other run can write to the folder. Raises UserError if one already does."""
        return run_lock.locked(self.path)

    def prepare(self) -> None:
        """Remove leftovers of a dead run, and check that all hosts see the folder. Called on all ranks."""
        run_lock.prepare(self.path)

    def check_held(self, *, may_be_fresh: bool = False) -> None:
        """End this process if another run has taken over the lock; see `run_lock.check_held`."""
        run_lock.check_held(self.path, may_be_fresh=may_be_fresh)

    def check_room(self, num_bytes: int, *, files: int) -> None:
        """Create the folder if needed. Raises RunError unless there is room for a checkpoint of that size."""
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint_files.check_room(self.path, num_bytes, files=files)
