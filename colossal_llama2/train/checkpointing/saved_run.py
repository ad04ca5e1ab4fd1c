"""What a checkpoint records of its run (running_states.json), read once and checked.

A checkpoint may come from anyone, so the type of every entry that is used is checked.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.errors import UserError
from colossal_llama2.storage import json_input
from colossal_llama2.storage.json_input import shown
from colossal_llama2.train.run_folder.file_names import SCHEDULE_NAME, STATES_NAME
from colossal_llama2.train.stepping.state import TrainState

# Entries besides the position in the data, which older checkpoints may lack: the type of each that is not None.
TYPES = {
    "layout": dict,
    "settings": dict,
    "versions": dict,
    "machine": dict,
    "model_shape": dict,
    "adapter": dict,
    "eval_fingerprints": dict,
    "ranks": list,
    "evaluations": list,
    "dataset_fingerprints": list,
    "trained_rows": list,
    "sources": list,
    "mixture": list,
    "tokenizer": str,
    "base_model": str,
    "freeze_non_embeds_params": bool,
}
COUNTS = ("num_samples", "world_size", "data_parallel_size", "first_sample", "seed", "numerics")
# Words of the state of NumPy's Mersenne Twister; NumPy itself does not check the position in them.
TWISTER_WORDS = 624


@dataclass(frozen=True)
class SavedRun:
    """The run that a checkpoint was saved by.

    Attributes:
        folder: the checkpoint.
        state: where the run was.
        entries: all of running_states.json: what RunFacts and EvaluationHistory write, and the state of each rank.
    """

    folder: Path
    state: TrainState
    entries: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> "SavedRun":
        """Read a checkpoint's running_states.json. Raises UserError if an entry is missing or impossible."""
        path = Path(folder, STATES_NAME)
        try:
            entries = json_input.read_object(path)
            state = TrainState.from_dict(entries)
            _check_entries(entries)
        except KeyError as error:
            problem = f"no {error}"
        except (ValueError, OSError) as error:
            problem = str(error)
        else:
            return cls(Path(folder), state, entries)
        raise UserError(f"{path}: not the running states of a checkpoint ({problem}); resume from another checkpoint")

    @property
    def first_sample(self) -> int:
        """Where in the data the run began, in samples of all epochs; older checkpoints began at the first."""
        return self.entries.get("first_sample") or 0

    def read_schedule(self) -> dict[str, Any]:
        """The learning-rate schedule of the run. Raises UserError if its file is damaged."""
        path = self.folder / SCHEDULE_NAME
        try:
            return json_input.read_object(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: not the schedule of a checkpoint ({error}); resume from another checkpoint")


def _check_entries(states: dict[str, Any]) -> None:
    for name, kind in TYPES.items():
        if states.get(name) is not None:
            json_input.typed(states, name, kind)
    for name in COUNTS:
        if states.get(name) is not None:
            json_input.whole_number(states, name)
    for entry in states.get("evaluations") or ():
        _check_evaluation(entry)
    ranks = states.get("ranks") or []
    for rank in ranks:
        _check_rank(rank)
    # Ranks with different scales would repeat a step differently, and wait for each other forever.
    for rank in ranks:
        if rank.get("loss_scale") != ranks[0].get("loss_scale"):
            first, other = shown(ranks[0].get("loss_scale")), shown(rank.get("loss_scale"))
            raise ValueError(f"loss_scale is {first} on one rank and {other} on another, but must be the same on all")


def _check_evaluation(entry: Any) -> None:
    """{"step": 400, "figures": {"en": {"loss": 2.41, ...}, "icl": {"accuracy": 0.6, ...}}}.

    A figure may be NaN if the model diverged.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"evaluations has {shown(entry)}, which is not an object")
    json_input.whole_number(entry, "step")
    for name, figures in json_input.typed(entry, "figures", dict).items():
        has_value = isinstance(figures, dict) and not figures.keys().isdisjoint(("loss", "accuracy"))
        values = figures.values() if has_value else [None]
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            raise ValueError(f"evaluations has {shown(figures)} for {shown(name)}, which is not an object of numbers")


def _check_rank(rank: Any) -> None:
    """Check the values that PyTorch, NumPy and Python use unchecked, or crash on."""
    if not isinstance(rank, dict):
        raise ValueError(f"ranks has {shown(rank)}, which is not an object")
    numpy = rank.get("numpy")
    if numpy is not None:
        if not isinstance(numpy, list) or len(numpy) != 5:
            raise ValueError(f"numpy is {shown(numpy)}, not a list of five entries")
        json_input.whole_number(
            {"the position of NumPy's random state": numpy[2]},
            "the position of NumPy's random state",
            most=TWISTER_WORDS,
        )
    scale = rank.get("loss_scale")
    if scale is not None:
        if not isinstance(scale, dict) or json_input.number(scale, "scale") <= 0:
            raise ValueError(f"loss_scale is {shown(scale)}, but the scale must be above 0")
        if not math.log2(scale["scale"]) <= 127:
            raise ValueError(f"loss_scale is {shown(scale)}, which float32 cannot hold")
        for name in ("growth_step", "hysteresis_step"):
            json_input.whole_number(scale, name)
