"""Find the input files, and divide them into units of work.

A unit is up to `UNIT_BYTES` of input in whole lines: several small files, or a range of a large one. A line belongs to
the range that holds its first byte. So the units depend on the files alone, not on the number of workers:

    Unit(number=0, spans=(Span(file=0, start=0, stop=4194304),))            the first 4 MiB of a large file
    Unit(number=2, spans=(Span(file=1, start=0, stop=None), Span(file=2, start=0, stop=None)))    two small files

A compressed file, a JSON array and a Parquet file can only be read from their start, so each is one span. A file with
several ranges has one more unit that computes its hash; other files are hashed while they are read.
"""

import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from colossal_llama2 import logs
from colossal_llama2.corpus import file_kinds
from colossal_llama2.corpus.file_kinds import LeftOut
from colossal_llama2.errors import PERMISSION_CURE, UserError
from colossal_llama2.plurals import some
from colossal_llama2.storage.files import check_is_utf8, is_stray
from colossal_llama2.terminal_text import visible_line

UNIT_BYTES = 4 << 20
EMPTY_FILE = "is empty; move it away, or fetch it again if it should hold data"


class InputFile(NamedTuple):
    """One file to read.

    `source` names its folder; `size` and `mtime_ns` show later whether it has changed; `kind` is from
    `file_kinds.kind_of`.
    """

    path: str
    source: str
    size: int
    mtime_ns: int
    kind: str = file_kinds.LINES

    @property
    def is_one_span(self) -> bool:
        """Whether the file can only be read from its start."""
        return self.kind != file_kinds.LINES


class LostFile(NamedTuple):
    """A file that cannot be read to its end. `line` is the first line that is lost, 0 if the file cannot be opened.

    In a Parquet file, lines are rows. Such files are counted by `reason`; `problem` is the message with the cure.
    """

    file: str
    line: int
    reason: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}" if self.line else self.problem


class Inputs(NamedTuple):
    """The content of the input folders: files to read, entries that are not data, and files that cannot be opened."""

    files: list[InputFile]
    left_out: list[LeftOut]
    lost: list[LostFile]


class Span(NamedTuple):
    """The lines of a file whose first byte lies in [start, stop); the whole file if `stop` is None."""

    file: int
    start: int
    stop: int | None


class Unit(NamedTuple):
    """One unit of work. `hashes_only` marks the one that computes the hash of a file in several ranges."""

    number: int
    spans: tuple[Span, ...]
    hashes_only: bool
    size: int

    @property
    def name(self) -> str:
        """The stem of the unit's files in the cache."""
        return f"unit-{self.number:08d}"


def find_input_files(folders: Sequence[str]) -> list[InputFile]:
    """The files of `find_inputs`. Every file must be readable."""
    return find_inputs(folders).files


def find_inputs(folders: Sequence[str], *, skips_bad_files: bool = False) -> Inputs:
    """All data files directly inside the folders: folders in the given order, files sorted by name.

    Logs which entries are not read, and which files have a name that contradicts their content.

    Args:
        skips_bad_files: list a file that is empty, unreadable or not a regular file as lost, instead of raising.

    Raises:
        UserError: a folder is missing, given twice, inside another one or without data files; two files have the same
            name apart from the extension; a file, or with `skips_bad_files` every file, is empty, unreadable or not a
            regular file.
    """
    found = Inputs([], [], [])
    try:
        for folder, source in zip(_apart(folders), _source_names(folders), strict=True):
            _add_folder(found, folder, source, skips_bad_files=skips_bad_files)
    finally:
        _log_left_out(found.left_out)
    _log_surprises(found.files)
    if not found.files:
        raise UserError(f"--data_input_dirs: none of the files can be read. The first: {found.lost[0].problem}")
    return found


def _apart(folders: Sequence[str]) -> Iterator[str]:
    """Yield the folders, after checking that each one exists and does not overlap an earlier one."""
    resolved: list[Path] = []
    for folder in folders:
        if Path(folder).is_file():
            raise UserError(
                f"--data_input_dirs: {folder} is a file; give a folder, all of whose data files are read"
                f"{_sole_file_cure(Path(folder))}"
            )
        if not Path(folder).is_dir():
            raise UserError(f"--data_input_dirs: {folder} is not a folder; give folders with data files inside")
        place = Path(folder).resolve()
        if place in resolved:
            raise UserError(f"--data_input_dirs: {folder} is given twice; name each folder once")
        for other, given in zip(resolved, folders, strict=False):
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise UserError(
                    f"--data_input_dirs: of {given} and {folder}, one is inside the other; give separate folders"
                )
        resolved.append(place)
        yield folder


