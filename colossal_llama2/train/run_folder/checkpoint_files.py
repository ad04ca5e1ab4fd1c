"""The files of checkpoints: which are complete, whether they are intact, how they are published and removed.

A checkpoint is complete if it has its final name and a manifest.json, which is written last and lists every file:

    {"files": [{"path": "modeling/config.json", "bytes": 612, "sha256": "..."}, ...], "saved_at": 1764000000.0}
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import discard, is_stray, replace_file, write_json
from colossal_llama2.storage.publishing import publish
from colossal_llama2.train.run_folder.file_names import (
    CHECKPOINT_NAME,
    LATEST_NAME,
    LEFTOVER_NAME,
    MANIFEST_NAME,
    MODEL_NAME,
    OLD_SUFFIX,
    PARTIAL_SUFFIX,
)

LEAST_SECONDS_APART = 1e-3
SHA256 = re.compile(r"[0-9a-f]{64}")


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name. Raises ValueError for another name."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint.name} is not the name of a checkpoint")
    return int(match[2])


def complete_checkpoints(save_dir: Path) -> list[Path]:
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
        # Unreadable, so it is the last choice; the code that reads it then reports why.
        return 0.0


def later_than_all(save_dir: Path, now: float) -> float:
    """`now`, or just after the newest complete checkpoint: clocks are set back, and differ between hosts."""
    complete = complete_checkpoints(save_dir)
    return max(now, _saved_at(complete[-1]) + LEAST_SECONDS_APART) if complete else now


def list_files(folder: Path) -> dict[str, int]:
    """Bytes of all files below a folder except its manifest, by name; links to files count as files.

    Files that operating systems create by themselves are ignored. Anything that is neither a file nor a folder, such as
    a link to a folder, has -1 bytes.
    """
    sizes: dict[str, int] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_stray(name)]
        for name in [*names, *(name for name in folders if Path(place, name).is_symlink())]:
            path = Path(place, name)
            if not is_stray(name):
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size if path.is_file() else -1
    return {name: sizes[name] for name in sorted(sizes) if name != MANIFEST_NAME}


def file_entries(folder: Path, sizes: dict[str, int], *, share: int = 0, shares: int = 1) -> list[dict[str, Any]]:
    """The manifest's entries for one of `shares` parts of the files, which have about equally many bytes."""
    return [
        {"path": name, "bytes": sizes[name], "sha256": sha256_of(folder / name)}
        for name in _dealt(sizes, share, shares)
    ]


def _dealt(sizes: dict[str, int], share: int, shares: int) -> list[str]:
    """Every `shares`-th name, the largest files first, so that all shares have about equally many bytes."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))[share::shares]


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, entries: list[dict[str, Any]], *, saved_at: float) -> None:
    """Write a folder's manifest. `saved_at` is in seconds since 1970."""
    files = sorted(entries, key=lambda entry: entry["path"])
    write_json(folder / MANIFEST_NAME, {"files": files, "saved_at": saved_at})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises UserError if it is missing, damaged, or names a file outside the folder."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder}: has no {MANIFEST_NAME}, so it is incomplete; use another checkpoint")
    try:
        manifest = json_input.read_object(path)
        json_input.number(manifest, "saved_at")
        names = [_checked_entry(entry) for entry in json_input.typed(manifest, "files", list)]
        if len(set(names)) < len(names):
            raise ValueError("it lists a file twice")
    except KeyError as error:
        raise UserError(f"{path}: not the manifest of a checkpoint (no {error}); use another checkpoint")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not the manifest of a checkpoint ({error}); use another checkpoint")
    return manifest


