"""Which settings file and which folder of TensorBoard events a run writes to: never those of another run.

A run is identified by the random run_id in settings.json of its --save_dir, which is written at the start, so that a
resumed run finds it again. The same id is in --config_file, and in run.json of the folder with its events. If
--config_file or --tensorboard_dir belongs to another run, the newer run uses a name derived from its --save_dir:

    config_file    config_file-checkpoint_dir_sft        configs/a.json    configs/a-checkpoint_dir_sft.json
    logs_dir       logs_dir/checkpoint_dir_sft
"""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.sources import is_part
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.model_folder import INDEX_FILE, WEIGHTS_FILE
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.storage.output_paths import check_apart, check_output_file, check_output_folder
from colossal_llama2.train.run_folder.file_names import (
    CHECKPOINT_NAME,
    FILE_NAMES,
    LATEST_NAME,
    LEFTOVER_NAME,
    LOCK_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    SETTINGS_NAME,
)
from colossal_llama2.train.run_folder.run_folder import RunFolder

# In a folder with events: the run that they belong to.
RUN_NAME = "run.json"
# Keys that the settings files of all versions have.
SETTINGS_KEYS = {"save_dir", "pretrained", "versions"}
PLAIN_NAME = re.compile(r"\w[\w.+-]{0,99}", re.ASCII)
MAX_NAMES = 1000


def check_places(run_folder: RunFolder, tensorboard_dir: str, config_file: str) -> None:
    """Check all places that a run writes to, before it does anything.

    Raises:
        UserError: a place is of the wrong kind or cannot be created, two of them conflict, one is in a checkpoint, a
            model or prepared data, or --config_file may not be overwritten.
    """
    folder, events, settings = run_folder.path, Path(tensorboard_dir), Path(config_file)
    check_output_folder(folder, "--save_dir")
    check_output_folder(events, "--tensorboard_dir")
    check_output_file(settings, "--config_file")
    check_apart(settings, "--config_file", folder, "--save_dir")
    check_apart(settings, "--config_file", events, "--tensorboard_dir")
    for flag, path in (("--save_dir", folder), ("--tensorboard_dir", events), ("--config_file", settings)):
        _check_spoils_nothing(path, flag)
    for flag, path in (("--tensorboard_dir", events), ("--config_file", settings)):
        _check_not_ours(path, flag, folder)
    for name in FILE_NAMES:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise UserError(
                f"--save_dir {run_folder}: {name} in it is a folder, but the run writes a file there; remove it"
            )
    if os.path.lexists(folder / MODEL_NAME) and not (folder / MODEL_NAME).is_dir():
        raise UserError(
            f"--save_dir {run_folder}: {MODEL_NAME} in it is not a folder, but the run puts its model there; remove it"
        )
    _check_settings_file(settings)


