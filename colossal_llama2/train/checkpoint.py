"""Checkpoints: when one is due, what it holds, where a run goes on from.

    <save_dir>/epoch-0_step-400/
        modeling/              Hugging Face model (safetensors), config and tokenizer
        optimizer/             Adam's moments (safetensors) and parameter groups
        lr_scheduler           the schedule's numbers (JSON)
        running_states.json    epoch, step, samples and tokens consumed, settings; written last
    <save_dir>/modeling/       the model at the end of the run

A checkpoint is written under a name that ends in .tmp and renamed when it is whole.
"""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

from colossal_llama2 import logs
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.files import copy_files, read_json, write_json
from colossal_llama2.model.loading import CONFIG_FILE, GENERATION_CONFIG_FILE
from colossal_llama2.tokenizer import TOKENIZER_FILES
from colossal_llama2.train.engine.files import OPTIMIZER_INDEX
from colossal_llama2.train.loop import TrainState
from colossal_llama2.train.schedule import CosineSchedule

if TYPE_CHECKING:
    from colossal_llama2.train.engine.booster import Engine

STATES_NAME = "running_states.json"
SCHEDULE_NAME = "lr_scheduler"
OPTIMIZER_NAME = "optimizer"
MODEL_NAME = "modeling"
PARTIAL_SUFFIX = ".tmp"
OLD_SUFFIX = ".old.tmp"


@dataclass(frozen=True)
class LoadPlan:
    """Where a run begins: which folder its weights come from, and the checkpoint it resumes, if it does."""

    model_path: str
    resume_path: Optional[str]

    def read_states(self) -> Tuple[TrainState, Dict[str, Any]]:
        """Where the resumed run was, and what else its running_states.json tells."""
        path = Path(self.resume_path, STATES_NAME)
        try:
            states = json.loads(path.read_text(encoding="utf-8"))
            return TrainState.from_dict(states), states
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the running states of a checkpoint ({error!r}); resume from another one")

    def read_schedule(self) -> Dict[str, Any]:
        """The learning-rate schedule of the resumed run."""
        return read_json(Path(self.resume_path, SCHEDULE_NAME))


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
        raise UserError(
            f"--load_checkpoint {load_checkpoint}: no such folder; give a checkpoint, or its {MODEL_NAME} folder"
        )
    if (folder / STATES_NAME).is_file():
        for part in (f"{OPTIMIZER_NAME}/{OPTIMIZER_INDEX}", SCHEDULE_NAME):
            if not (folder / part).is_file():
                raise UserError(f"--load_checkpoint {load_checkpoint}: has no {part}; resume from another checkpoint")
        return LoadPlan(model_path=str(folder / MODEL_NAME), resume_path=str(folder))
    if (folder / "config.json").is_file():
        return LoadPlan(model_path=str(folder), resume_path=None)
    inside = _checkpoints_in(folder)
    cure = f"; it holds checkpoints: give {load_checkpoint}/{inside[-1]}" if inside else ""
    raise UserError(
        f"--load_checkpoint {load_checkpoint}: holds neither {STATES_NAME} (a checkpoint to resume) "
        f"nor config.json (a {MODEL_NAME} folder to take weights from){cure}"
    )


def _checkpoints_in(folder: Path) -> List[str]:
    """Names of the complete checkpoints in a --save_dir, the earliest step first."""
    names = [child.name for child in folder.glob("epoch-*_step-*") if child.suffix != PARTIAL_SUFFIX]
    return sorted(names, key=lambda name: (len(name), name))


