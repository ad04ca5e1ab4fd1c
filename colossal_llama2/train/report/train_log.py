"""train_log.jsonl in --save_dir: the figures of a run, one line for each step, evaluation and checkpoint.

    {"step": 400, "epoch": 0, "bucket": 1, "loss": 2.8391, "lr": 9.7e-05, "grad_norm": 0.41, "tokens": 16200,
     "tokens_per_second": 2806.1, "padding_share": 0.011, "mfu": 0.43, "memory_bytes": 2147483648,
     "seconds": {"data": 0.01, "forward": 1.9, "backward": 3.7, "optimizer": 0.2},
     "loss_by_source": {"en": 2.5, "zh": 3.1}, "loss_by_category": {"news": 2.9, "web": 2.8}}
    {"step": 400, "evaluation": {"en": {"loss": 2.61, "bits_per_byte": 0.93},
     "icl": {"accuracy": 0.61, "standard_error": 0.03, "items": 200}}}
    {"step": 400, "answers": [{"prompt": "How are you?", "answer": "Fine.", "tokens": 3, "is_cut": false}]}
    {"step": 400, "checkpoint": "epoch-0_step-400", "seconds": {"save": 12.4}}

The loss of a step without a trained token is null, and so is the grad_norm of a step that overflows fp16 at every loss
scale; neither made an update. "loss_scale" exists only in fp16, and "untrained_micro_batches" only if some micro
batches of a step have no trained token. Unknown figures are left out; NaN and infinity become null.

A step's line is on the disk before its checkpoint is complete, so a resumed run finds all lines up to its checkpoint,
and removes later ones. A new run removes all lines.
"""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from colossal_llama2 import logs
from colossal_llama2.errors import RunError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import discard, errors_naming, open_no_link, parse_object, sync, sync_entries
from colossal_llama2.train.run_folder import run_lock
from colossal_llama2.train.run_folder.file_names import LOG_NAME, PARTIAL_SUFFIX
from colossal_llama2.train.run_folder.run_folder import RunFolder

EVALUATION = "Evaluation/"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a log, in order; none if there is no file. An incomplete line of a killed run is left out."""
    for record, _ in _lines(path):
        if record is not None:
            yield record


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """(record, line); the record is None if the line is incomplete or not a record."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = parse_object(line)
                yield record if isinstance(record.get("step"), int) and line.endswith(b"\n") else None, line
            except ValueError:
                yield None, line


def begin(folder: RunFolder, *, last_step: int, resumed_from: str | None = None) -> Path:
    """The log of a run that continues after `last_step`: later lines are removed atomically, which is logged.

    Args:
        resumed_from: a checkpoint; if it is in another folder, and this one has no log, that folder's log is copied.
            None for a new run: all lines are removed, those before the first step too.
    """
    path = folder.log
    if resumed_from is None:
        last_step = -1
    if resumed_from is not None and not os.path.lexists(path):
        earlier = Path(resumed_from).absolute().parent / LOG_NAME
        if earlier.is_file():
            _write_whole(path, earlier, last_step)
            logs.get_logger().info("%s begins with the lines of %s up to step %d", path, earlier, last_step)
            return path
    lost = sum(1 for record, _ in _lines(path) if record is None or record["step"] > last_step)
    if not lost and _leads_elsewhere(path):
        _write_whole(path, path, last_step)
        logs.get_logger().info("%s was a link to another file; it is a copy of that file from now on", path)
    if lost:
        _write_whole(path, path, last_step)
        if resumed_from is None:
            logs.get_logger().info(
                "%s: removed %s of an earlier run, since this one starts from the beginning",
                path,
                counted(lost, "line"),
            )
        else:
            logs.get_logger().info(
                "%s: removed %s after step %d, from which the run continues", path, counted(lost, "line"), last_step
            )
    return path


def _leads_elsewhere(path: Path) -> bool:
    """Whether the path is not a regular file, or a file with a second name, which must not grow with this log."""
    if not os.path.lexists(path):
        return False
    status = path.lstat()
    return not stat.S_ISREG(status.st_mode) or status.st_nlink > 1


def _write_whole(path: Path, source: Path, last_step: int) -> None:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    discard(partial)
    with errors_naming(path, instead_of=partial), open_no_link(partial, "xb") as file:
        for record, line in _lines(source):
            if record is not None and record["step"] <= last_step:
                file.write(line)
    if source.is_file():
        shutil.copymode(source, partial)
    sync(partial)
    os.replace(partial, path)
    sync_entries(path.parent)


class TrainLog:
    """Appends records. If the disk is full, that is logged once, and the run continues."""

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[bytes] | None = None
        self._is_torn = self._has_failed = False

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, unbuffered. Ends the process if another run has taken over the run's folder."""
        import orjson

        # A lock that cannot be read is an error for a checkpoint, not for a line of the log.
        with suppress(RunError):
            run_lock.check_held(self._path.parent, may_be_fresh=True)

        # orjson writes null for NaN and infinity.
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
        try:
            if self._file is None:
                self._file = open_no_link(self._path, "ab", buffering=0)
            line = b"\n" + line if self._is_torn else line
            self._is_torn = self._file.write(line) != len(line)
        except OSError as error:
            self._is_torn = True
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            logs.get_logger().warning("%s cannot be written (%s); it lacks some steps", self._path, error.strerror)

    def sync(self) -> None:
        """Return when all records are on the disk, or writing them has failed."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._warn_once(error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._warn_once(error)
            self._file = None


def evaluation_record(step: int, figures: dict[str, float]) -> dict[str, Any]:
    """The record of figures named as in TensorBoard: those of an evaluation ("Evaluation/en/loss"), and others."""
    record: dict[str, Any] = {"step": step}
    for name, value in figures.items():
        if name.startswith(EVALUATION) and name.count("/") > 1:
            _, data, figure = name.split("/", 2)
            record.setdefault("evaluation", {}).setdefault(data, {})[figure] = float(value)
        else:
            record.setdefault("figures", {})[name] = float(value)
    return record