def _check_spoils_nothing(path: Path, flag: str) -> None:
    """Refuse a place inside a checkpoint, whose manifest lists every file, a model, or a folder of samples."""
    real = Path(os.path.realpath(path))
    for above in (real, *real.parents):
        if (above / MANIFEST_NAME).is_file() and CHECKPOINT_NAME.fullmatch(above.name):
            raise UserError(f"{flag} {path}: is in the checkpoint {above}, which it would damage; name another")
        if above.name == MODEL_NAME and (above.parent / LATEST_NAME).is_file():
            raise UserError(f"{flag} {path}: is in {above}, which its run replaces at its end; name another")
        if any((above / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            raise UserError(f"{flag} {path}: is in {above}, which holds a model; name another")
        if is_part(above):
            raise UserError(f"{flag} {path}: is in {above}, which holds prepared samples; name another")


def _check_not_ours(path: Path, flag: str, save_dir: Path) -> None:
    """Refuse a name in --save_dir that the run itself writes or removes."""
    real, folder = (Path(os.path.realpath(place)) for place in (path, save_dir))
    if not real.is_relative_to(folder) or real == folder:
        return
    name = real.relative_to(folder).parts[0]
    is_settings = flag == "--config_file" and real == folder / SETTINGS_NAME
    names = (*FILE_NAMES, MODEL_NAME, LOCK_NAME)
    if (name in names and not is_settings) or CHECKPOINT_NAME.fullmatch(name) or LEFTOVER_NAME.fullmatch(name):
        raise UserError(f"{flag} {path}: the run itself writes or removes {name} in --save_dir; name another")


def _check_settings_file(path: Path) -> None:
    """Raise a UserError unless --config_file is a new or empty file, or one that an earlier run wrote."""
    if os.path.lexists(path) and not _is_empty(path) and _settings_in(path) is None:
        raise UserError(
            f"--config_file {path}: exists and is not a settings file, so it is not overwritten; name "
            f"another, or remove it"
        )


def write_settings(config_file: str, settings: dict[str, Any], *, run_folder: RunFolder) -> Path:
    """Write the resolved flags and versions of a run, with its id, to --save_dir and to --config_file.

    Returns:
        The file: --config_file, or another name if that belongs to another run.
    """
    given, run_id = Path(config_file), identify(run_folder)
    settings = {**settings, "run_id": run_id}
    replace_file(run_folder.settings, to_json(settings).encode())
    given.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(MAX_NAMES):
        path = _chosen(
            [given, *(given.with_name(f"{given.stem}-{name}{given.suffix}") for name in _names(run_folder, run_id))],
            is_own=lambda path: _is_own(_settings_in(path), run_folder, run_id),
            is_free=lambda path: not os.path.lexists(path) or _is_empty(path),
        )
        try:
            replace_file(path, to_json(settings).encode(), replaces=os.path.lexists(path))
        except FileExistsError:
            continue  # a run that started at the same time was faster
        if path != given:
            logs.get_logger().warning(
                "--config_file %s belongs to another run; this run's settings are in %s", given, path
            )
        return path
    raise RunError(f"--config_file {given}: other runs use every name derived from it; name another")


def claim_events_folder(tensorboard_dir: str, *, run_folder: RunFolder) -> Path:
    """Create the folder for a run's events, with the run's id: --tensorboard_dir, or one below it if that is in use."""
    given, run_id = Path(tensorboard_dir), identify(run_folder)
    for _ in range(MAX_NAMES):
        folder = _chosen(
            [given, *(given / name for name in _names(run_folder, run_id))],
            is_own=lambda folder: _is_own(_read(folder / RUN_NAME), run_folder, run_id),
            is_free=_has_no_events,
        )
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if not os.path.lexists(folder / RUN_NAME):
                note = {"run_id": run_id, "save_dir": os.path.realpath(run_folder.path)}
                replace_file(folder / RUN_NAME, to_json(note).encode(), replaces=False)
        except FileExistsError:
            continue
        except OSError as error:
            # On a full disk a run continues without events; their writer logs a warning.
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if folder != given:
            logs.get_logger().warning(
                "--tensorboard_dir %s has events of another run; this run's are in %s", given, folder
            )
        return folder
    raise RunError(f"--tensorboard_dir {given}: other runs use every name below it; name another")


def identify(run_folder: RunFolder) -> str:
    """The id of the run in a --save_dir, from its settings.json; a new id for a new run."""
    known = _read(run_folder.settings)
    if known is not None and _is_id(known.get("run_id")) and not _is_copied(known, run_folder):
        return known["run_id"]
    return secrets.token_hex(8)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16}", value) is not None


def _is_copied(known: dict[str, Any], run_folder: RunFolder) -> bool:
    """Whether a --save_dir is a copy of one that still exists, to which its id belongs."""
    original = known.get("save_dir")
    if not isinstance(original, str) or os.path.realpath(original) == os.path.realpath(run_folder.path):
        return False
    other = _read(Path(original, SETTINGS_NAME))
    return other is not None and other.get("run_id") == known["run_id"]


def _names(run_folder: RunFolder, run_id: str) -> list[str]:
    """Names for the files of this run; another run may have the first of them."""
    name = Path(os.path.realpath(run_folder.path)).name
    name = name if PLAIN_NAME.fullmatch(name) else run_id
    return [name, *(f"{name}-{number}" for number in range(2, MAX_NAMES))]


def _chosen(places: list[Path], *, is_own: Callable[[Path], bool], is_free: Callable[[Path], bool]) -> Path:
    """The place that already belongs to this run, or else the first that is free."""
    free: Path | None = None
    for place in places:
        if is_own(place):
            return place
        if free is None and is_free(place):
            free = place
        elif free is not None and not os.path.lexists(place):
            break
    if free is None:
        raise RunError(f"{places[0]}: belongs to another run, and no name derived from it is free; name another")
    return free


def _is_own(content: dict[str, Any] | None, run_folder: RunFolder, run_id: str) -> bool:
    if content is None:
        return False
    if "run_id" in content:
        return content["run_id"] == run_id
    # Settings of an earlier version.
    return os.path.realpath(content["save_dir"]) == os.path.realpath(run_folder.path)


def _has_no_events(folder: Path) -> bool:
    if not os.path.lexists(folder):
        return True
    if not folder.is_dir() or os.path.lexists(folder / RUN_NAME):
        return False
    return not any(entry.name.startswith("events.out.tfevents.") for entry in _entries(folder))


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        yield from entries


def _settings_in(path: Path) -> dict[str, Any] | None:
    content = _read(path)
    return content if content is not None and SETTINGS_KEYS <= content.keys() else None


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _read(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file if its `save_dir` is a string; None for anything else."""
    try:
        content = json_input.read_object(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content.get("save_dir"), str) else None
