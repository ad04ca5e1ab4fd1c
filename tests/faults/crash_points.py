"""A run that dies at any change of a file while it saves, removes old checkpoints and publishes its model.

A run of four steps resumes after its third, with --keep_last 2. From the save after the fourth step on, it is killed
at its k-th change of --save_dir, for every k; and in the middle of every write.
"""

import contextlib
import logging
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.train import verify
from colossal_llama2.train.checkpointing.checkpointer import Checkpointer
from colossal_llama2.train.run_folder import checkpoint_files, file_names
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.model_source import ModelSource, newest_source
from tests.faults import place as places
from tests.faults import trace, warm
from tests.faults.place import Place
from tests.faults.rows import Row

MARK = re.compile(r"\.[0-9a-f]{8}\.(tmp|old)$")
KEEP_LAST = 2
STEPS = 4
FLAGS = ["--micro_batch_size", 4, "--save_interval", 1, "--keep_last", KEEP_LAST, *places.PLUGINS["zero2"]]
RESUMING = [*FLAGS, "--resume", "auto"]


class Bench:
    """The run to be killed: its start, its work, and its result if it is not killed."""

    def __init__(self, place: Place):
        self.place = place
        job = warm.train(place.flags("whole", *FLAGS), place.log("whole"))
        assert job.wait() == 0, job.output
        self.expected = places.trained(place.save_dir("whole"))
        _train_to(place, STEPS - 1)
        self._verified, self._resumed = set(), set()
        self.whole_trace = self.run()
        assert self.whole_trace.code == 0, place.log("killed").read_text()

    def run(self, *, crash_at: int | None = None, torn: bool = False) -> trace.Trace:
        """Run the fourth step in a new copy of the folder before it."""
        shutil.rmtree(self.place.folder / "killed", ignore_errors=True)
        shutil.copytree(self.place.save_dir("begun"), self.place.save_dir("killed"), symlinks=True)
        flags, log = self.place.flags("killed", *RESUMING), self.place.log("killed")
        job = warm.train(flags, log, before=_trace_from_save)
        return trace.watch(job, self.place.save_dir("killed"), crash_at=crash_at, torn=torn)

    def problem(self) -> str | None:
        """The problem of the folder that a killed run left, or of the run that continues in it."""
        save_dir = self.place.save_dir("killed")
        try:
            found = self._problem_of_folder(save_dir)
        except (UserError, OSError) as error:
            found = repr(error)
        return found or self._problem_of_resuming(save_dir)

    def _problem_of_folder(self, save_dir: Path) -> str | None:
        complete = checkpoint_files.complete_checkpoints(save_dir)
        if len(complete) < KEEP_LAST:
            return f"{len(complete)} complete checkpoints"
        for folder in complete:
            found = checkpoint_files.sizes_problem(folder) or next(checkpoint_files.content_problems(folder), None)
            if found:
                return found
        pointed = (save_dir / "latest").read_text().strip()
        if pointed not in {folder.name for folder in complete}:
            return f"latest names {pointed!r}"
        source = newest_source(RunFolder(save_dir), otherwise=ModelSource.of_pretrained(""))
        if source.checkpoint != str(complete[-1]):
            return f"--resume auto would take {source.checkpoint}"
        # Its files match its manifest, so of equal manifests one is enough.
        key = (complete[-1] / "manifest.json").read_bytes()
        if key not in self._verified:
            job = warm.Job(lambda: verify.main([str(complete[-1])]), self.place.log("verified"))
            if job.wait() != 0:
                return job.output
            self._verified.add(key)
        model = save_dir / "modeling"
        if model.exists() and places.model_hashes(model) != self.expected["model"]:
            return "modeling is not the model of the last step"
        return None

    def _problem_of_resuming(self, save_dir: Path) -> str | None:
        state = self._state_of(save_dir)
        leftovers = [path for path in save_dir.iterdir() if _is_leftover(path)]
        if state in self._resumed:
            # Equal except for the content of the removed folder, so removing it is enough.
            with captured_log() as lines:
                checkpoint_files.remove_leftovers(save_dir)
            return _leftover_problem(leftovers, "\n".join(lines))
        job = warm.train(self.place.flags("killed", *RESUMING), self.place.log("killed_resumed"))
        if job.wait() != 0:
            return f"--resume auto failed: {job.output}"
        names = {f"epoch-0_step-{step}" for step in range(STEPS - KEEP_LAST + 1, STEPS + 1)}
        names |= {"latest", "modeling", "plan.json", file_names.LOG_NAME, *file_names.REPORT_NAMES}
        present = set(os.listdir(save_dir))
        if present != names:
            return f"at the end there are {sorted(present)}"
        if places.trained(save_dir) != self.expected:
            return "the result is another one"
        self._resumed.add(state)
        return _leftover_problem(leftovers, job.output)

    def _state_of(self, save_dir: Path) -> frozenset:
        """Everything that a resumed run can read: the names, and the content of complete checkpoints."""
        manifests = {path.read_bytes() for path in save_dir.glob("*/manifest.json") if not _is_leftover(path.parent)}
        # Each run marks the name of what it is writing; all of these are removed alike.
        names = {MARK.sub(r".\1", name) for name in os.listdir(save_dir)}
        return frozenset({*names, *manifests, (save_dir / "latest").read_bytes()})


