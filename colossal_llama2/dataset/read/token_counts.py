"""Count the tokens of prepared parts by sample and by category, and how many were read, without reading token ids."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from colossal_llama2.dataset.layout.columns import (
    DOCUMENT_CATEGORIES,
    DOCUMENT_LENGTHS,
    INPUT_IDS,
    SAMPLE_CATEGORY,
    SCAN_ROWS,
)
from colossal_llama2.dataset.read.buckets import MeasuredPart
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import load_part
from colossal_llama2.dataset.read.sources import Part

NOT_RECORDED = "not recorded"


class SourceRead(NamedTuple):
    """Samples and tokens read from a source, with repeats. `samples_there` are the distinct samples in its parts."""

    source: str
    samples_there: int
    samples: int
    tokens: int


def read_by_source(
    measured: Sequence[MeasuredPart], order: SampleOrder, *, first_sample: int, samples_seen: int
) -> list[SourceRead]:
    """What a run has read from each source, in the order of the sources.

    Args:
        first_sample: where the run began, counted from the first sample of the first epoch.
        samples_seen: how many samples it read from there, without those dropped at the end of an epoch.
    """
    lengths = np.concatenate([lengths for _, lengths in measured])
    times = np.zeros(len(lengths), dtype=np.int64)
    epoch, begin = divmod(first_sample, order.num_samples)
    while samples_seen > 0:
        count = min(samples_seen, order.num_samples - begin - order.dropped_after(begin))
        times += np.bincount(order.epoch_rows(epoch)[begin : begin + count], minlength=len(lengths))
        epoch, begin, samples_seen = epoch + 1, 0, samples_seen - count
    found: dict[str, list[int]] = {}
    start = 0
    for part, part_lengths in measured:
        part_times = times[start : start + len(part_lengths)]
        start += len(part_lengths)
        total = found.setdefault(part.source, [0, 0, 0])
        for place, value in enumerate((len(part_lengths), part_times.sum(), (part_times * part_lengths).sum())):
            total[place] += int(value)
    return [SourceRead(source, *total) for source, total in found.items()]


def measure_parts(parts: Sequence[Part]) -> list[MeasuredPart]:
    """The number of tokens of each sample of each part. Raises UserError for a damaged part."""
    return [MeasuredPart(part, _sample_lengths(part.path)) for part in parts]


def _sample_lengths(path: str) -> np.ndarray:
    import pyarrow.compute as compute

    columns = _read(path, [INPUT_IDS])
    lengths = [np.asarray(compute.list_value_length(rows[INPUT_IDS])).astype(np.int64) for rows in columns]
    return np.concatenate([np.zeros(0, np.int64), *lengths])


def category_tokens(path: str, times: np.ndarray) -> Counter:
    """Tokens of each category in a part.

    Args:
        times: (samples,) how often each sample is counted.
    """
    names = load_part(path).column_names
    if {DOCUMENT_CATEGORIES, DOCUMENT_LENGTHS} <= set(names):
        columns = [INPUT_IDS, DOCUMENT_CATEGORIES, DOCUMENT_LENGTHS]
    else:
        columns = [INPUT_IDS, *({SAMPLE_CATEGORY} & set(names))]
    tokens: Counter = Counter()
    start = 0
    for rows in _read(path, columns):
        here = times[start : start + len(rows)]
        start += len(rows)
        categories, lengths, weights = _weighed(rows, here)
        for name, count in _sums(categories, lengths * weights):
            tokens[name] += count
    return tokens


def _read(path: str, columns: list[str]) -> Iterator[Any]:
    """Yield arrow tables of these columns."""
    part = load_part(path).select_columns(columns).with_format("arrow")
    return part.iter(SCAN_ROWS) if len(part) else iter(())


def _weighed(rows: Any, times: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray]:
    """Category, tokens and weight of each document; of each sample if documents have no categories."""
    import pyarrow.compute as compute

    sample_lengths = np.asarray(compute.list_value_length(rows[INPUT_IDS])).astype(np.int64)
    if DOCUMENT_CATEGORIES in rows.column_names:
        counts, named = (
            np.asarray(compute.list_value_length(rows[name])) for name in (DOCUMENT_LENGTHS, DOCUMENT_CATEGORIES)
        )
        if (counts == named).all():
            lengths = np.asarray(compute.list_flatten(rows[DOCUMENT_LENGTHS])).astype(np.int64)
            return compute.list_flatten(rows[DOCUMENT_CATEGORIES]), lengths, np.repeat(times, counts)
    if SAMPLE_CATEGORY in rows.column_names:
        return rows[SAMPLE_CATEGORY], sample_lengths, times
    return None, sample_lengths, times


def _sums(categories: Any, tokens: np.ndarray) -> Iterator[tuple[str, int]]:
    if categories is None:
        yield NOT_RECORDED, int(tokens.sum())
        return
    coded = categories.combine_chunks().fill_null(NOT_RECORDED).dictionary_encode()
    # Sums of floats are exact up to 2^53.
    sums = np.bincount(np.asarray(coded.indices), weights=tokens, minlength=len(coded.dictionary)).astype(np.int64)
    yield from zip(map(str, coded.dictionary.to_pylist()), sums.tolist(), strict=True)
