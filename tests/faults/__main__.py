"""Every fault, at every place where it can happen: prints a table of the faults that were survived.

    python -m tests.faults
    python -m tests.faults --only crash_points --sample
    python -m tests.faults --mutants

Ends with 1 if a fault was not survived, and prints which. Runs on one CPU core; nothing is downloaded.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults import corruption, crash_points, fuzz, kills, links, malicious, mutants, place, starts, steps, warm
from tests.faults.rows import HEADER, Row


def crash_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Kills at every change of a file during a save."""
    return crash_points.check(place.make(folder, samples=16), sample=4 if sample else None, seed=seed)


def kill_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Kills of the whole process group while it trains."""
    counts = {"zero2": 3} if sample else {"zero2": 34, "gemini": 33, "3d": 33}
    rows = []
    for plugin, count in counts.items():
        here = place.make(folder / plugin, samples=kills.SAMPLES)
        rows += kills.check(here, plugin, kills=count, ranks=2, seed=seed)
    return rows


def corruption_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Damaged files."""
    return corruption.check(place.make(folder, samples=16), sample=8 if sample else None, seed=seed)


def malicious_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Files that would run code."""
    return malicious.check(place.make(folder, samples=16), sample=5 if sample else None, seed=seed)


def link_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Links and stray files in a run folder."""
    return links.check(place.make(folder, samples=16), sample=4 if sample else None, seed=seed)


def step_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Resuming from each step."""
    chosen = {"every": 10, "last": 30} if sample else {}
    return steps.check_each_step(place.make(folder, samples=steps.SAMPLES), **chosen)


def start_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Simultaneous starts."""
    return starts.check_starts(place.make(folder, samples=16), starts=6 if sample else 30)


def signal_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Signals at random moments."""
    return starts.check_signals(place.make(folder, samples=16), signals=4 if sample else 30, seed=seed)


def rank_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Other numbers of ranks."""
    return steps.check_orders() + ([] if sample else steps.check_ranks(place.make(folder, samples=48)))


def overflow_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """No update before the first save."""
    plugins = ["zero2", "ddp", "gemini accumulating"] if sample else list(steps.FP16)
    return steps.check_overflow(place.make(folder, samples=24), plugins=plugins)


def fuzz_rows(folder: Path, sample: bool, seed: int) -> list[Row]:
    """Random damage to JSON."""
    return fuzz.check(place.make(folder, samples=16), cases=3 if sample else 250, first_seed=seed)


CHECKS: dict[str, Callable[[Path, bool, int], list[Row]]] = {
    "crash_points": crash_rows,
    "kills": kill_rows,
    "corruption": corruption_rows,
    "malicious": malicious_rows,
    "links": link_rows,
    "steps": step_rows,
    "starts": start_rows,
    "signals": signal_rows,
    "ranks": rank_rows,
    "overflow": overflow_rows,
    "fuzz": fuzz_rows,
}


def main(argv=None) -> None:
    """Run the requested checks, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these checks alone")
    parser.add_argument("--sample", action="store_true", help="a few faults of each kind, in a minute or two")
    parser.add_argument("--mutants", action="store_true", help="take guarantees out, one by one: checks must find it")
    parser.add_argument("--seed", type=int, default=1, help="decides sampled places and random moments")
    parser.add_argument("--work_dir", type=Path, help="keep what was run in this new folder")
    args = parser.parse_args(argv)
    warm.import_everything()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        work = args.work_dir or Path(temporary)
        if args.mutants:
            rows = mutants.check(work)
            print(HEADER, *rows, sep="\n", flush=True)
        else:
            rows = run_checks(args.only, work, sample=args.sample, seed=args.seed)
    sys.exit(0 if all(row.is_survived for row in rows) else 1)


def run_checks(names: list[str], work: Path, *, sample: bool, seed: int) -> list[Row]:
    """Run checks by name and print their rows as they finish, with the failures below each."""
    print(HEADER, flush=True)
    rows = []
    for name in names:
        for row in CHECKS[name](work / name, sample, seed):
            rows.append(row)
            print(row, flush=True)
            for problem in row.problems:
                print(f"  {problem}", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    main()
