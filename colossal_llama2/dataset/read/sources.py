"""Resolve --dataset and --mixture: the parts in order, the source of each part, and its bucket.

    --dataset arrow_zh en=old/arrow/part-00000 en=old/arrow/part-00001

gives, if arrow_zh holds two parts:

    Part("arrow_zh", "arrow_zh/part-00000", 0)    Part("en", "old/arrow/part-00000", 0)
    Part("arrow_zh", "arrow_zh/part-00001", 1)    Part("en", "old/arrow/part-00001", 1)

A source is the folder that contains a part. Its name is NAME of NAME=PATH, or the last component of the folder's path.
Only file names are read here, and at most one manifest.json per folder.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.dataset.layout.manifest import read_manifest_of
from colossal_llama2.errors import UserError
from colossal_llama2.storage.given_paths import no_folder, what_it_holds

PART_FILES = ("dataset_info.json", "state.json")


class Part(NamedTuple):
    """A folder of samples: the name of its source, its path, and its number in the source, counted from 0."""

    source: str
    path: str
    bucket: int


class Mixture(NamedTuple):
    """Shares of sources in every bucket, in tokens; they sum to 1.

    With `end` "repeat", the first source is read exactly once, and others are subsampled or repeated; with "stop", no
    source is read more than once.
    """

    shares: dict[str, float]
    end: str


class Data(NamedTuple):
    """The resolved --dataset, --bucketed, --mixture and --group_by_length."""

    parts: list[Part]
    bucketed: bool = False
    mixture: Mixture | None = None
    groups_by_length: bool = False

    @property
    def paths(self) -> list[str]:
        """The folders of the parts."""
        return [part.path for part in self.parts]

    @property
    def is_ordered(self) -> bool:
        """Whether the order of samples depends on their sources, so that names matter."""
        return self.bucketed or self.mixture is not None

    @property
    def needs_lengths(self) -> bool:
        """Whether the order of samples depends on their lengths, which all ranks must read then."""
        return self.is_ordered or self.groups_by_length

    def facts(self) -> dict[str, Any]:
        """What must be the same in a resumed run, as JSON; None for a setting that is off, as in older checkpoints."""
        return {
            "bucketed": self.bucketed or None,
            "mixture": [list(pair) for pair in self.mixture.shares.items()] if self.mixture else None,
            "mixture_end": self.mixture.end if self.mixture else None,
            "sources": [part.source for part in self.parts] if self.is_ordered else None,
            "groups_by_length": self.groups_by_length or None,
        }


class _Found(NamedTuple):
    given_name: str | None
    path: str
    folder: str


def resolve_data(
    dataset: Sequence[str],
    *,
    bucketed: bool = False,
    mixture: Sequence[str] | None = None,
    mixture_end: str = "repeat",
    groups_by_length: bool = False,
) -> Data:
    """Resolve the arguments of --dataset and --mixture. Raises UserError with all problems of one of them."""
    parts = resolve_parts(dataset, names_matter=bucketed or mixture is not None)
    parsed = parse_mixture(mixture, mixture_end, [part.source for part in parts])
    return Data(parts, bucketed, parsed, groups_by_length)


def resolve_parts(given: Sequence[str], *, names_matter: bool = False, flag: str = "--dataset") -> list[Part]:
    """The parts that the arguments of --dataset name, in the given order.

    Args:
        given: part-* folders, or folders that hold such (without their eval/), each with or without NAME= before it.
        names_matter: refuse two folders with the same name; otherwise longer parts of their paths distinguish them.
        flag: the flag that named the folders, for messages.

    Raises:
        UserError: with all problems.
    """
    found: list[_Found] = []
    problems = []
    for word in given:
        try:
            found += _parts_of(word, flag)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; and ".join(problems))
    names = _names(found, names_matter=names_matter)
    counts: Counter = Counter()
    parts = []
    for name, part in zip(names, found, strict=True):
        parts.append(Part(name, part.path, counts[name]))
        counts[name] += 1
    return parts


def _parts_of(word: str, flag: str) -> list[_Found]:
    name, path = _split(word)
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{flag} {word}: {no_folder(path, may_be_on_hub=False)}; give part-* folders of --data_arrow_output_dir, "
            f"or all of it, as PATH or NAME=PATH"
        )
    inside = [] if is_part(folder) else _parts_inside(folder)
    if not inside and not is_part(folder):
        raise UserError(
            f"{flag} {word}: not a prepared part-* folder, and holds none{what_it_holds(path)}; give a folder that "
            "prepare_pretrain_dataset.py or prepare_sft_dataset.py wrote to --data_arrow_output_dir"
        )
    for part in inside:
        if not is_part(part):
            raise UserError(f"{flag} {word}: {part.name} in it is not a complete part-* folder; prepare the data again")
    _check_all_there(word, inside, flag)
    paths = [str(part) for part in inside] or [path]
    return [_Found(name, part, os.path.dirname(os.path.abspath(part))) for part in paths]


def _split(word: str) -> tuple[str | None, str]:
    """Name and path of NAME=PATH. An existing folder with "=" in its name is a path."""
    name, sign, path = word.partition("=")
    if not sign or not name or not path or "/" in name or Path(word).is_dir():
        return None, word
    # A shell expands ~ only at the beginning of a word.
    return name, os.path.expanduser(path)


def is_part(folder: Path) -> bool:
    """Whether a folder holds samples, as a prepare command or `datasets` writes them."""
    return all((folder / name).is_file() for name in PART_FILES)


def _parts_inside(folder: Path) -> list[Path]:
    """The part-* folders by number: part-10 comes after part-9."""
    inside = [child for child in folder.glob("part-*") if child.is_dir()]
    numbers = {child: re.search(r"\d+$", child.name) for child in inside}
    return sorted(inside, key=lambda child: (int(found[0]) if (found := numbers[child]) else -1, child.name))


def _check_all_there(word: str, inside: Sequence[Path], flag: str) -> None:
    """Raise UserError for a prepared folder with missing parts, as after an interrupted copy."""
    if not inside:
        return
    entries = read_manifest_of(str(inside[0])).get("bins", ())
    listed = [entry["name"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
    missing = sorted(set(listed) - {part.name for part in inside})
    if missing:
        raise UserError(
            f"{flag} {word}: {missing[0]} is missing ({len(missing)} of the {len(listed)} parts that manifest.json "
            f"lists); copy it again, or list the parts to use"
        )


def _names(found: Sequence[_Found], *, names_matter: bool) -> list[str]:
    """The source name of each part: the given name, or the end of its folder's path."""
    folders: dict[str, str] = {}
    for part in found:
        if part.given_name is None:
            folders.setdefault(os.path.realpath(part.folder), part.folder)
    taken = {part.given_name for part in found if part.given_name is not None}
    names: dict[str, str] = {}
    for length in range(1, max((folder.count("/") for folder in folders.values()), default=0) + 1):
        ends = {real: "/".join(folder.strip("/").split("/")[-length:]) or "/" for real, folder in folders.items()}
        counts = Counter(ends.values())
        clashes = [real for real in folders if real not in names and (counts[ends[real]] > 1 or ends[real] in taken)]
        if clashes and names_matter:
            raise UserError(
                f"--dataset: two sources have the name {ends[clashes[0]]}, one of them {folders[clashes[0]]}; "
                f"give them names, as in NAME={folders[clashes[0]]}"
            )
        names.update({real: ends[real] for real in folders if real not in names and real not in clashes})
    return [part.given_name or names.get(os.path.realpath(part.folder), part.folder) for part in found]


def parse_mixture(words: Sequence[str] | None, end: str, sources: Sequence[str]) -> Mixture | None:
    """The mixture that the arguments SOURCE=WEIGHT of --mixture describe; None without the flag.

    Args:
        sources: the source names of the parts of --dataset.

    Raises:
        UserError: a source is named twice or not at all, or does not exist.
    """
    if words is None:
        return None
    pairs = [word.rpartition("=") for word in words]
    weights = {name: float(weight) for name, _, weight in pairs}
    known = list(dict.fromkeys(sources))
    unknown = [name for name in weights if name not in known]
    lacking = [name for name in known if name not in weights]
    if unknown or lacking or len(weights) < len(pairs):
        twice = [name for name, count in Counter(name for name, _, _ in pairs).items() if count > 1]
        reasons = [f"there is no source {name}" for name in unknown]
        reasons += [f"{name} has no weight" for name in lacking] + [f"{name} is named twice" for name in twice]
        raise UserError(
            f"--mixture {' '.join(words)}: {', '.join(reasons)}; name each source of --dataset once: {', '.join(known)}"
        )
    total = sum(weights.values())
    return Mixture({name: weight / total for name, weight in weights.items()}, end)
