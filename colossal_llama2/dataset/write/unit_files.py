"""The files that a finished unit of work leaves in the cache. The JSON file, written last, marks them as complete.

unit-00000012.tokens   int32, the tokens of all pieces one after the other; a token without loss is ~id (below 0)
unit-00000012.pieces   an array of PIECE, one entry per piece
unit-00000012.sides    with --eval_dedup, one byte per checked record: DROPPED, TRAINED_ON or HELD_OUT
unit-00000012.json     {"categories": ["news"], "hashes": {"0": "5f3a..."}, "account": {...}, "bad_rows": [],
                        "lost": [], "tokens": 51207, "pieces": 390}
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama2.corpus.data_files import Unit
from colossal_llama2.dataset.layout import store

# Token ids take a third to a half of the bytes of the text, at four bytes each.
CACHE_BYTES_PER_INPUT_BYTE = 3
DROPPED, TRAINED_ON, HELD_OUT = range(3)
# `document` counts the documents of the unit, `offset` the tokens before the piece in the unit's file.
PIECE = np.dtype(
    [
        ("offset", "<i8"),
        ("target_bytes", "<i8"),
        ("length", "<i4"),
        ("document", "<i4"),
        ("category", "<i4"),
        ("file", "<i4"),
        ("held_out", "<i4"),
        ("trained", "<i4"),
        ("predicted", "<i4"),
    ]
)


def unit_file(cache_dir: str | Path, unit: Unit, kind: str) -> Path:
    """The path of a unit's file; `kind` is "tokens", "pieces", "sides" or "json"."""
    return Path(cache_dir, f"{unit.name}.{kind}")


def is_done(cache_dir: Path, unit: Unit) -> bool:
    """Whether an earlier run finished a unit, and its files still have the sizes that they had then."""
    content = store.read_json_or_none(unit_file(cache_dir, unit, "json"))
    if not isinstance(content, dict):
        return False
    sizes = {"pieces": PIECE.itemsize, "tokens": np.dtype(np.int32).itemsize}
    if "sides" in content:
        sizes["sides"] = 1
    paths = {kind: unit_file(cache_dir, unit, kind) for kind in sizes}
    return all(
        (path.stat().st_size if path.exists() else 0) == content.get(kind, -1) * sizes[kind]
        for kind, path in paths.items()
    )


def unit_pieces(cache_dir: Path, unit: Unit) -> np.ndarray:
    """The array of PIECE of a finished unit."""
    return np.fromfile(unit_file(cache_dir, unit, "pieces"), dtype=PIECE)


def unit_sides(cache_dir: Path, unit: Unit) -> bytes:
    """The side of each checked record of a finished unit, in a run with --eval_dedup."""
    return unit_file(cache_dir, unit, "sides").read_bytes()


def write_sides(cache_dir: Path, unit: Unit, sides: bytes) -> None:
    """Write the side of each checked record."""
    with store.appearing_file(unit_file(cache_dir, unit, "sides")) as file:
        file.write(sides)


def write_unit_json(cache_dir: Path, unit: Unit, content: dict[str, Any]) -> None:
    """Write the file that marks a unit as done."""
    store.write_json_whole(unit_file(cache_dir, unit, "json"), content)


class PieceWriter:
    """Appends pieces to the .tokens and .pieces files of a unit. `tokens` counts the tokens written so far."""

    def __init__(self, path: Path, needed_bytes: int, *, tokens_file: Any, pieces_file: Any):
        self._path, self._needed_bytes = path, needed_bytes
        self._tokens_file, self._pieces_file = tokens_file, pieces_file
        self.tokens = 0

    def write(self, coded: np.ndarray, pieces: np.ndarray) -> list[np.ndarray]:
        """Write pieces of a batch, and return the stretches of `coded` that were written.

        Args:
            coded: (tokens,) int32 of the whole batch, ~id for tokens without loss.
            pieces: PIECE entries whose `offset` counts from the batch's first token. It is changed in place to count
                from the first token of the file.
        """
        written = [coded[start:stop] for start, stop in _stretches(pieces)]
        with store.full_disk_reported(self._path, self._needed_bytes):
            for tokens in written:
                self._tokens_file.write(tokens.data)
        pieces["offset"] = self.tokens + np.cumsum(pieces["length"], dtype=np.int64) - pieces["length"]
        self.tokens += int(pieces["length"].sum())
        self._pieces_file.write(pieces.tobytes())
        return written


@contextmanager
def piece_writer(cache_dir: str | Path, unit: Unit) -> Iterator[PieceWriter]:
    """Yield a writer whose files get their names when the block ends. Raises RunError if the disk is full."""
    needed = unit.size * CACHE_BYTES_PER_INPUT_BYTE
    path = unit_file(cache_dir, unit, "tokens")
    with (
        store.appearing_file(path, needed_bytes=needed) as tokens,
        store.appearing_file(unit_file(cache_dir, unit, "pieces"), needed_bytes=needed) as pieces,
    ):
        yield PieceWriter(path, needed, tokens_file=tokens, pieces_file=pieces)


def _stretches(pieces: np.ndarray) -> Sequence[tuple[int, int]]:
    """The places of pieces, as [start, stop) ranges of their batch's tokens; adjacent pieces make one range."""
    starts, stops = pieces["offset"], pieces["offset"] + pieces["length"]
    begins = np.append(True, starts[1:] != stops[:-1])[: len(pieces)]
    ends = np.append(begins[1:], True)[: len(pieces)]
    return list(zip(starts[begins].tolist(), stops[ends].tolist(), strict=True))
