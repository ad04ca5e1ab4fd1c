"""Start, break and resume runs on pretended hosts, and print a table of what happened: tests/cluster/run.sh.

The table has three parts: launchers and what happens to them (`scenarios`), preparation of data on a Ray cluster
(`ray_nodes`), and what the doctor reports of broken hosts (`doctor_cases`). Two cells run at a time, each on hosts of
its own: most of their time passes in waiting for what has been lost.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from colossal_llama2 import tables
from tests.cluster import doctor_cases, hosts, ray_nodes, scenarios
from tests.cluster.workplace import make_workplace

RAY, DOCTOR = "ray", "doctor"
HEADING = ["launcher", "scenario", "outcome", "seconds", "exit code"]
# A part of the table: its name, and a function that yields rows.
Part = tuple[str, Callable[[], Iterator[list[str]]]]


class Table:
    """Collects the rows of parts that run at the same time, and prints each when it is done."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.running: set[str] = set()
        self._lock = threading.Lock()

    def fill(self, name: str, part: Callable[[], Iterator[list[str]]], repeats: int) -> None:
        """Add the rows of a part. If one is not as expected, the part runs again at most `repeats` times."""
        self.running.add(name)
        rows = self._rows(name, part)
        while repeats and any(map(_is_wrong, rows)):
            print(f"{name}: once more", flush=True)
            rows, repeats = self._rows(name, part), repeats - 1
        with self._lock:
            self.rows += rows
        self.running.discard(name)

    @property
    def failures(self) -> int:
        """How many rows are not as expected."""
        return sum(map(_is_wrong, self.rows))

    def _rows(self, name: str, part: Callable[[], Iterator[list[str]]]) -> list[list[str]]:
        """The rows of a part, each printed when it is done."""
        found = []
        try:
            for row in part():
                found.append(row)
                print(" | ".join(row), flush=True)
        except Exception as error:
            found.append([*name.split(": ", 1), f"WRONG: {error!r}", "", ""])
            print(" | ".join(found[-1]), flush=True)
        return found


def _is_wrong(row: list[str]) -> bool:
    return row[2].startswith("WRONG")


def parts(args: argparse.Namespace, folder: Path) -> list[Part]:
    """What the flags choose: the undisturbed run first, since others wait for it, and what takes longest early."""
    found: list[Part] = []
    if args.launcher in (None, *scenarios.ALL):
        chosen = scenarios.chosen(args.launcher, args.only, quick=args.quick)
        # Slurm takes longest.
        chosen[1:] = sorted(chosen[1:], key=lambda cell: cell[0] != scenarios.SLURM)
        cells = scenarios.Cells(folder, make_workplace(folder / "work"), args.patience) if chosen else None
        for launcher, scenario in chosen:
            assert cells is not None
            found.append((f"{launcher}: {scenario.name}", _one_row(cells.run, launcher, scenario)))
    if args.launcher in (None, RAY):
        rows = ray_nodes.chosen(args.only, quick=args.quick)
        if rows:
            ray_table = partial(ray_nodes.RayTable, folder / "ray", args.patience, default_settings=args.ray_defaults)
            found.insert(1, (f"{RAY}: nodes", lambda: _ray_rows(ray_table, rows)))
    if args.launcher in (None, DOCTOR):
        for case in doctor_cases.CASES:
            if args.only in case.name and (case.is_quick or not args.quick):
                found.append((f"{DOCTOR}: {case.name}", _one_row(_doctor_row, case, args.patience)))
    return found


def _one_row(function: Callable[..., list[str]], *given: object) -> Callable[[], Iterator[list[str]]]:
    def rows() -> Iterator[list[str]]:
        yield function(*given)

    return rows


def _ray_rows(make_table: Callable[[], ray_nodes.RayTable], rows: tuple[ray_nodes.Row, ...]) -> Iterator[list[str]]:
    if reason := ray_nodes.missing():
        yield from ([RAY, row.name, f"skipped: {reason}", "", ""] for row in rows)
        return
    for row in make_table().run(rows):
        yield [RAY, *row]


def _doctor_row(case: doctor_cases.Case, patience: float) -> list[str]:
    if reason := doctor_cases.missing(case):
        return [DOCTOR, case.name, f"skipped: {reason}", "", ""]
    name, seconds, code, line, wrong = doctor_cases.run_case(case, patience)
    return [DOCTOR, name, f"WRONG: {wrong}: {line}" if wrong else "as expected", seconds, code]


def end_after(seconds: float, table: Table, folder: Path, *, keeps: bool) -> None:
    """End this process with 1 after a time, naming what is not done. The hosts end with it."""

    def end() -> None:
        print(f"error: not done after {seconds:g} s: {', '.join(sorted(table.running))}", file=sys.stderr, flush=True)
        for log in sorted(folder.glob("*.log")):
            print(f"--- the end of {log.name}:\n{log.read_text(errors='replace')[-1000:]}", file=sys.stderr, flush=True)
        if not keeps:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def parser() -> argparse.ArgumentParser:
    """The flags."""
    result = argparse.ArgumentParser(prog="tests/cluster/run.sh", description=__doc__.splitlines()[0])
    result.add_argument("--launcher", choices=(*scenarios.ALL, RAY, DOCTOR), help="only this one")
    result.add_argument("--only", default="", metavar="WORD", help="only scenarios whose names contain this")
    result.add_argument("--quick", action="store_true", help="only the cells that a slow machine does not change")
    result.add_argument("--at_once", type=int, default=2, metavar="N", help="cells at a time (default: %(default)s)")
    result.add_argument("--keep", type=Path, metavar="DIR", help="new folder for the logs (default: removed)")
    result.add_argument(
        "--patience", type=float, default=1.0, metavar="FACTOR", help="of all limits; for a busy machine"
    )
    result.add_argument(
        "--repeats", type=int, default=0, metavar="N", help="how often to repeat what is not as expected (default: 0)"
    )
    result.add_argument("--ray_defaults", action="store_true", help="let Ray wait for lost hosts as long as by default")
    result.add_argument("--limit", type=float, metavar="SECONDS", help="end with code 1 after this time")
    result.add_argument(
        "--skip_if_missing", action="store_true", help="end with code 0 where this machine can make no hosts"
    )
    return result


def main() -> None:
    """Run the cells, print the table, and end with 1 if a cell is not as expected."""
    args = parser().parse_args()
    if reason := hosts.missing():
        if args.skip_if_missing:
            print(f"tests/cluster/run.sh: skipped: {reason}")
            return
        parser().error(reason)
    # Shells make background commands ignore it, and with them everything that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="clusters-"))
    folder.mkdir(parents=True, exist_ok=True)
    # What the cells make is removed with it, also after --limit.
    tempfile.tempdir = str(folder.resolve())
    table = Table()
    if args.limit:
        end_after(args.limit, table, folder, keeps=args.keep is not None)
    pool = ThreadPoolExecutor(args.at_once)
    try:
        for name, part in parts(args, folder):
            pool.submit(table.fill, name, part, args.repeats)
        pool.shutdown()
    except KeyboardInterrupt:
        # An exception would wait for the cells that run. The hosts end with this process.
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(130)
    print()
    tables.print_table([HEADING, *sorted(table.rows, key=lambda row: row[0])], align="lllrr")
    print(f"{len(table.rows)} cells, {table.failures} not as expected, {time.monotonic() - started:.0f} s")
    if args.keep is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if table.failures else 0)


if __name__ == "__main__":
    main()
