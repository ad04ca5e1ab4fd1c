"""What init_tokenizer.py needs of each kind of tokenizer: `Extension`, and what its kinds share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from colossal_llama2 import logs
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.parity import Compared, Measurement, PieceFinder, measure
from colossal_llama2.errors import UserError
from colossal_llama2.tokenizer.closure import ExtensionPlan
from colossal_llama2.tokenizer.new_pieces import NewPieces


@dataclass(frozen=True)
class ExtensionSettings:
    """The flags of init_tokenizer.py."""

    source_tokenizer_dir: str | Path
    target_tokenizer_dir: str | Path
    expand_tokens_file: str | Path
    piece_scores: str = "below"
    closure: str = "complete"
    max_added_pieces: int | None = None
    parity_text: Sequence[str] | None = None
    overwrite: bool = False
    bos_token: str | None = None
    eos_token: str | None = None


class Proof(NamedTuple):
    """What was found on the written tokenizer: new pieces that are never reached, and ids by group of texts."""

    unreachable: list[str]
    measurements: list[Measurement]


class Extension(Protocol):
    """A source tokenizer of one kind, and how it is extended.

    Attributes:
        vocabulary_size: the number of ids before the first new one.
        cure: the flags with which a failed proof succeeds.
    """

    cure: str
    vocabulary_size: int

    def __init__(self, source: Path):
        """Read a folder. Raises UserError if a file is missing or invalid."""

    def read_pieces(self, path: Path) -> NewPieces:
        """The new pieces of a file. Raises UserError for an invalid one."""

    def plan(self, wanted: Sequence[str], settings: ExtensionSettings) -> ExtensionPlan:
        """What to append, of the wanted pieces. Raises UserError for a flag that this kind does not have."""

    def write(self, folder: Path, plan: ExtensionPlan) -> None:
        """Write the files of the extended tokenizer to an existing folder."""

    def prove(self, folder: Path, plan: ExtensionPlan, documents: Sequence[str]) -> Proof:
        """Check what was written, on the new and old pieces and on `documents`. Raises RunError for wrong ids."""

    def shown(self, piece: str) -> str:
        """How reports write a piece of the plan."""


def check_files(source: Path, required: Sequence[str], example: str) -> None:
    """Raise UserError if files of a source, which `example` has, are missing or cannot be copied."""
    # Templates are copied, and through a link that could copy a whole disk, or read a device forever.
    check_tokenizer_files(source)
    missing = [name for name in required if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"--source_tokenizer_dir {source} holds no {' and no '.join(missing)}; "
            f"{example} ships these files beside its weights, copy them there"
        )


def measure_groups(
    source: Compared, target: Compared, groups: Mapping[str, Sequence[str]], new: PieceFinder, activity: str
) -> list[Measurement]:
    """Measure each group that has texts; `activity` is logged."""
    measured = []
    for group, texts in groups.items():
        if texts:
            logs.get_logger().info("%s: %s", activity, group)
            measured.append(measure(source, target, group, texts, new))
    return measured