def _sole_file_cure(path: Path) -> str:
    """The folder of a file that is the only one in it."""
    return f", {path.parent}" if list(path.parent.iterdir()) == [path] else ""


def _add_folder(found: Inputs, folder: str, source: str, *, skips_bad_files: bool) -> None:
    entries = _entries(Path(folder))
    inside = [path for path in entries if file_kinds.data_stem(path.name)]
    left_out = [file_kinds.left_out(path) for path in entries if not file_kinds.data_stem(path.name)]
    found.left_out.extend(left_out)
    if not inside:
        raise UserError(
            f"--data_input_dirs: {folder} has no data file directly inside ({file_kinds.ENDINGS}); subfolders are not "
            "read"
        )
    _refuse_copies(inside)
    for path in inside:
        try:
            found.files.append(_input_file(path, source))
        except UserError as error:
            if not skips_bad_files:
                raise
            found.lost.append(LostFile(str(path), 0, "cannot be opened, or is empty", str(error)))


def _log_left_out(left_out: Sequence[LeftOut]) -> None:
    """Log one line about all entries that are not read."""
    if left_out:
        is_expected = all(is_stray(Path(entry.path).name) for entry in left_out)
        log = logs.get_logger().info if is_expected else logs.get_logger().warning
        log(f"not read: {_named(left_out)}")


def _named(left_out: Sequence[LeftOut]) -> str:
    """The entries grouped by what they are, with a few names of each and what to do if they are data."""
    by_kind: dict[tuple[str, str], list[str]] = {}
    for entry in left_out:
        by_kind.setdefault((entry.what, entry.cure), []).append(entry.path)
    return "; ".join(f"{_visible(paths)} ({what}; {cure})" for (what, cure), paths in by_kind.items())


def _visible(names: Iterable[str]) -> str:
    return some([visible_line(name) for name in names])


def _log_surprises(files: Iterable[InputFile]) -> None:
    """Log one line about all files whose content contradicts their name."""
    found = ((file.path, file_kinds.surprise(Path(file.path).name, file.kind)) for file in files)
    surprises = [f"{path} ({surprise})" for path, surprise in found if surprise]
    if surprises:
        logs.get_logger().info(f"read by content, which contradicts the file name: {_visible(surprises)}")


def _source_names(folders: Sequence[str]) -> list[str]:
    """The names of the folders, or their paths as given if two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except PermissionError:
        raise UserError(f"--data_input_dirs {folder}: this user may not read it{PERMISSION_CURE}")


def _refuse_copies(paths: Sequence[Path]) -> None:
    """Raise UserError for news.jsonl beside news.jsonl.gz or news.parquet: the same data would be read twice."""
    by_stem: dict[str | None, list[Path]] = {}
    for path in paths:
        by_stem.setdefault(file_kinds.data_stem(path.name), []).append(path)
    for same in by_stem.values():
        if len(same) > 1:
            names = " and ".join(map(str, same)) if len(same) == 2 else ", ".join(map(str, same))
            raise UserError(f"{names} have the same name and may be copies; move all but one away, or rename them")


def _input_file(path: Path, source: str) -> InputFile:
    check_is_utf8(str(path), "--data_input_dirs")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; move it away, because every file with such a name is read")
        head = file_kinds.read_head(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fix that, or move it away")
    if status.st_size == 0:
        raise UserError(f"{path} {EMPTY_FILE}")
    return InputFile(str(path), source, status.st_size, status.st_mtime_ns, file_kinds.kind_of(head))


def units_of(files: Sequence[InputFile], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """All units of up to `unit_bytes`, in the order of the input."""
    units: list[Unit] = []
    together: list[Span] = []
    size = 0

    def close() -> None:
        nonlocal size
        if together:
            units.append(Unit(len(units), tuple(together), False, size))
        together.clear()
        size = 0

    for index, file in enumerate(files):
        if file.size <= unit_bytes or file.is_one_span:
            if size + file.size > unit_bytes:
                close()
            together.append(Span(index, 0, None))
            size += file.size
            continue
        close()
        # The hash first: it takes longer than a range, and nothing waits for it.
        units.append(Unit(len(units), (Span(index, 0, None),), True, 0))
        for start in range(0, file.size, unit_bytes):
            stop = min(start + unit_bytes, file.size)
            units.append(Unit(len(units), (Span(index, start, stop),), False, stop - start))
    close()
    return units
