"""The files of checkpoints: which ones a folder holds, whether they are whole, how one gets its name, which may go.

A checkpoint is complete if it has its final name and a manifest.json, which is written last and lists every file:

    {"files": [{"path": "modeling/config.json", "bytes": 612, "sha256": "..."}, ...], "saved_at": 1764000000.0}
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from colossal_llama2 import logs
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.files import sync, sync_entries, write_json
from colossal_llama2.publishing import publish

MANIFEST_NAME = "manifest.json"
LEAST_SECONDS_APART = 1e-3
LATEST_NAME = "latest"
MODEL_NAME = "modeling"
PARTIAL_SUFFIX = ".tmp"
OLD_SUFFIX = ".old"
CHECKPOINT_NAME = re.compile(r"epoch-(\d+)_step-(\d+)")
LOG_NAME = "train_log.jsonl"
# What a run leaves beside its checkpoints when it ends.
REPORT_NAMES = ("settings.json", "environment.json", "loss.png")
_OURS = "|".join(map(re.escape, (MODEL_NAME, LATEST_NAME, LOG_NAME, *REPORT_NAMES)))
LEFTOVER_NAME = re.compile(rf"(epoch-\d+_step-\d+|{_OURS})\.(tmp|old)|\.token-[0-9a-f]{{8}}")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name).group(2))


def complete_checkpoints(save_dir: Path) -> List[Path]:
    """The complete checkpoints in a folder, in the order in which they were written."""
    found = []
    for folder in save_dir.glob("epoch-*_step-*") if save_dir.is_dir() else ():
        if CHECKPOINT_NAME.fullmatch(folder.name) and (folder / MANIFEST_NAME).is_file():
            found.append((_saved_at(folder), step_of(folder), folder))
    return [folder for *_, folder in sorted(found)]


def _saved_at(checkpoint: Path) -> float:
    try:
        return float(read_manifest(checkpoint)["saved_at"])
    except UserError:
        # Not to be read: it can be no more than the last choice, where the reason is told.
        return 0.0


def later_than_all(save_dir: Path, now: float) -> float:
    """`now`, or just after the newest complete checkpoint: clocks go back, and differ between hosts."""
    complete = complete_checkpoints(save_dir)
    return max(now, _saved_at(complete[-1]) + LEAST_SECONDS_APART) if complete else now


def list_files(folder: Path) -> Dict[str, int]:
    """Bytes of all files below a folder but its manifest, by name; links to files count as files."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    return {name: sizes[name] for name in sorted(sizes) if name != MANIFEST_NAME}


def file_entries(folder: Path, sizes: Dict[str, int], *, share: int = 0, shares: int = 1) -> List[Dict[str, Any]]:
    """The manifest's entries for one of `shares` shares of the files, about equal in bytes."""
    return [
        {"path": name, "bytes": sizes[name], "sha256": sha256_of(folder / name)}
        for name in _dealt(sizes, share, shares)
    ]


def _dealt(sizes: Dict[str, int], share: int, shares: int) -> List[str]:
    """Every `shares`-th of the names, the largest files first, so that the shares are about equal."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[share::shares]


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, entries: List[Dict[str, Any]], *, saved_at: float) -> None:
    """List a folder's files in its manifest. `saved_at` is in seconds since 1970."""
    files = sorted(entries, key=lambda entry: entry["path"])
    write_json(folder / MANIFEST_NAME, {"files": files, "saved_at": saved_at})