def check_save_dir(save_dir: str, resume_path: Optional[str]) -> None:
    """Refuse a folder that holds another run's checkpoints.

    Raises:
        UserError: `save_dir` has checkpoints, and the run does not resume one of them.
    """
    folder = Path(save_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--save_dir {save_dir}: is a file; give a folder")
    taken = _checkpoints_in(folder) + [MODEL_NAME] * (folder / MODEL_NAME).exists()
    resumes_here = resume_path is not None and Path(resume_path).resolve().parent == folder.resolve()
    if taken and not resumes_here:
        raise UserError(
            f"--save_dir {save_dir}: already holds {taken[0]} of another run; "
            f"give a new folder, or resume with --load_checkpoint {save_dir}/<one of its checkpoints>"
        )


class Checkpointer:
    """Saves a run when it is due. All ranks call its methods together."""

    def __init__(
        self,
        *,
        engine: "Engine",
        save_dir: str,
        save_interval: int,
        model_path: str,
        tokenizer_path: str,
        schedule: CosineSchedule,
        facts: Dict[str, Any],
    ):
        """
        Args:
            save_interval: in optimizer steps.
            model_path, tokenizer_path: folders whose configuration and tokenizer go into every saved model.
            facts: what is true of the whole run and goes into running_states.json, such as seed and sample count.
        """
        self._engine, self._save_interval, self._schedule, self._facts = engine, save_interval, schedule, facts
        self._save_dir, self._model_path, self._tokenizer_path = Path(save_dir), Path(model_path), Path(tokenizer_path)
        self._last_saved: Optional[Path] = None

    def save(self, state: TrainState, *, epoch_ends: bool) -> None:
        """Write a checkpoint if this step is one to save at."""
        if epoch_ends or state.step % self._save_interval == 0:
            self._write(state)

    def _write(self, state: TrainState) -> None:
        from safetensors import SafetensorError

        final = self._save_dir / f"epoch-{state.epoch}_step-{state.step}"
        partial = final.with_name(final.name + PARTIAL_SUFFIX)
        try:
            self._write_parts(state, partial, final)
        except (SafetensorError, OSError) as error:
            # Of a full disk safetensors makes an error of its own kind. What is written takes the room, so it goes.
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(f"{final} cannot be written ({error}); earlier checkpoints are whole")
        self._last_saved = final
        logs.get_logger().info("Saved %s", final)

    def _write_parts(self, state: TrainState, partial: Path, final: Path) -> None:
        with self._engine.first_rank_only() as first:
            if first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        self._engine.save_model(str(partial / MODEL_NAME))
        self._engine.save_optimizer(str(partial / OPTIMIZER_NAME))
        with self._engine.first_rank_only() as first:
            if first:
                self._copy_configuration(partial / MODEL_NAME)
                write_json(partial / SCHEDULE_NAME, {**asdict(self._schedule), "step": state.step})
                write_json(partial / STATES_NAME, {**state.to_dict(), **self._facts})
                _rename_over(partial, final)

    def _copy_configuration(self, folder: Path) -> None:
        """Tokenizer files and, but for the weights' number format, the config that the run began with.

        ColossalAI's own config.json also tells transformers which attention this run used.
        """
        copy_files(self._tokenizer_path, folder, TOKENIZER_FILES)
        written, original = read_json(folder / CONFIG_FILE), read_json(self._model_path / CONFIG_FILE)
        kept = {"architectures": written.get("architectures"), "torch_dtype": written.get("torch_dtype")}
        write_json(folder / CONFIG_FILE, {**original, **kept})
        copy_files(self._model_path, folder, (GENERATION_CONFIG_FILE,))

    def finish(self) -> Path:
        """Put the model of the last checkpoint, which was saved at the last step, into <save_dir>/modeling.

        Its weights are hard links where the file system has links, so they cost no room.
        """
        final = self._save_dir / MODEL_NAME
        with self._engine.first_rank_only() as first:
            if first:
                partial = final.with_name(final.name + PARTIAL_SUFFIX)
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self._last_saved / MODEL_NAME, partial, copy_function=_link_weights)
                _rename_over(partial, final)
        return final


def _rename_over(partial: Path, final: Path) -> None:
    """Give a folder its final name; one of an earlier run that was resumed stays until the new one is there."""
    old = final.with_name(final.name + OLD_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _link_weights(source: str, target: str) -> None:
    # Weights are never changed in place; a small file may be edited, and its copy must not follow.
    if source.endswith(".safetensors"):
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
