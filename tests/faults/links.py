"""A received run folder with links in it, and with files that systems create: nothing outside of it is touched.

Each link replaces something that the run writes, replaces or removes, and points to a file or folder outside; the run
continues with --resume auto. Then the same with stray files in every checkpoint.
"""

import os
import random
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colossal_llama2.train.run_folder import file_names
from tests.faults import place as places
from tests.faults import warm
from tests.faults.place import Place
from tests.faults.rows import Row

FLAGS = ["--micro_batch_size", 4, "--save_interval", 2, "--keep_last", 1, *places.PLUGINS["zero2"]]
# The files that a run opens under their final names, and under their names while they are written.
FILES = (file_names.LOCK_NAME, *file_names.FILE_NAMES)
FOLDERS = ("modeling", "modeling.tmp", "epoch-0_step-4", "epoch-0_step-4.tmp", "epoch-0_step-2.tmp")
MOVED = ("epoch-0_step-2", "epoch-0_step-2/running_states.json", "epoch-0_step-2/modeling", "modeling")
STRAYS = (".DS_Store", "._x", ".nfs0001", "Thumbs.db", ".fuse_hidden1", ".snapshot", "lost+found", "desktop.ini")


def cases() -> dict[str, Callable[[Path, Path], None]]:
    """What is planted, by name: functions of the run's folder and of one outside with `file` and `folder`."""
    found: dict[str, Callable[[Path, Path], None]] = {}
    for name in (*FILES, *(f"{name}.tmp" for name in FILES[1:])):
        found[f"{name} -> file"] = _planter(name, lambda path, out: path.symlink_to(out / "file"))
        found[f"{name} -> new file"] = _planter(name, lambda path, out: path.symlink_to(out / "new"))
        found[f"{name} = file"] = _planter(name, lambda path, out: os.link(out / "file", path))
    for name in (*FILES, "latest.tmp", *FOLDERS):
        found[f"{name} -> folder"] = _planter(name, lambda path, out: path.symlink_to(out / "folder"))
    for name in MOVED:
        found[f"{name}, moved and linked"] = _mover(name)
    return found


def _planter(name: str, plant: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def planted(run: Path, out: Path) -> None:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        plant(path, out)

    return planted


def _mover(name: str) -> Callable[[Path, Path], None]:
    def moved(run: Path, out: Path) -> None:
        shutil.move(run / name, out / "moved")
        (run / name).symlink_to(out / "moved")

    return moved


def check(place: Place, *, sample: int | None, seed: int) -> list[Row]:
    """Plant each link, or `sample` of them, and resume; then resume among stray files."""
    job = warm.train(place.flags("begun", *FLAGS, "--max_steps", 2), place.log("begun"))
    assert job.wait() == 0, job.output
    planted = cases()
    chosen = list(planted) if sample is None else random.Random(seed).sample(list(planted), sample)
    links = Row("link in a received run folder: nothing outside is touched")
    for name in chosen:
        links.record(name, _problem(place, planted[name]))
    strays = Row("stray files of systems in checkpoints: resumed as without them")
    for name in STRAYS if sample is None else STRAYS[:1]:
        strays.record(name, _stray_problem(place, name))
    return [links, strays]


def _problem(place: Place, plant: Callable[[Path, Path], None]) -> str | None:
    out = place.folder / "out"
    _begin_again(place)
    (out / "folder").mkdir(parents=True)
    for path in (out / "file", out / "folder" / "inner"):
        path.write_text("precious")
        path.chmod(0o640)
    plant(place.save_dir("linked"), out)
    before = _all_of(out)
    job = _resume(place)
    code = job.wait()
    after = _all_of(out)
    if after != before:
        return f"changed: {sorted(name for name in {**before, **after} if before.get(name) != after.get(name))}"
    errors = re.findall(r"^\S.*: error: .*", job.output, re.M)
    if "Traceback" in job.output or code not in (0, 2) or len(errors) != (code != 0):
        return f"exit code {code}: {job.output[-2000:]}"
    left = [path.name for path in place.save_dir("linked").iterdir() if path.suffix in (".tmp", ".old")]
    return f"left: {left}" if left and code == 0 else None


def _stray_problem(place: Place, name: str) -> str | None:
    _begin_again(place)
    save_dir = place.save_dir("linked")
    for folder in [save_dir, *(path for path in save_dir.rglob("*") if path.is_dir())]:
        (folder / name).write_text("x")
    job = _resume(place)
    if job.wait() != 0 or "Resuming" not in job.output:
        return job.output
    copied = [path for path in (save_dir / "modeling", save_dir / "epoch-0_step-4") if [*path.rglob(name)]]
    return f"{name} was copied into {copied[0]}" if copied else None


def _begin_again(place: Place) -> None:
    for name in ("linked", "out"):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    shutil.copytree(place.folder / "begun", place.folder / "linked")


def _resume(place: Place) -> warm.Job:
    return warm.train(place.flags("linked", *FLAGS, "--resume", "auto"), place.log("resumed"))


def _all_of(folder: Path) -> dict[str, Any]:
    """Kind, permissions and content of everything below a folder."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(folder))] = (status.st_mode, content)
    return found
