"""Checkpoints: when one is due, what it holds, where a run goes on from.

    <save_dir>/epoch-0_step-400/
        modeling/              Hugging Face model (safetensors), config and tokenizer
        optimizer/             Adam's moments (safetensors) and parameter groups
        lr_scheduler           the schedule's numbers (JSON)
        running_states.json    epoch, step, samples and tokens consumed, settings; written last
    <save_dir>/modeling/       the model at the end of the run

A checkpoint is written under a name that ends in .tmp and renamed when it is whole.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.files import copy_files, write_json
from colossal_llama2.tokenizer import TOKENIZER_FILES
from colossal_llama2.train.loop import TrainState
from colossal_llama2.train.schedule import CosineSchedule

STATES_NAME = "running_states.json"
MODEL_NAME = "modeling"
PARTIAL_SUFFIX = ".tmp"


@dataclass(frozen=True)
class LoadPlan:
    """Where a run begins: which folder its weights come from, and the checkpoint it resumes, if it does."""

    model_path: str
    resume_path: Optional[str]

    def read_states(self) -> Dict[str, Any]:
        """The running_states.json of the resumed checkpoint."""
        path = Path(self.resume_path, STATES_NAME)
        try:
            states = json.loads(path.read_text(encoding="utf-8"))
            return {**states, "state": TrainState(**{name: int(states[name]) for name in TrainState().to_dict()})}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the running states of a checkpoint ({error!r}); resume from another one")


def plan_loading(pretrained: str, load_checkpoint: Optional[str]) -> LoadPlan:
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
        raise UserError(f"--load_checkpoint {load_checkpoint}: no such folder")
    if (folder / STATES_NAME).is_file():
        return LoadPlan(model_path=str(folder / MODEL_NAME), resume_path=str(folder))
    if (folder / "config.json").is_file():
        return LoadPlan(model_path=str(folder), resume_path=None)
    raise UserError(
        f"--load_checkpoint {load_checkpoint}: holds neither {STATES_NAME} (a checkpoint to resume) "
        f"nor config.json (a {MODEL_NAME} folder to take weights from)"
    )


def check_save_dir(save_dir: str, resume_path: Optional[str]) -> None:
    """Refuse a folder that holds another run's checkpoints.

    Raises:
        UserError: `save_dir` has checkpoints, and the run does not resume one of them.
    """
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save_dir {save_dir}: is a file; give a folder")
    taken = sorted(child.name for child in folder.glob("epoch-*_step-*")) + [
        MODEL_NAME for _ in folder.glob(MODEL_NAME)
    ]
    resumes_here = resume_path is not None and Path(resume_path).resolve().parent == folder.resolve()
    if taken and not resumes_here:
        raise UserError(
            f"--save_dir {save_dir}: already holds {taken[0]} of another run; "
            f"give a new folder, or resume with --load_checkpoint {save_dir}/<one of its checkpoints>"
        )


class Checkpointer:
    """Saves a run when it is due. All ranks call its methods together."""

    def __init__(
        self, *, engine, save_dir: str, save_interval: int, tokenizer_files: str, schedule: CosineSchedule, facts: Dict
    ):
        """
        Args:
            save_interval: in optimizer steps.
            tokenizer_files: folder whose tokenizer goes into every saved model.
            facts: what is true of the whole run and goes into running_states.json, such as seed and sample count.
        """
        self._engine, self._save_interval, self._schedule, self._facts = engine, save_interval, schedule, facts
        self._save_dir, self._tokenizer_files = Path(save_dir), Path(tokenizer_files)
        self._last_saved: Optional[Path] = None

    def save(self, state: TrainState, *, epoch_ends: bool) -> None:
        """Write a checkpoint if this step is one to save at."""
        if epoch_ends or state.step % self._save_interval == 0:
            self._write(state)

    def _write(self, state: TrainState) -> None:
        final = self._save_dir / f"epoch-{state.epoch}_step-{state.step}"
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        with self._engine.first_rank_only() as first:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self._engine.save_model(str(partial / MODEL_NAME))
        self._engine.save_optimizer(str(partial / "optimizer"))
        with self._engine.first_rank_only() as first:
            if first:
                copy_files(self._tokenizer_files, partial / MODEL_NAME, TOKENIZER_FILES)
                write_json(partial / "lr_scheduler", {**asdict(self._schedule), "step": state.step})
                write_json(partial / STATES_NAME, {**state.to_dict(), **self._facts})
                # A run that was resumed from an earlier checkpoint comes by here again.
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        self._last_saved = final
        logs.get_logger().info("Saved %s", final)

    def finish(self, state: TrainState) -> Path:
        """Put the model of the last step into <save_dir>/modeling.

        Its files are hard links to those of the last checkpoint where the file system has links, so they cost no room.
        """
        final = self._save_dir / MODEL_NAME
        if self._last_saved is None:
            # Resumed at the very end: no step was left to save at.
            self._write(state)
        with self._engine.first_rank_only() as first:
            if first:
                partial = final.with_name(final.name + PARTIAL_SUFFIX)
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self._last_saved / MODEL_NAME, partial, copy_function=_link_or_copy)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        return final


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