def read_manifest(folder: Path) -> Dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError if it is missing, damaged, or names a file outside the folder."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder}: has no {MANIFEST_NAME}, so it was not written to its end; take another checkpoint")
    try:
        manifest = json.loads(path.read_bytes())
        float(manifest["saved_at"])
        for entry in manifest["files"]:
            name = entry["path"]
            if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
                raise ValueError(f"it names {name!r}, which is outside")
            entry["bytes"], entry["sha256"] = int(entry["bytes"]), str(entry["sha256"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the manifest of a checkpoint ({error}); take another checkpoint")
    return manifest


def recorded_weights(checkpoint: Path) -> Dict[str, Dict[str, Any]]:
    """Bytes and sha256 of the safetensors of a checkpoint's model, by name. Raises UserError as `read_manifest`."""
    prefix = f"{MODEL_NAME}/"
    return {
        entry["path"].removeprefix(prefix): {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        for entry in read_manifest(checkpoint)["files"]
        if entry["path"].startswith(prefix) and entry["path"].endswith(".safetensors")
    }


def sizes_problem(folder: Path) -> Optional[str]:
    """What is wrong with a checkpoint by its files' names and sizes alone, None if they are as its manifest says."""
    try:
        listed = {entry["path"]: entry["bytes"] for entry in read_manifest(folder)["files"]}
    except UserError as error:
        return str(error)
    present = list_files(folder)
    for name, size in listed.items():
        if name not in present:
            return f"{folder / name}: is missing"
        if present[name] != size:
            return f"{folder / name}: has {present[name]:,} bytes, {size:,} were written"
    unknown = sorted(present.keys() - listed.keys())
    return f"{folder / unknown[0]}: is not listed in {MANIFEST_NAME}" if unknown else None


def content_problems(folder: Path, *, share: int = 0, shares: int = 1) -> Iterator[str]:
    """What is wrong with the content of one share of a checkpoint's files, whose sizes are right."""
    entries = {entry["path"]: entry for entry in read_manifest(folder)["files"]}
    for name in _dealt({name: entry["bytes"] for name, entry in entries.items()}, share, shares):
        try:
            if sha256_of(folder / name) != entries[name]["sha256"]:
                yield f"{folder / name}: its content is not what was written (sha256 differs)"
        except OSError as error:
            yield f"{folder / name}: cannot be read ({error.strerror})"


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Give a checkpoint its final name when all of it is on the disk, and then let `latest` name it."""
    publish(partial, final, replace=True)
    pointer = final.parent / f"{LATEST_NAME}{PARTIAL_SUFFIX}"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, final.parent / LATEST_NAME)
    sync_entries(final.parent)


def remove_leftovers(save_dir: Path) -> None:
    """Remove what a run that died was writing or removing, and say so; a folder that it was replacing comes back."""
    for path in sorted(save_dir.iterdir()) if save_dir.is_dir() else ():
        if not LEFTOVER_NAME.fullmatch(path.name):
            continue
        original = path.with_suffix("")
        if path.suffix == OLD_SUFFIX and not original.exists() and (path / MANIFEST_NAME).is_file():
            path.rename(original)
            logs.get_logger().info("An earlier run died while it replaced %s; its old content is back", original)
            continue
        logs.get_logger().info("Removing %s, which an earlier run left unfinished", path)
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_old(checkpoint: Path, *, keep_last: Optional[int], keep_every: Optional[int]) -> None:
    """Remove complete checkpoints beside `checkpoint` but the `keep_last` newest and multiples of `keep_every` steps.

    Called when the newest is complete, so there are never fewer than `keep_last`, once there were so many. `checkpoint`
    itself stays, whatever its age.
    """
    if keep_last is None:
        return
    for folder in complete_checkpoints(checkpoint.parent)[:-keep_last]:
        if folder != checkpoint and (keep_every is None or step_of(folder) % keep_every):
            # Out of sight at once, since a removal can be cut short too. It has no complete name, so it never returns.
            doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            logs.get_logger().info("Removed %s (--keep_last %d)", folder, keep_last)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(save_dir: Path, needed: int) -> None:
    """Raise RunError unless so many bytes are free for a checkpoint."""
    free = shutil.disk_usage(save_dir).free
    if free < needed:
        raise RunError(
            f"--save_dir {save_dir}: a checkpoint needs about {needed:,} bytes, {free:,} are free; nothing was "
            f"written, earlier checkpoints are whole; make room, or keep fewer with --keep_last"
        )
