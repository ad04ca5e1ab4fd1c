"""Files and folders: JSON and jsonl with errors that name the place, and folders that appear complete or not at all.

The atomicwrites package is no longer maintained, writes single files only, and does not name the file in its errors.
"""

import errno
import fnmatch
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.storage import json_input
from colossal_llama2.storage.input_files import check_regular, is_regular
from colossal_llama2.storage.lines import MAX_LINE_BYTES, LineReader
from colossal_llama2.storage.row_errors import RowError, json_type

# Files that operating systems, file servers and desktops create in any folder.
STRAY_NAMES = (
    ".DS_Store",
    "._*",
    ".AppleDouble",
    ".Spotlight-V100",
    ".Trashes",
    ".fseventsd",
    ".TemporaryItems",
    ".nfs*",
    ".fuse_hidden*",
    ".snapshot",
    ".Trash-*",
    ".directory",
    ".~lock.*#",
    "lost+found",
    "@eaDir",
    "Thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
)


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if the file is missing or holds anything else."""
    if not is_regular(path):
        raise UserError(f"{path.parent} holds no {path.name}; copy it there from where the model comes from")
    check_regular(path)
    try:
        return json_input.read_object(path, unique_names=False)
    except ValueError as error:
        problem = f" is {error}" if str(error).startswith("not ") else f" cannot be read: {error}"
        raise UserError(f"{path}{problem}; copy the file again from its source")


class JsonLine(NamedTuple):
    """One line of a jsonl file: `where` is file:line, `size` its bytes, `record` its object, None for a blank line.

    `text` is the line that the object was parsed from.

    Consecutive blank lines may be one item, at the position of the first.
    """

    where: str
    size: int
    record: dict | None
    text: bytes = b""


def read_jsonl(path: Path, *, explain: Callable[[bytes], str | None] = lambda line: None) -> Iterator[JsonLine]:
    """Read a jsonl file line by line, consecutive blank lines as one item.

    Args:
        explain: returns a better message for a line that is not a JSON object, or None.

    Raises:
        UserError: with file:line, for a line that is not a JSON object, or too long.
    """
    number = 1
    with path.open("rb") as file:
        reader = LineReader(file)
        while (line := reader.read()).size:
            where = f"{path}:{number}"
            if line.content is None:
                raise UserError(
                    f"{where}: a line of {line.size:,} bytes, at most {MAX_LINE_BYTES >> 20} MiB allowed; cut it"
                )
            text = line.content.removeprefix(b"\xef\xbb\xbf")
            number += line.count
            if text.isspace() or not text:
                yield JsonLine(where, line.size, None)
                continue
            try:
                yield JsonLine(where, line.size, parse_object(text), text)
            except ValueError as error:
                raise UserError(f"{where}: {explain(text) or error}")


def parse_object(line: bytes, unit: str = "line", *, allows_nan: bool = False) -> dict:
    """The object in one line of jsonl.

    Args:
        unit: what the text is, for messages.
        allows_nan: whether the words NaN, Infinity and -Infinity are read as floats. JSON has none, but pandas and
            Python's own json write them.

    Raises:
        RowError: it is anything else.
    """
    import orjson

    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if allows_nan and (record := _parsed_with_nan(line)) is not None:
            return record
        reason, why = _why_not_json(line, error, unit)
        raise RowError(f"{why}; each {unit} must be one JSON object in UTF-8", reason=reason)
    if not isinstance(record, dict):
        raise RowError(f"{json_type(record)} given; each {unit} must be one JSON object", reason="not a JSON object")
    return record


def _parsed_with_nan(line: bytes) -> dict | None:
    """The object in a line that is JSON except for NaN and Infinity; None if it is not."""
    if b"NaN" not in line and b"Infinity" not in line:
        return None
    try:
        record = json.loads(line.decode())
        if b"\\u" in line:
            # Python's parser accepts halves of surrogate pairs, which cannot be encoded.
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _why_not_json(line: bytes, error: ValueError, unit: str) -> tuple[str, str]:
    """The reason to count rows by, and the message."""
    try:
        line.decode()
    except UnicodeDecodeError as undecodable:
        return "not UTF-8", f"not UTF-8 at byte {undecodable.start + 1} of the {unit}"
    if "surrogate" in str(error):
        return "half of a surrogate pair", "half of a surrogate pair, which is not a character"
    # Without the line number of the parser, which counts from the beginning of this text.
    place = (
        f"{error.msg}, character {error.pos + 1} of the {unit}" if isinstance(error, json.JSONDecodeError) else error
    )
    return "not JSON", f"not JSON ({place})"


def jsonl_files(folder: Path) -> list[Path]:
    """The *.jsonl files directly inside a folder, by name, without hidden ones such as macOS creates."""
    return sorted(path for path in folder.glob("*.jsonl") if path.is_file() and not path.name.startswith("."))


def check_is_utf8(path: str, flag: str) -> None:
    """Raise a UserError for a name that is not UTF-8, as unzip may produce: it cannot be written to JSON."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag}: the name {path!a} is not UTF-8; rename it (convmv renames whole folders)")


