"""Deal pieces to bins so that every category and the tokens are spread evenly, in one pass over their lengths."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from colossal_llama2.corpus.data_files import InputFile, Unit
from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.write.bins import MEMBER
from colossal_llama2.dataset.write.unit_files import PIECE, unit_file, unit_pieces

NAMES_FILE = "names.json"


def deal_units(
    units: Sequence[Unit], files: Sequence[InputFile], *, settings: Settings, cache_dir: Path, held_pieces: int
) -> tuple[list[str], list[str]]:
    """Write dealt/NAME.members in the cache for each bin, unless it exists. Returns the categories and sources.

    All held-out pieces go to the bin eval. Memory: `held_pieces`, and fewer pieces than bins for each category.

    Args:
        held_pieces: pieces that are held in memory before they are appended to the bins' files.
    """
    final = cache_dir / "dealt"
    if not _is_dealt(final, settings):
        size = sum(unit_file(cache_dir, unit, "pieces").stat().st_size for unit in units)
        with store.appearing_folder(final, needed_bytes=size) as folder:
            with _MemberFiles(folder, settings, held_pieces) as members:
                categories, sources = _deal_units(units, files, members, settings=settings, cache_dir=cache_dir)
            sizes = [path.stat().st_size for path in _members_files(folder, settings)]
            names = {"categories": categories, "sources": sources, "sizes": sizes}
            (folder / NAMES_FILE).write_text(json.dumps(names), encoding="utf-8")
    dealt = store.read_json(final / NAMES_FILE)
    return dealt["categories"], dealt["sources"]


def _members_files(folder: Path, settings: Settings) -> list[Path]:
    return [folder / f"{settings.bin_name(number)}.members" for number in settings.all_bins]


def _is_dealt(folder: Path, settings: Settings) -> bool:
    """Whether an earlier run has dealt the pieces, and its files still have their sizes."""
    if not folder.exists():
        return False
    paths = _members_files(folder, settings)
    sizes = store.read_json(folder / NAMES_FILE).get("sizes")
    return sizes == [path.stat().st_size if path.exists() else None for path in paths]


def _deal_units(
    units: Sequence[Unit], files: Sequence[InputFile], members: "_MemberFiles", *, settings: Settings, cache_dir: Path
) -> tuple[list[str], list[str]]:
    sources = {name: number for number, name in enumerate(dict.fromkeys(file.source for file in files))}
    source_of_file = np.array([sources[file.source] for file in files], np.int32)
    categories: dict[str, int] = {}
    dealer = Dealer(settings.num_bins)
    for unit in units:
        pieces = unit_pieces(cache_dir, unit)
        names = store.read_json(unit_file(cache_dir, unit, "json"))["categories"]
        numbers = np.array([categories.setdefault(name, len(categories)) for name in names], np.int32)
        entries = np.zeros(len(pieces), MEMBER)
        for name in set(MEMBER.names or ()) & set(PIECE.names or ()):
            entries[name] = pieces[name]
        entries["unit"] = unit.number
        if len(pieces):
            entries["category"] = numbers[pieces["category"]]
            entries["source"] = source_of_file[pieces["file"]]
        held_out = pieces["held_out"].astype(bool)
        members.add(entries[held_out], np.full(held_out.sum(), settings.num_bins, np.int32))
        members.add(*dealer.deal(entries[~held_out]))
    members.add(*dealer.finish())
    return list(categories), list(sources)


class _MemberFiles:
    """The members files of all bins. Appends in few large steps."""

    def __init__(self, folder: Path, settings: Settings, held_pieces: int):
        self._most_held = held_pieces
        self._paths = _members_files(folder, settings)
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def __enter__(self) -> "_MemberFiles":
        for path in self._paths:
            path.touch()
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self._flush()

    def add(self, members: np.ndarray, bins: np.ndarray) -> None:
        """Append each member to the file of its bin."""
        self._held.append((members, bins))
        self._count += len(members)
        if self._count >= self._most_held:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        members, bins = (np.concatenate(column) for column in zip(*self._held, strict=True))
        self._held, self._count = [], 0
        order = np.argsort(bins, kind="stable")
        borders = np.searchsorted(bins[order], np.arange(len(self._paths) + 1))
        for path, start, stop in zip(self._paths, borders, borders[1:], strict=False):
            if stop > start:
                with path.open("ab") as file:
                    file.write(members[order[start:stop]].tobytes())


class Dealer:
    """Deals pieces as they come, in rounds of `num_bins` pieces of one category, one to each bin.

    So the count of a category differs by at most one between bins. In a round, the longest piece goes to the bin with
    the fewest tokens, so the tokens of two bins never differ by more than the longest piece: if they differ by D before
    a round, they differ after it by at most the larger of D and the difference of the pieces that they got. Once there
    are as many pieces as bins, no bin is empty, because an empty one has the fewest tokens.

    Pieces that do not fill a round wait: fewer than `num_bins` of each category. The result depends only on the pieces
    and the steps in which they come.
    """

    def __init__(self, num_bins: int):
        self._tokens = np.zeros(num_bins, dtype=np.int64)
        self._waiting: np.ndarray | None = None

    def deal(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deal an array with the fields `category` and `length`. Returns the pieces that got a bin, and their bins.

        All categories at once, because each piece may have its own.
        """
        num_bins = len(self._tokens)
        if self._waiting is None:
            self._waiting = pieces[:0]
        is_present = np.zeros(max(part["category"].max(initial=0) for part in (pieces, self._waiting)) + 1, bool)
        is_present[pieces["category"]] = True
        meets_others = is_present[self._waiting["category"]]
        pieces = np.concatenate([self._waiting[meets_others], pieces])
        pieces = pieces[np.lexsort((-pieces["length"], pieces["category"]))]
        _, starts, counts = np.unique(pieces["category"], return_index=True, return_counts=True)
        in_round = np.arange(len(pieces)) - np.repeat(starts, counts) < np.repeat(counts // num_bins * num_bins, counts)
        self._waiting = np.concatenate([self._waiting[~meets_others], pieces[~in_round]])
        # Each category fills its rounds, so no round has two categories.
        return pieces[in_round], self._rounds(pieces[in_round])

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Deal the waiting pieces, by category."""
        rest = np.zeros(0, MEMBER) if self._waiting is None else self._waiting
        rest = rest[np.argsort(rest["category"], kind="stable")]
        self._waiting = None
        borders = np.flatnonzero(rest["category"][1:] != rest["category"][:-1]) + 1
        bounds = zip([0, *borders.tolist()], [*borders.tolist(), len(rest)], strict=True)
        # At most one round each: fewer pieces wait than there are bins.
        bins = [self._rounds(rest[start:stop]) for start, stop in bounds] if len(self._tokens) > 1 else []
        return rest, np.concatenate(bins) if bins else np.zeros(len(rest), np.int32)

    def _rounds(self, pieces: np.ndarray) -> np.ndarray:
        """The bin of each piece, longest first; only the last round may be short."""
        num_bins = len(self._tokens)
        if num_bins == 1:
            return np.zeros(len(pieces), np.int32)
        lengths = pieces["length"]
        bins = np.empty(len(pieces), np.int32)
        for start in range(0, len(pieces), num_bins):
            lightest_first = np.argsort(self._tokens, kind="stable")[: len(pieces) - start]
            bins[start : start + num_bins] = lightest_first
            self._tokens[lightest_first] += lengths[start : start + num_bins]
        return bins
