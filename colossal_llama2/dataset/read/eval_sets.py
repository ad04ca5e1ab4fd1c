"""Held-out data for evaluation: resolve --eval_dataset, and count the bytes of text that it predicts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import DOCUMENT_BYTES, PREDICTED_BYTES, SCAN_ROWS
from colossal_llama2.dataset.layout.manifest import read_manifest_of
from colossal_llama2.dataset.read.prepared_data import load_part
from colossal_llama2.dataset.read.sources import is_part
from colossal_llama2.errors import UserError

EVAL_NAME = "eval"


class EvalSet(NamedTuple):
    """A named folder of held-out samples."""

    name: str
    path: str


def resolve_eval_sets(given: Sequence[str] | None) -> list[EvalSet]:
    """The folders named by NAME=PATH of --eval_dataset: folders of samples, or folders with such an eval/ inside.

    Raises:
        UserError: with all problems.
    """
    problems: list[str] = []
    found: list[EvalSet] = []
    for name, _, path in (word.partition("=") for word in given or ()):
        folder = next((folder for folder in (Path(path), Path(path, EVAL_NAME)) if is_part(folder)), None)
        if folder is None:
            problems.append(
                f"--eval_dataset {name}={path}: holds no prepared samples, and no {EVAL_NAME}/ with samples; give a "
                f"folder that prepare_pretrain_dataset.py or prepare_sft_dataset.py wrote with --eval_fraction"
            )
        elif name in [eval_set.name for eval_set in found]:
            problems.append(f"--eval_dataset: the name {name} is used twice; give each its own name")
        else:
            found.append(EvalSet(name, str(folder)))
    if problems:
        raise UserError("; and ".join(problems))
    return found


def target_bytes(path: str) -> int | None:
    """UTF-8 bytes of all text that a folder of samples predicts; None, with a warning, if it does not record them.

    Before version 2 of `manifest`, the bytes of a cut document were divided among its pieces by tokens, which is wrong
    by up to a factor of 2.3 with `--overlong truncate`. Without cut documents they are exact.
    """
    import pyarrow.compute as compute

    part = load_part(path)
    if DOCUMENT_BYTES not in part.column_names:
        logs.get_logger().warning("%s does not record its bytes of text: no bits per byte", path)
        return None
    if part.info.description != PREDICTED_BYTES and _may_have_cut_documents(path):
        logs.get_logger().warning(
            "%s is from an older version, whose bytes of cut documents are approximate: no bits per byte; prepare "
            "it again",
            path,
        )
        return None
    tables = part.select_columns([DOCUMENT_BYTES]).with_format("arrow").iter(SCAN_ROWS)
    return sum(compute.sum(compute.list_flatten(rows[DOCUMENT_BYTES])).as_py() or 0 for rows in tables)


def _may_have_cut_documents(path: str) -> bool:
    total = read_manifest_of(path).get("total")
    return not isinstance(total, dict) or total.get("cut_documents") != 0
