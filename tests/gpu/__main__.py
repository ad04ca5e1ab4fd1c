"""Check and measure training on one GPU, within a few minutes, and write a page and a JSON file about it.

    python -m tests.gpu
    python -m tests.gpu --device cpu --small

Each part is a process of its own with a time limit, so a part that fails, crashes or hangs ends alone. Ends with code 1
if a part failed, and with 0 if all parts passed or were skipped; both files are written in each case, after every part.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.gpu import plan, processes
from tests.gpu.parts import FAILED, Part
from tests.gpu.record import JSON_FILE, Recorder
from tests.gpu.running import Limits, Schedule

# Cores of the host for each of the parts that run beside each other on a GPU.
CORES_A_PART = 4
MOST_BESIDE = 4


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --small")
    parser.add_argument("--small", action="store_true", help="tiny models: whether everything runs, not how fast")
    parser.add_argument("--minutes", metavar="N", type=float, default=8.0, help="limit of the whole run (default: 8)")
    parser.add_argument("--only", metavar="WORD", nargs="+", default=[], help="only parts whose name has such a word")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("gpu_run"), help="gets gpu.md and gpu.json")
    parser.add_argument("--work_dir", metavar="DIR", type=Path, help="where to put models and checkpoints meanwhile")
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.small:
        parser.error("--device cpu given without --small, which would take hours; add --small")
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} given; a number above 0 is allowed")
    if (args.output / JSON_FILE).exists():
        parser.error(f"--output {args.output} has the page of an earlier run; give a new folder")
    place = plan.Place(Path(), on_gpu=args.device == "cuda", small=args.small)
    if not with_needed(plan.all_parts(place), args.only):
        parser.error(f"--only {' '.join(args.only)} given, which no part has in its name")
    try:
        work_dir = Path(tempfile.mkdtemp(prefix="gpu-run-", dir=args.work_dir)).resolve()
    except OSError as error:
        parser.error(f"--work_dir {args.work_dir}: {error.strerror}; give a folder that can be written")
    # An exception, so that processes are ended and models removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        make_output(args.output, parser)
        place = replace(place, work_dir=work_dir)
        parts = with_needed(plan.all_parts(place), args.only)
        recorder = Recorder(args.output, parts, small=args.small, minutes=args.minutes)
        return run(place, parts, recorder, deadline=time.monotonic() + 60 * args.minutes)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def make_output(folder: Path, parser: argparse.ArgumentParser) -> None:
    """Make the folder of the files, or end with code 2 if they could not be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--output {folder}: {error.strerror}; give a folder that can be written")


def run(place: plan.Place, parts: Sequence[Part], recorder: Recorder, *, deadline: float) -> int:
    """Run the parts and record them; returns the exit code."""
    environment = place.environment(os.environ.get("CUDA_VISIBLE_DEVICES"))
    cores = len(os.sched_getaffinity(0))
    beside = max(1, min(MOST_BESIDE, cores // CORES_A_PART)) if place.on_gpu else 1
    # The server that forks is the tests', and imports pytest.
    forks = not place.on_gpu and importlib.util.find_spec("pytest") is not None
    schedule = Schedule(
        [replace(part, environment={**environment, **part.environment}) for part in parts],
        limits=Limits(deadline, beside),
        starter=processes.fork if forks else processes.start,
        folder=place.work_dir / "output",
    )
    outcomes = schedule.run(recorder.add)
    return 1 if any(outcome.status == FAILED for outcome in outcomes.values()) else 0


def with_needed(parts: Sequence[Part], words: Sequence[str]) -> list[Part]:
    """The parts with one of the words in their name, and what they need, in their order; all if there are no words."""
    wanted = {part.name for part in parts if not words or any(word in part.name for word in words)}
    for part in reversed(parts):
        if part.name in wanted:
            wanted.update(part.needs)
    return [part for part in parts if part.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
