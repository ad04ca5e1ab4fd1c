"""Tests of the checks: with one guarantee removed from the code, a check of that guarantee must find a problem.

A mutant is a replaced function in the process that forks the training commands, so that all of them have it.
"""

import contextlib
import os
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.engine.engine import Engine
from colossal_llama2.storage import files, publishing
from colossal_llama2.train.checkpointing import checkpoint_writer
from colossal_llama2.train.run_folder import checkpoint_files
from tests.faults import corruption, crash_points, place, steps
from tests.faults.crash_points import Bench
from tests.faults.rows import Row
from tests.faults.trace import Operation

publish_checkpoint, remove_old = checkpoint_files.publish_checkpoint, checkpoint_files.remove_old
PARTIAL = f"epoch-0_step-{crash_points.STEPS}"


@dataclass(frozen=True)
class Mutant:
    """What is removed, by which replacements (owner, name, value), and the check that must find a problem."""

    name: str
    changes: tuple[tuple[Any, str, Any], ...]
    finds: Callable[[Path], str | None]


def nothing(*args, **kwargs) -> None:
    """Replaces a function."""


def no_problems(*args, **kwargs):
    """Replaces a generator of problems."""
    return iter(())


def point_to(partial: Path, final: Path) -> None:
    """Replaces publish_checkpoint if there is nothing to rename."""
    (final.parent / "latest").write_text(final.name + "\n")


def point_first(partial: Path, final: Path) -> None:
    """Write `latest` before the checkpoint that it names exists."""
    point_to(partial, final)
    publish_checkpoint(partial, final)


def remove_one_more(checkpoint: Path, *, keep_last, keep_every) -> None:
    """Keep one checkpoint less than requested."""
    remove_old(checkpoint, keep_last=keep_last and keep_last - 1, keep_every=keep_every)


def crashes(chosen: Callable[[Operation], bool], *, torn: bool = False) -> Callable[[Path], str | None]:
    """A check that kills at these changes of a save."""

    def find(folder: Path) -> str | None:
        bench = Bench(place.make(folder, samples=16))
        for number, operation in enumerate(bench.whole_trace.operations, start=1):
            if chosen(operation):
                bench.run(crash_at=number, torn=torn)
                problem = bench.problem()
                if problem:
                    return f"{operation}: {problem}"
        return None

    return find


def order(folder: Path) -> str | None:
    """The check of the order of writes on the disk."""
    return crash_points.order_problem(Bench(place.make(folder, samples=16)).whole_trace.operations)


def damages(folder: Path) -> str | None:
    """The check of damaged files."""
    (row,) = corruption.check(place.make(folder, samples=16), sample=6, seed=1)
    return next(iter(row.problems), None)


def resumes(folder: Path) -> str | None:
    """The check of exactness."""
    (row,) = steps.check_each_step(place.make(folder, samples=steps.SAMPLES), every=25)
    return next(iter(row.problems), None)


SYNCS = tuple((owner, name, nothing) for owner in (publishing, files) for name in ("sync", "sync_entries"))
MUTANTS: list[Mutant] = [
    Mutant("no fsync", SYNCS, order),
    Mutant(
        "no rename: written under the final name",
        ((checkpoint_writer, "partial_suffix", str), (checkpoint_files, "publish_checkpoint", point_to)),
        crashes(lambda operation: operation.kind == "write" and operation.path.endswith("manifest.json"), torn=True),
    ),
    Mutant(
        "no manifest: sizes and hashes are not compared",
        ((checkpoint_files, "sizes_problem", nothing), (checkpoint_files, "content_problems", no_problems)),
        damages,
    ),
    Mutant(
        "latest is moved first",
        ((checkpoint_files, "publish_checkpoint", point_first),),
        crashes(lambda operation: operation.kind == "rename" and operation.target == PARTIAL),
    ),
    Mutant(
        "one checkpoint less is kept",
        ((checkpoint_files, "remove_old", remove_one_more),),
        crashes(lambda operation: operation.kind == "rmdir"),
    ),
    Mutant(
        "leftovers stay",
        ((checkpoint_files, "remove_leftovers", nothing),),
        crashes(lambda operation: operation.kind == "fsync" and os.path.basename(operation.path) == "manifest.json"),
    ),
    Mutant("master weights are not read", ((Engine, "load_masters", nothing),), resumes),
]


def check(work: Path) -> list[Row]:
    """A row per mutant: found, or a gap in the checks."""
    rows = []
    for number, mutant in enumerate(MUTANTS):
        row = Row(f"mutant found: {mutant.name}")
        with contextlib.ExitStack() as stack:
            for owner, name, value in mutant.changes:
                stack.enter_context(unittest.mock.patch.object(owner, name, value))
            found = mutant.finds(work / str(number))
        row.record(mutant.name, None if found else "no check has found it")
        rows.append(row)
        print(f"  {mutant.name}: {' '.join(str(found).split())[:300]}", flush=True)
    return rows