def recorded_weights(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of the safetensors of a checkpoint's model, by name. Raises UserError as `read_manifest`."""
    prefix = f"{MODEL_NAME}/"
    return {
        entry["path"].removeprefix(prefix): {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        for entry in read_manifest(checkpoint)["files"]
        if entry["path"].startswith(prefix) and entry["path"].endswith(".safetensors")
    }


def _checked_entry(entry: Any) -> str:
    """The path in an entry of a manifest. Raises ValueError or KeyError if the entry is invalid."""
    if not isinstance(entry, dict):
        raise ValueError(f"it lists {json_input.shown(entry)}, which is not an object")
    name = json_input.typed(entry, "path", str)
    parts = name.split("/")
    if not parts[0] or {".", ".."} & set(parts) or "\\" in name or "\0" in name:
        raise ValueError(f"it names {json_input.shown(name)}, which is outside the checkpoint")
    name.encode()  # half of a surrogate pair is in no file's name
    json_input.whole_number(entry, "bytes")
    if not SHA256.fullmatch(json_input.typed(entry, "sha256", str)):
        raise ValueError(f"sha256 of {json_input.shown(name)} is {json_input.shown(entry['sha256'])}")
    return name


def sizes_problem(folder: Path) -> str | None:
    """The first difference between a checkpoint's files and its manifest, by name and size; None if there is none."""
    try:
        listed = {entry["path"]: entry["bytes"] for entry in read_manifest(folder)["files"]}
    except UserError as error:
        return str(error)
    present = list_files(folder)
    for name, size in listed.items():
        if name not in present:
            return f"{folder / name}: is missing"
        if present[name] < 0:
            return f"{folder / name}: is not a regular file"
        if present[name] != size:
            return f"{folder / name}: has {present[name]:,} bytes, {size:,} were written"
    unknown = sorted(present.keys() - listed.keys())
    if unknown:
        return f"{folder / unknown[0]}: is not listed in {MANIFEST_NAME}; remove it to use this checkpoint"
    return None


def content_problems(folder: Path, *, share: int = 0, shares: int = 1) -> Iterator[str]:
    """The problems in the content of one share of a checkpoint's files, whose sizes are right."""
    entries = {entry["path"]: entry for entry in read_manifest(folder)["files"]}
    for name in _dealt({name: entry["bytes"] for name, entry in entries.items()}, share, shares):
        try:
            if sha256_of(folder / name) != entries[name]["sha256"]:
                yield f"{folder / name}: its content has changed (sha256 differs)"
        except OSError as error:
            yield f"{folder / name}: cannot be read ({error.strerror})"


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Rename a checkpoint to its final name when all of it is on the disk, then update `latest`."""
    publish(partial, final, replace=True)
    replace_file(final.parent / LATEST_NAME, f"{final.name}\n".encode())


def is_unfinished(path: Path) -> bool:
    """Whether `remove_leftovers` removes this path; it restores a complete checkpoint that was being replaced."""
    return LEFTOVER_NAME.fullmatch(path.name) is not None and not _is_replaced(path)


def _is_replaced(path: Path) -> bool:
    return path.suffix == OLD_SUFFIX and not path.is_symlink() and (path / MANIFEST_NAME).is_file()


def remove_leftovers(save_dir: Path) -> None:
    """Remove what a run that died was writing or removing, and restore what it was replacing; both are logged."""
    for path in sorted(save_dir.iterdir()) if save_dir.is_dir() else ():
        if not LEFTOVER_NAME.fullmatch(path.name):
            continue
        checkpoint = CHECKPOINT_NAME.match(path.name)
        original = path.with_name(checkpoint[0]) if checkpoint else path.with_suffix("")
        if _is_replaced(path) and not os.path.lexists(original):
            path.rename(original)
            logs.get_logger().info("An earlier run died while it replaced %s; the old content is restored", original)
            continue
        logs.get_logger().info("Removing %s, which an earlier run left incomplete", path)
        discard(path)


def remove_old(checkpoint: Path, *, keep_last: int | None, keep_every: int | None) -> None:
    """Remove checkpoints beside `checkpoint`, but keep the `keep_last` newest and multiples of `keep_every` steps.

    Called when the newest is complete, so that `keep_last` of them always exist. `checkpoint` itself is kept, whatever
    its age. If a checkpoint is a link to another folder, only the link is removed.
    """
    if keep_last is None:
        return
    for folder in complete_checkpoints(checkpoint.parent)[:-keep_last]:
        if folder != checkpoint and (keep_every is None or step_of(folder) % keep_every):
            # Renamed first, since a removal can be interrupted: under this name it is a leftover, and not a checkpoint.
            if folder.is_symlink():
                folder.unlink()
                logs.get_logger().info(
                    "Removed the link %s (--keep_last %d); the checkpoint that it points to is kept", folder, keep_last
                )
                continue
            doomed = folder.with_name(folder.name + PARTIAL_SUFFIX)
            discard(doomed)
            folder.rename(doomed)
            discard(doomed)
            logs.get_logger().info("Removed %s (--keep_last %d)", folder, keep_last)


def check_room(save_dir: Path, needed: int, *, files: int = 1) -> None:
    """Raise RunError unless `needed` bytes, and inodes for `files` files, are free for a checkpoint."""
    free = os.statvfs(save_dir)
    wanted = []
    if free.f_bavail * free.f_frsize < needed:
        wanted.append(f"needs about {needed:,} bytes, {free.f_bavail * free.f_frsize:,} are free")
    # A file system that creates inodes on demand reports a total of 0.
    if free.f_files and free.f_favail < files:
        wanted.append(f"has about {counted(files, 'file')}, {free.f_favail:,} more can be created (inodes, see df -i)")
    if wanted:
        raise RunError(
            f"--save_dir {save_dir}: a checkpoint {' and '.join(wanted)}; nothing was written, earlier checkpoints are "
            f"complete; free some space, or keep fewer with --keep_last"
        )
