"""Files and folders that appear complete or not at all, even after a power failure; one-line errors for a full disk.

While something is written, its name begins with `TEMPORARY`; the next run removes what an earlier one left.
"""

import errno
import filecmp
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colossal_llama2.errors import RunError
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import discard, errors_naming, open_to_umask, sync, sync_entries

TEMPORARY = ".tmp-"
GO_ON = "and run the same command again, it continues where it stopped"
# A manifest counts each category of each input, which can be hundreds of thousands.
MAX_JSON_BYTES, MAX_JSON_VALUES = 256 << 20, 8_000_000
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")


@contextmanager
def appearing_folder(path: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a new folder that gets the name `path` when it is complete. Raises RunError if the disk is full.

    A folder of this name stays if it has the same files: it is from another attempt.
    """
    temporary = temporary_beside(path)
    try:
        with full_disk_reported(path, needed_bytes):
            temporary.mkdir(parents=True)
            open_to_umask(temporary)
            yield temporary
            sync(temporary)
            _rename_folder(temporary, path)
            sync_entries(path.parent)
    finally:
        discard(temporary)


def _rename_folder(temporary: Path, path: Path) -> None:
    """Give a complete folder its final name, unless there is one with the same content."""
    try:
        os.rename(temporary, path)
    except OSError:
        # There is one, from a run that died before it could record it, or from another attempt at the same task. It is
        # not replaced by its equal: meanwhile others may remove the temporary one, and nothing would be left.
        if not _has_files_of(path, temporary):
            discard(path)
            os.rename(temporary, path)


def _has_files_of(path: Path, other: Path) -> bool:
    """Whether a folder has all files of another one, byte for byte."""
    if path.is_symlink() or not path.is_dir():
        return False
    return all(
        (path / file.name).is_file() and filecmp.cmp(path / file.name, file, shallow=False) for file in other.iterdir()
    )


@contextmanager
def appearing_file(path: Path, *, needed_bytes: int = 4096) -> Iterator[Any]:
    """Yield a binary file that gets the name `path` when it is complete. Raises RunError if the disk is full."""
    temporary = temporary_beside(path)
    try:
        with full_disk_reported(path, needed_bytes):
            with errors_naming(path), open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_entries(path.parent)
    finally:
        discard(temporary)


def write_json_whole(path: Path, content: Any) -> None:
    """Write a value as JSON, indented, in UTF-8."""
    import orjson

    # `json` with indentation is ten times slower: seconds for some hundred thousand categories.
    text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    with appearing_file(path) as file:
        file.write(text)


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file, or None if the file does not exist. Raises RunError if it is damaged."""
    try:
        return json_input.parse(json_input.read_regular(path, most_bytes=MAX_JSON_BYTES), most_values=MAX_JSON_VALUES)
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError) as error:
        raise RunError(f"{path} is damaged ({error}); delete {path.parent} and prepare the data again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the cache. Raises RunError if it is damaged or missing."""
    content = read_json_or_none(path)
    if content is None:
        raise RunError(f"{path} is missing; delete {path.parent} and prepare the data again")
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (not a JSON object); delete {path.parent} and prepare the data again")
    return content


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn errors for missing entries, or entries of a wrong type, in a JSON file of the cache into a RunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); delete {path.parent} and prepare the data again")


@contextmanager
def full_disk_reported(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn the system's error for a full disk into a RunError with the needed and the free bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        needed = f"{path}: {error.strerror}; about {needed_bytes:,} bytes needed"
        if error.errno == errno.EFBIG:
            raise RunError(f"{needed}; raise the limit on the size of a file (ulimit -f), {GO_ON}")
        free = shutil.disk_usage(folder).free
        raise RunError(f"{needed}, {free:,} free in {folder}; free some space, {GO_ON}")


def remove_leftovers(folder: Path) -> int:
    """Remove what dead runs were writing in `folder`. Returns the number of files and folders removed."""
    leftovers = [
        path for path in folder.iterdir() if path.name.startswith(TEMPORARY) and not path.name.endswith(".lock")
    ]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)
