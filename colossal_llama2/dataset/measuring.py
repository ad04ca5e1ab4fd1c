"""How many tokens prepared parts have, by sample and by category. Token ids are never read."""

from collections import Counter
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np

from colossal_llama2.dataset.buckets import MeasuredPart
from colossal_llama2.dataset.loader import CHECK_ROWS, DOCUMENT_COLUMN, load_part
from colossal_llama2.dataset.sources import Part

CATEGORY_COLUMN = "document_categories"
# Older fine-tuning data has one category a sample.
SAMPLE_CATEGORY_COLUMN = "seq_category"
NOT_RECORDED = "not recorded"


def measure_parts(parts: Sequence[Part]) -> List[MeasuredPart]:
    """The tokens of each sample of each part. Raises UserError for a part that is damaged."""
    return [MeasuredPart(part, _sample_lengths(part.path)) for part in parts]


def _sample_lengths(path: str) -> np.ndarray:
    import pyarrow.compute as compute

    columns = _read(path, ["input_ids"])
    lengths = [np.asarray(compute.list_value_length(rows["input_ids"])).astype(np.int64) for rows in columns]
    return np.concatenate([np.zeros(0, np.int64), *lengths])


def category_tokens(path: str, times: np.ndarray) -> Counter:
    """Tokens of each category in a part, each sample counted so many times.

    Args:
        times: (samples,) whole numbers.
    """
    names = load_part(path).column_names
    if {CATEGORY_COLUMN, DOCUMENT_COLUMN} <= set(names):
        columns = ["input_ids", CATEGORY_COLUMN, DOCUMENT_COLUMN]
    else:
        columns = ["input_ids", *({SAMPLE_CATEGORY_COLUMN} & set(names))]
    tokens: Counter = Counter()
    start = 0
    for rows in _read(path, columns):
        here = times[start : start + len(rows)]
        start += len(rows)
        categories, lengths, weights = _weighed(rows, here)
        for name, count in _sums(categories, lengths * weights):
            tokens[name] += count
    return tokens


def _read(path: str, columns: List[str]) -> Iterator[Any]:
    """Arrow tables of these columns, one after the other."""
    part = load_part(path).select_columns(columns).with_format("arrow")
    return part.iter(CHECK_ROWS) if len(part) else iter(())


def _weighed(rows: Any, times: np.ndarray) -> Tuple[Any, np.ndarray, np.ndarray]:
    """Category, tokens and weight of each document; or of each sample, where documents say nothing."""
    import pyarrow.compute as compute

    sample_lengths = np.asarray(compute.list_value_length(rows["input_ids"])).astype(np.int64)
    if CATEGORY_COLUMN in rows.column_names:
        counts, named = (
            np.asarray(compute.list_value_length(rows[name])) for name in (DOCUMENT_COLUMN, CATEGORY_COLUMN)
        )
        if (counts == named).all():
            lengths = np.asarray(compute.list_flatten(rows[DOCUMENT_COLUMN])).astype(np.int64)
            return compute.list_flatten(rows[CATEGORY_COLUMN]), lengths, np.repeat(times, counts)
    if SAMPLE_CATEGORY_COLUMN in rows.column_names:
        return rows[SAMPLE_CATEGORY_COLUMN], sample_lengths, times
    return None, sample_lengths, times


def _sums(categories: Any, tokens: np.ndarray) -> Iterator[Tuple[str, int]]:
    if categories is None:
        yield NOT_RECORDED, int(tokens.sum())
        return
    coded = categories.combine_chunks().fill_null(NOT_RECORDED).dictionary_encode()
    # Sums of floats are exact up to 2^53.
    sums = np.bincount(np.asarray(coded.indices), weights=tokens, minlength=len(coded.dictionary)).astype(np.int64)
    yield from zip(map(str, coded.dictionary.to_pylist()), sums.tolist(), strict=True)
