"""Open prepared part-* folders as one memory-mapped dataset, and check its samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS, DOCUMENT_NAMES, INPUT_IDS, LABELS, SCAN_ROWS
from colossal_llama2.dataset.read.sources import resolve_parts
from colossal_llama2.errors import UserError
from colossal_llama2.storage import json_input

if TYPE_CHECKING:
    import datasets


def load_tokenized_dataset(
    dataset_paths: Sequence[str], document_mask: str = "off", *, flag: str = "--dataset"
) -> "datasets.Dataset":
    """Load prepared folders and concatenate their samples in the given order.

    Args:
        dataset_paths: prepared folders, written as --dataset accepts them: part-* folders, or folders that hold such,
            each with or without NAME= before it.

    The other arguments, the result and the errors are those of `load_parts`; a folder that is missing or not a prepared
    one is a UserError too.
    """
    return load_parts([part.path for part in resolve_parts(dataset_paths, flag=flag)], document_mask, flag=flag)


def load_parts(paths: Sequence[str], document_mask: str = "off", *, flag: str = "--dataset") -> "datasets.Dataset":
    """Load part-* folders whose paths are resolved already, and concatenate their samples in the given order.

    Args:
        paths: part-* or eval folders, such as `Data.paths` of `resolve_data`.
        document_mask: "on" or "auto" also loads the lengths of the documents in each sample; "auto" only if all parts
            have them.
        flag: the flag that named the folders, for messages.

    Returns:
        A memory-mapped dataset in arrow format with the columns input_ids and labels. With document lengths, it also
        has sequence_lengths, by which a Collator keeps documents apart, and document_sources and document_categories if
        all parts have them.

    Raises:
        UserError: a part cannot be loaded, no part has samples, or one lacks the lengths that "on" needs.
    """
    import datasets

    parts = [load_part(path, flag=flag) for path in paths]
    columns = [INPUT_IDS, LABELS]
    if document_mask != "off" and _all_have_documents(paths, parts, required=document_mask == "on"):
        columns.append(DOCUMENT_LENGTHS)
        if all(set(DOCUMENT_NAMES) <= set(part.column_names) for part in parts):
            columns += DOCUMENT_NAMES
    whole = datasets.concatenate_datasets([part.select_columns(columns) for part in parts])
    if len(whole) == 0:
        raise UserError(f"{flag}: no samples in {', '.join(paths)}")
    return whole.with_format("arrow")


def _all_have_documents(paths: Sequence[str], parts: Sequence["datasets.Dataset"], *, required: bool) -> bool:
    lacking = [path for path, part in zip(paths, parts, strict=True) if DOCUMENT_LENGTHS not in part.column_names]
    if lacking and required:
        raise UserError(
            f"--document_mask on: {lacking[0]} has no column {DOCUMENT_LENGTHS}, which records where documents end; "
            f"prepare the data again, or leave the flag out"
        )
    if lacking and len(lacking) < len(parts):
        logs.get_logger().warning(
            "%s has no column %s, so documents are not kept apart in any sample", lacking[0], DOCUMENT_LENGTHS
        )
    return not lacking


def without_names(dataset: "datasets.Dataset") -> "datasets.Dataset":
    """The dataset without the names of sources and categories, which would otherwise be read with each sample."""
    return dataset.select_columns([name for name in dataset.column_names if name not in DOCUMENT_NAMES])


def load_part(path: str, *, flag: str = "--dataset") -> "datasets.Dataset":
    """One part-* folder, memory-mapped, with all its columns. Raises UserError if it is damaged or lacks a column."""
    import datasets

    try:
        part = datasets.load_from_disk(path)
    except Exception as error:  # pyarrow and datasets raise many classes for a damaged file
        raise UserError(f"{flag} {path}: cannot be loaded ({type(error).__name__}: {error}); prepare it again")
    missing = {INPUT_IDS, LABELS} - set(getattr(part, "column_names", ()))
    if missing:
        raise UserError(f"{path}: has no column {' and '.join(sorted(missing))}; prepare the data again")
    return part


def dataset_fingerprints(dataset_paths: Sequence[str]) -> list[str]:
    """The fingerprint that each folder records of its content; a prepare command records a hash of the samples."""
    fingerprints = []
    for path in (Path(folder, "state.json") for folder in dataset_paths):
        try:
            fingerprints.append(str(json_input.read_object(path, unique_names=False).get("_fingerprint")))
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is not a file of a prepared folder ({error}); prepare the data again")
    return fingerprints


def check_lengths(dataset: "datasets.Dataset", max_length: int, *, flag: str = "--dataset") -> None:
    """Raise a UserError for a sample that is too long or empty, or has inconsistent columns.

    A valid sample has a label for each token, document lengths that add up to its length, and a source and a category
    for each document.
    """
    import pyarrow.compute as compute

    for rows in dataset.iter(SCAN_ROWS):
        lengths = compute.list_value_length(rows[INPUT_IDS])
        shortest, longest = compute.min_max(lengths).as_py().values()
        if longest > max_length:
            raise UserError(
                f"a sample of {flag} has {longest} tokens, --max_length {max_length} given; "
                f"raise it, or prepare the data with that --max_length"
            )
        if shortest == 0 or not compute.all(compute.equal(lengths, compute.list_value_length(rows[LABELS]))).as_py():
            raise UserError(
                f"a sample of {flag} is empty, or has more or fewer labels than tokens; prepare the data again"
            )
        if DOCUMENT_LENGTHS in rows.column_names and not _documents_fill(rows[DOCUMENT_LENGTHS], lengths):
            raise UserError(
                f"{flag}: the {DOCUMENT_LENGTHS} of a sample do not add up to its length; prepare the data again"
            )
        for name in sorted(set(DOCUMENT_NAMES) & set(rows.column_names)):
            if not _same_counts(rows[name], rows[DOCUMENT_LENGTHS]):
                raise UserError(
                    f"{flag}: {name} and {DOCUMENT_LENGTHS} of a sample differ in length; prepare the data again"
                )


def _documents_fill(documents: Any, lengths: Any) -> bool:
    """Whether each list in an arrow column holds positive whole numbers that sum to the corresponding length."""
    import pyarrow.compute as compute

    counts = np.asarray(compute.list_value_length(documents))
    values = np.asarray(compute.list_flatten(documents))
    if counts.min() < 1 or values.min() < 1:
        return False
    sums = np.add.reduceat(values.astype(np.int64), np.cumsum(counts) - counts)
    return bool((sums == np.asarray(lengths)).all())


def _same_counts(lists: Any, others: Any) -> bool:
    """Whether the lists in an arrow column have as many entries as those in another column, which has no null."""
    import pyarrow.compute as compute

    is_same = compute.equal(compute.list_value_length(lists), compute.list_value_length(others))
    return compute.all(compute.fill_null(is_same, False)).as_py()


def highest_token_id(dataset: "datasets.Dataset", *, share: int, shares: int) -> int:
    """The highest token id in one of `shares` equal shares of the data, so that ranks can divide the work."""
    import pyarrow.compute as compute

    part = dataset.select(range(len(dataset) * share // shares, len(dataset) * (share + 1) // shares))
    return max((compute.max(compute.list_flatten(rows[INPUT_IDS])).as_py() for rows in part.iter(SCAN_ROWS)), default=0)
