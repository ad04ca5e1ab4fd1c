"""Files and folders: JSON and jsonl with errors that name the place, and folders that appear whole or not at all.

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

# Names that operating systems, file servers and desktops put into any folder by themselves.
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
        raise UserError(f"{path} is not JSON as it should be ({error}); copy the file again from its source")


class JsonLine(NamedTuple):
    """One line of a jsonl file: `where` is file:line, `size` its bytes, `record` its object, None if it is blank.

    Blank lines may come as one, at the place of the first.
    """

    where: str
    size: int
    record: dict | None


def read_jsonl(path: Path, *, explain: Callable[[bytes], str | None] = lambda line: None) -> Iterator[JsonLine]:
    """Every line of a jsonl file, lazily, blank ones together. Raises UserError with file:line for one that is not a
    JSON object, or too long.

    `explain` may say what such a line is instead, in place of the general message.
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
                yield JsonLine(where, line.size, parse_object(text))
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
    """The object in a line that is JSON but for the words that `parse_object` allows; None if it is not."""
    if b"NaN" not in line and b"Infinity" not in line:
        return None
    try:
        record = json.loads(line.decode())
        if b"\\u" in line:
            # Python's parser takes halves of surrogate pairs, which no encoder does.
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _why_not_json(line: bytes, error: ValueError, unit: str) -> tuple[str, str]:
    """The reason to count by, and what to say."""
    try:
        line.decode()
    except UnicodeDecodeError as undecodable:
        return "not UTF-8", f"not UTF-8 at byte {undecodable.start + 1} of the {unit}"
    if "surrogate" in str(error):
        return "half of a surrogate pair", "half of a surrogate pair, which is no character"
    return "not JSON", f"not JSON ({error})"


def jsonl_files(folder: Path) -> list[Path]:
    """The *.jsonl files directly inside a folder, by name; hidden ones, such as macOS makes, are left out."""
    return sorted(path for path in folder.glob("*.jsonl") if path.is_file() and not path.name.startswith("."))


def check_is_utf8(path: str, flag: str) -> None:
    """Raise a UserError for a name in another encoding, as unzipping makes of Chinese ones: JSON cannot hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag}: the name {path!a} is not UTF-8; rename it (convmv renames whole folders)")


def check_can_create(path: Path, flag: str) -> None:
    """Raise a UserError unless the file or folder can be made, with the folders above it, or is there to write to."""
    parent = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if parent == path.absolute() and parent.is_file():
        parent = parent.parent
    if not parent.is_dir():
        kind = "a file" if parent.exists() else "a link that leads nowhere"
        raise UserError(f"{flag} {path} cannot be written: {parent} is {kind}, no folder; name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path} cannot be written in {parent}; name a folder where you may write")


def open_to_umask(path: Path) -> None:
    """Give a file or folder that a library made for its owner alone the rights that any other new one has."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_json(path: Path, content: Any) -> None:
    """Write a value as transformers writes its own, to a folder of this process: indented, UTF-8, a newline at the end.

    OSError, which names the file, if it cannot be written or is a link.
    """
    with errors_naming(path), open_no_link(path, "wb") as file:
        file.write(to_json(content).encode())


def to_json(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def contents_of(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of those of the named files and folders that exist, by path inside `folder`, following links.

    Raises:
        UserError: one is no regular file, or too large for a file of a tokenizer.
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
    """Write what `contents_of` gave into another folder."""
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with errors_naming(folder / name), open_no_link(folder / name, "wb") as file:
            file.write(content)


def is_stray(name: str) -> bool:
    """Whether a system put a file or folder of this name there by itself: it is passed over, and never ours."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STRAY_NAMES)


def open_no_link(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file as `open` does, but raise OSError for a link, and for a FIFO in place of waiting for a reader."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    return open(path, mode, opener=opener, **options)


@contextmanager
def errors_naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Let an OSError that names no file, or `instead_of`, name `path`: a failed write does not say where."""
    try:
        yield
    except OSError as error:
        others = (None, *([] if instead_of is None else [str(instead_of), instead_of]))
        if error.errno is None or error.filename not in others:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_file(path: Path, content: bytes, *, replaces: bool = True) -> None:
    """Write a file whole or not at all, in place of whatever has its name, and wait until it is on the disk.

    A link of that name is replaced; the file that it leads to stays as it is.

    Args:
        replaces: if off, FileExistsError is raised where the name is taken.

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
    """Give a file a second name, if that is free (FileExistsError); False where the file system has no links."""
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
    """Remove a file, a folder with all in it, or a link, which is not followed, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent`, to be renamed when it is complete; what is left of it at the end is removed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
    try:
        open_to_umask(folder)
        yield folder
    except OSError as error:
        # A failed write, unlike a failed open, does not say where.
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}; nothing is left of it", str(parent / name))
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file, or a folder with everything in it, is on the disk."""
    if path.is_dir():
        for inner in path.iterdir():
            if not is_stray(inner.name):
                sync(inner)
    sync_entries(path)


def sync_entries(path: Path) -> None:
    """Return when a file, or of a folder the names in it, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_file(path: Path, flag: str) -> None:
    """Raise a UserError if `path` exists or cannot be made: no result is overwritten."""
    if os.path.lexists(path):
        raise UserError(f"{flag} {path} exists already; give a new file, nothing is overwritten")
    check_can_create(path, flag)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` when all went well; nothing is left of it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, path.name) as folder:
        yield folder / path.name
        os.rename(folder / path.name, path)