def _is_leftover(path: Path) -> bool:
    return file_names.LEFTOVER_NAME.fullmatch(path.name) is not None


def _leftover_problem(leftovers: list[Path], output: str) -> str | None:
    unreported = [path.name for path in leftovers if f"Removing {path}, which" not in output]
    left = [path.name for path in leftovers if path.exists()]
    return f"removal of {unreported} is not logged, {left} are still there" if unreported or left else None


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """The messages logged in this process inside the `with`."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logs.get_logger()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def _train_to(place: Place, step: int) -> None:
    """Run until the checkpoint of a step exists, and keep the folder's content at that time."""

    def stop_there() -> None:
        save = Checkpointer.save

        def save_and_end(checkpointer, state, *, epoch_ends):
            save(checkpointer, state, epoch_ends=epoch_ends)
            if state.step == step:
                os._exit(0)

        Checkpointer.save = save_and_end

    job = warm.train(place.flags("begun", *FLAGS), place.log("begun"), before=stop_there)
    assert job.wait() == 0, job.output


def _trace_from_save() -> None:
    save_now = Checkpointer.save_now

    def traced(checkpointer, state):
        if state.step == STEPS:
            trace.begin()
        return save_now(checkpointer, state)

    Checkpointer.save_now = traced


def check(place: Place, *, sample: int | None, seed: int) -> list[Row]:
    """Kill at every change and in every write, or at `sample` of each."""
    bench = Bench(place)
    rows = []
    operations = bench.whole_trace.operations
    writes = [number for number, operation in enumerate(operations, start=1) if operation.kind == "write"]
    for name, points, torn in (
        ("process killed at a change of a file during a save", range(1, len(operations) + 1), False),
        ("process killed in the middle of a write", writes, True),
    ):
        row = Row(name)
        for number in _sampled(points, sample, seed):
            found = bench.run(crash_at=number, torn=torn)
            assert found.code == 137 and len(found.operations) >= number, (found.code, number)
            row.record(f"{number} of {len(operations)} ({found.operations[-1]})", bench.problem())
        rows.append(row)
    row = Row("order on the disk (sync before rename)")
    row.record("save", order_problem(operations))
    return [*rows, row]


def _sampled(points: Iterable[int], sample: int | None, seed: int) -> list[int]:
    points = list(points)
    return points if sample is None else sorted(random.Random(seed).sample(points, min(sample, len(points))))


def order_problem(operations: list[trace.Operation]) -> str | None:
    """What a power cut could undo: a final name, or the removal of an old checkpoint, before the new one is written.

    This is the order of the calls; whether the disk keeps synced data cannot be tested here.
    """
    unsynced = set()
    for operation in operations:
        kind, path, target = operation
        if kind == "fsync":
            unsynced.discard(path)
        elif kind in ("write", "truncate"):
            unsynced.add(path)
        elif kind in ("open", "mkdir"):
            unsynced |= {path, _parent(path)}
        elif kind == "link":
            unsynced.add(_parent(path))
        elif kind == "rename":
            inside = {name for name in unsynced if name == path or name.startswith(path + "/")}
            gets_final_name = "/" not in target and not target.endswith(file_names.PARTIAL_SUFFIX)
            if gets_final_name and inside:
                return f"{operation}: {sorted(inside)[0]} is not on the disk yet"
            if not gets_final_name and file_names.CHECKPOINT_NAME.fullmatch(path) and "." in unsynced:
                return f"{operation}: the name of the newer one is not on the disk yet"
            moved = {target + name[len(path) :] for name in inside}
            unsynced = (unsynced - inside) | moved | {_parent(path), _parent(target)}
    return None


def _parent(path: str) -> str:
    return os.path.dirname(path) or "."
