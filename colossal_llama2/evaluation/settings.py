"""The settings of an evaluation: its flags as typed values."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.card import check_card
from colossal_llama2.evaluation.sets.registry import SETS
from colossal_llama2.inference.answer_file import settings_beside
from colossal_llama2.inference.loading import refuse_missing_folder
from colossal_llama2.storage.output_paths import check_output_file
from colossal_llama2.task_names import BITS_PER_BYTE, ICL

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class EvaluationSettings:
    """The flags of python -m colossal_llama2.evaluation.

    Attributes:
        model_paths: folders, or names of models on Hugging Face.
        tasks: names of tasks, each with where its files are; None for icl.
        num_fewshot: examples before each question; None for the number of each set.
        limit: most items of a task.
        seed: of the items of icl.
        device, dtype: as for inference_example.py.
        batch_size: items that are computed together; None for as many as lengths and memory allow.
        output_file: the jsonl of items.
        write_card: whether the results go into the model card of each folder.
        by_subject: whether the table has a line for each subject.
    """

    model_paths: tuple[str, ...]
    tasks: tuple[tuple[str, Path | None], ...]
    num_fewshot: int | None
    limit: int | None
    seed: int
    device: str | None
    dtype: str
    batch_size: int | None
    output_file: Path | None
    write_card: bool
    by_subject: bool

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "EvaluationSettings":
        """The settings from the values of all flags, by name. Raises UserError for what can be seen without torch."""
        paths = flags["model_path"]
        for path in paths:
            refuse_missing_folder(path)
        real = [os.path.realpath(path) if os.path.isdir(path) else path for path in paths]
        for place, path in enumerate(paths):
            before = real.index(real[place])
            if before < place and paths[before] == path:
                raise UserError(f"--model_path has {path} twice; keep one")
            if before < place:
                raise UserError(f"--model_path {paths[before]} and {path} are one folder; keep one")
        output_file = None if flags["output_file"] is None else Path(flags["output_file"])
        if output_file is not None:
            _check_output(output_file)
        _refuse_unused(flags)
        if flags["write_card"]:
            for path in paths:
                check_card(path)
        return cls(
            model_paths=tuple(paths),
            tasks=tuple((name, place_of(name, path, flags["data_dir"])) for name, path in flags["tasks"]),
            num_fewshot=flags["num_fewshot"],
            limit=flags["limit"],
            seed=flags["seed"] or 0,
            device=flags["device"],
            dtype=flags["dtype"],
            batch_size=flags["batch_size"] or None,
            output_file=output_file,
            write_card=flags["write_card"],
            by_subject=flags["by_subject"],
        )


def _refuse_unused(flags: Mapping[str, Any]) -> None:
    """Raise a UserError for a flag that was given and has no effect on any of the tasks."""
    names = [name for name, _ in flags["tasks"]]
    in_data_dir = [name for name, path in flags["tasks"] if path is None and name != ICL]
    with_examples = [name for name, kind in SETS.items() if kind.num_fewshot]
    for flag, is_used, cause in (
        ("data_dir", bool(in_data_dir), "no task of --tasks reads files from it"),
        ("num_fewshot", not set(names).isdisjoint(with_examples), f"only {', '.join(with_examples)} have examples"),
        ("seed", ICL in names, f"only {ICL} has a seed"),
    ):
        if flags[flag] is not None and not is_used:
            raise UserError(f"--{flag} {flags[flag]} has no effect, since {cause}; leave it out")


def place_of(name: str, path: str | None, data_dir: str | None = None, *, flag: str = "--tasks") -> Path | None:
    """Where the files of a task are. Raises UserError if that is not given, or not there."""
    if name == ICL:
        return None
    if path is None and data_dir is None:
        raise UserError(f"{flag} {name}: give {name}=PATH, or --data_dir with a folder {name}")
    found = Path(path) if path is not None else Path(data_dir or "") / name
    if name == BITS_PER_BYTE and found.is_dir():
        raise UserError(f"{flag} {name}={found}: is a folder; give a jsonl file of texts")
    if name == BITS_PER_BYTE and not found.is_file():
        raise UserError(f"{flag} {name}={found}: there is no such file; give a jsonl file of texts")
    if name != BITS_PER_BYTE and found.is_file():
        raise UserError(f"{flag} {name}: {found} is a file; give {name}=PATH, the folder with the set's files")
    if name != BITS_PER_BYTE and not found.is_dir():
        raise UserError(f"{flag} {name}: there is no folder {found}; give {name}=PATH, the folder with the set's files")
    return found


def _check_output(path: Path) -> None:
    if path.suffix != SUFFIX:
        raise UserError(f"--output_file {path}: a name that ends with {SUFFIX} is needed, since FILE.json is beside it")
    beside = (path.with_suffix(".json"), path.with_suffix(".png"))
    for other in (path, *beside):
        check_output_file(other, "--output_file")
    foreign = [other for other in beside if other.exists()]
    if foreign and not settings_beside(path).exists():
        raise UserError(
            f"--output_file {path}: {foreign[0]} would be overwritten, and no earlier evaluation has written it "
            f"(there is no {settings_beside(path).name}); give another name, or move that file"
        )