def check_can_create(path: Path, flag: str) -> None:
    """Raise a UserError unless the file or folder can be created, with its parents, or exists and is writable."""
    parent = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if parent == path.absolute() and parent.is_file():
        parent = parent.parent
    if not parent.is_dir():
        kind = "a file" if parent.exists() else "a broken link"
        raise UserError(f"{flag} {path} cannot be written: {parent} is {kind}, not a folder; give another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written: no write permission in {parent}; give another folder")


def open_to_umask(path: Path) -> None:
    """Set the default permissions on a file or folder that a library created for its owner only."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_json(path: Path, content: Any) -> None:
    """Write a value as transformers writes JSON: indented, UTF-8, a newline at the end.

    Raises:
        OSError: the file, which it names, cannot be written or is a link.
    """
    with errors_naming(path), open_no_link(path, "wb") as file:
        file.write(to_json(content).encode())


def to_json(content: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def contents_of(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of the named files and folders, if they exist, by path inside `folder`; links are followed.

    Raises:
        UserError: one is not a regular file, or too large for a tokenizer's file.
    """
    found: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        if path.is_dir():
            inside = (entry.name for entry in path.iterdir() if not is_stray(entry.name))
            found.update(contents_of(folder, sorted(f"{name}/{entry}" for entry in inside)))
        elif is_regular(path):
            check_regular(path)
            found[name] = path.read_bytes()
    return found


def write_contents(folder: Path, contents: dict[str, bytes]) -> None:
    """Write what `contents_of` returned to another folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with errors_naming(folder / name), open_no_link(folder / name, "wb") as file:
            file.write(content)


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name was created by the system: it is ignored, and never ours."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STRAY_NAMES)


def open_no_link(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file as `open` does, but raise OSError for a link, and for a FIFO instead of waiting for a reader."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    return open(path, mode, opener=opener, **options)


@contextmanager
def errors_naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Add `path` to an OSError that names no file, or `instead_of`: a failed write does not name its file."""
    try:
        yield
    except OSError as error:
        others = (None, *([] if instead_of is None else [str(instead_of), instead_of]))
        if error.errno is None or error.filename not in others:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, content: bytes, *, replaces: bool = True) -> None:
    """Write a file atomically, replacing an existing one, and wait until it is on the disk.

    A link is replaced itself; its target is not changed.

    Args:
        replaces: if false, an existing file is a FileExistsError.

    Raises:
        OSError: with `path` as its file name.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with errors_naming(path, instead_of=partial):
        try:
            with open_no_link(partial, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if replaces or not _linked(partial, path):
                os.replace(partial, path)
            sync_entries(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _linked(path: Path, name: Path) -> bool:
    """Make a hard link; FileExistsError if the name is taken, False if the file system has no hard links."""
    try:
        os.link(path, name)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(name))
        return False
    return True


def discard(path: Path) -> None:
    """Remove a file, a folder with its content, or a link itself; errors are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """Create a hidden folder in `parent`, to be renamed when complete; otherwise it is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
    try:
        open_to_umask(folder)
        yield folder
    except OSError as error:
        # A failed write, unlike a failed open, does not name the file.
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}; what was written is removed", str(parent / name))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all its content, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            if not is_stray(inner.name):
                sync(inner)
    sync_entries(path)


def sync_entries(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: Path, flag: str) -> None:
    """Raise a UserError if `path` exists or cannot be created: no result is overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{flag} {path} already exists; give a new file, nothing is overwritten")
    check_can_create(path, flag)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` on success and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, path.name) as folder:
        yield folder / path.name
        os.rename(folder / path.name, path)
