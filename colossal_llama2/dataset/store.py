"""Files and folders that appear whole or not at all, even if the machine loses power, and a full disk told in one line.

What is being written has a name that begins with `TEMPORARY`; a run that begins removes what an earlier one left.
"""

import errno
import json
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

from colossal_llama2.errors import RunError
from colossal_llama2.files import open_to_umask, sync, sync_entries

TEMPORARY = ".tmp-"
GO_ON = "and give the same command again, it goes on where it stopped"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{path.name}")


@contextmanager
def appearing_folder(path: Path, *, needed_bytes: int) -> Iterator[Path]:
    """Yield a new folder, which gets the name `path` when all in it is written. Raises RunError if the disk is full."""
    temporary = temporary_beside(path)
    try:
        with full_disk_told(path, needed_bytes):
            temporary.mkdir(parents=True)
            open_to_umask(temporary)
            yield temporary
            sync(temporary)
            # Of a run that died before it could note that this is done.
            shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            sync_entries(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def appearing_file(path: Path, *, needed_bytes: int = 4096) -> Iterator[Any]:
    """Yield a binary file to write, which gets the name `path` at the end. Raises RunError if the disk is full."""
    temporary = temporary_beside(path)
    try:
        with full_disk_told(path, needed_bytes):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_entries(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_whole(path: Path, content: Any) -> None:
    """Write a value as JSON, indented, in UTF-8."""
    import orjson

    # Indented, `json` is ten times slower: seconds for the account of some hundred thousand categories.
    text = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    with appearing_file(path) as file:
        file.write(text)


def read_json_or_none(path: Path) -> Any:
    """The value in a JSON file, None if there is no such file. Raises RunError if it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); delete {path.parent} and prepare the data again")


def read_json(path: Path) -> Any:
    """The value in a JSON file of the cache. Raises RunError if it is damaged or missing."""
    content = read_json_or_none(path)
    if content is None:
        raise RunError(f"{path} is missing; delete {path.parent} and prepare the data again")
    return content


@contextmanager
def full_disk_told(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn the system's error for a full disk into a RunError with needed and free bytes."""
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
        raise RunError(f"{needed}, {free:,} free in {folder}; make room, {GO_ON}")


def remove_leftovers(folder: Path) -> int:
    """Remove what dead runs were writing in `folder`; returns how many files and folders that were."""
    leftovers = [
        path for path in folder.iterdir() if path.name.startswith(TEMPORARY) and not path.name.endswith(".lock")
    ]  # fmt: skip
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)
