"""Which files are read, and the units of work that they are cut into.

A unit is up to `UNIT_BYTES` of input, whole lines: consecutive small files together, or a range of a large one. A line
belongs to the range in which its first byte lies. So units follow from the files alone, not from who does them:

    Unit(number=0, spans=(Span(file=0, start=0, stop=4194304),))            the first 4 MiB of a large file
    Unit(number=2, spans=(Span(file=1, start=0, stop=None), Span(file=2, start=0, stop=None)))    two small files

A compressed file can only be read from its start, so it is one span. A file in several ranges has one more unit, which
computes its hash; the others are hashed while they are read.
"""

import stat
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from colossal_llama2.errors import UserError
from colossal_llama2.files import check_is_utf8

UNIT_BYTES = 4 << 20
EMPTY_FILE = "is empty; move it away, or fetch it again if it should not be"
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class InputFile(NamedTuple):
    """One file to read. `source` names its folder; size and time tell whether it has changed since."""

    path: str
    source: str
    size: int
    mtime_ns: int

    @property
    def is_compressed(self) -> bool:
        """Whether it can only be read from its start."""
        return not self.path.endswith(".jsonl")


class Span(NamedTuple):
    """The lines of a file whose first byte lies in [start, stop); the whole file if `stop` is None."""

    file: int
    start: int
    stop: Optional[int]


class Unit(NamedTuple):
    """One unit of work. `hashes_only` marks the one that computes the hash of a file in several ranges."""

    number: int
    spans: Tuple[Span, ...]
    hashes_only: bool
    size: int

    @property
    def name(self) -> str:
        """The stem of the unit's files in the cache."""
        return f"unit-{self.number:08d}"


def find_input_files(folders: Sequence[str]) -> List[InputFile]:
    """Every file to read directly inside the folders: folders in the given order, files sorted by name.

    Raises UserError for a folder that is missing, given twice, inside another or without such a file, and for a file
    that is empty, unreadable or no file.
    """
    resolved: List[Path] = []
    files: List[InputFile] = []
    for folder, source in zip(folders, _source_names(folders), strict=True):
        if not Path(folder).is_dir():
            raise UserError(f"--data_input_dirs: {folder} is not a folder; give folders with *.jsonl files inside")
        place = Path(folder).resolve()
        if place in resolved:
            raise UserError(f"--data_input_dirs: {folder} is given twice; name each folder once")
        for other, given in zip(resolved, folders, strict=False):
            if place.is_relative_to(other) or other.is_relative_to(place):
                raise UserError(f"--data_input_dirs: of {given} and {folder} one is inside the other; name them apart")
        resolved.append(place)
        inside = sorted(_jsonl_paths(Path(folder)))
        _refuse_copies(inside)
        if not inside:
            raise UserError(f"--data_input_dirs: {folder} has no *.jsonl file directly inside; subfolders are not read")
        files += [_input_file(path, source) for path in inside]
    return files


def _source_names(folders: Sequence[str]) -> List[str]:
    """The folders' own names, or the paths as given where two folders have the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else list(folders)


def _jsonl_paths(folder: Path) -> List[Path]:
    try:
        return [path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and path.name[0] != "."]
    except PermissionError:
        raise UserError(f"--data_input_dirs: {folder} may not be read; give yourself the right to")


def _refuse_copies(paths: Sequence[Path]) -> None:
    """Raise UserError for news.jsonl beside news.jsonl.gz: what decompressing leaves would be read twice."""
    by_stem: Dict[Path, Path] = {}
    for path in paths:
        other = by_stem.setdefault(path.with_name(path.name.partition(".jsonl")[0]), path)
        if other != path:
            raise UserError(f"{path} and {other} have one name, as if one were a copy; move one away or rename it")


def _input_file(path: Path, source: str) -> InputFile:
    check_is_utf8(str(path), "--data_input_dirs")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; move it away, every *.jsonl in the folder is read")
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or move it away")
    if status.st_size == 0:
        raise UserError(f"{path} {EMPTY_FILE}")
    return InputFile(str(path), source, status.st_size, status.st_mtime_ns)


def units_of(files: Sequence[InputFile]) -> List[Unit]:
    """All units, in the order of the input."""
    units: List[Unit] = []
    together: List[Span] = []
    size = 0

    def close() -> None:
        nonlocal size
        if together:
            units.append(Unit(len(units), tuple(together), False, size))
        together.clear()
        size = 0

    for index, file in enumerate(files):
        if file.size <= UNIT_BYTES or file.is_compressed:
            if size + file.size > UNIT_BYTES:
                close()
            together.append(Span(index, 0, None))
            size += file.size
            continue
        close()
        # The hash first, as it takes longer than a range, and nothing waits for it.
        units.append(Unit(len(units), (Span(index, 0, None),), True, 0))
        for start in range(0, file.size, UNIT_BYTES):
            stop = min(start + UNIT_BYTES, file.size)
            units.append(Unit(len(units), (Span(index, start, stop),), False, stop - start))
    close()
    return units
