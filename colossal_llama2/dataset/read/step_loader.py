"""From prepared part-* folders to batches: which samples each rank reads, in which order, and how they are padded."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.buckets import Buckets
from colossal_llama2.dataset.read.loss_groups import NAME_COLUMNS, Groups
from colossal_llama2.dataset.read.prefetch import prefetched
from colossal_llama2.dataset.read.sources import resolve_parts
from colossal_llama2.errors import UserError
from colossal_llama2.storage import json_input

if TYPE_CHECKING:
    import datasets
    import torch

# Matrix kernels are fastest on lengths that are multiples of this.
PAD_TO_MULTIPLE = 8
CHECK_ROWS = 10_000
DOCUMENT_COLUMN = "sequence_lengths"


def load_tokenized_dataset(
    dataset_paths: Sequence[str], document_mask: str = "off", *, flag: str = "--dataset"
) -> "datasets.Dataset":
    """Load prepared folders and put their samples one after the other, in the given order.

    Args:
        dataset_paths: what prepare_pretrain_dataset.py or prepare_sft_dataset.py wrote, as --dataset takes it.
        flag: what named the folders, for messages.
        document_mask: "on" or "auto" keeps the lengths of the documents in each sample, "auto" where they are there.

    Returns:
        A memory-mapped dataset with the columns input_ids and labels, in arrow format; and sequence_lengths, by which
        a Collator keeps documents apart, with document_sources and document_categories where all parts have them.

    Raises:
        UserError: a folder is missing, is no prepared folder, holds no samples, or lacks the lengths that "on" needs.
    """
    return load_parts([part.path for part in resolve_parts(dataset_paths, flag=flag)], document_mask, flag=flag)


def load_parts(paths: Sequence[str], document_mask: str, *, flag: str = "--dataset") -> "datasets.Dataset":
    """The same for the paths of part-* folders that are resolved already."""
    import datasets

    parts = [load_part(path, flag=flag) for path in paths]
    columns = ["input_ids", "labels"]
    if document_mask != "off" and _all_have_documents(paths, parts, required=document_mask == "on"):
        columns.append(DOCUMENT_COLUMN)
        if all(set(NAME_COLUMNS) <= set(part.column_names) for part in parts):
            columns += NAME_COLUMNS
    whole = datasets.concatenate_datasets([part.select_columns(columns) for part in parts])
    if len(whole) == 0:
        raise UserError(f"{flag} {' '.join(paths)}: holds no samples")
    return whole.with_format("arrow")


def _all_have_documents(paths: Sequence[str], parts: Sequence["datasets.Dataset"], *, required: bool) -> bool:
    lacking = [path for path, part in zip(paths, parts, strict=True) if DOCUMENT_COLUMN not in part.column_names]
    if lacking and required:
        raise UserError(
            f"--document_mask on: {lacking[0]} has no column {DOCUMENT_COLUMN}, which says where documents end; "
            f"prepare the data again, or leave the flag out"
        )
    if lacking and len(lacking) < len(parts):
        logs.get_logger().warning(
            "%s has no column %s, so the documents of no sample are kept apart", lacking[0], DOCUMENT_COLUMN
        )
    return not lacking


def without_names(dataset: "datasets.Dataset") -> "datasets.Dataset":
    """The dataset without the sources and categories of documents, which would be read with each sample."""
    return dataset.select_columns([name for name in dataset.column_names if name not in NAME_COLUMNS])


def load_part(path: str, *, flag: str = "--dataset") -> "datasets.Dataset":
    """One part-* folder, memory-mapped, with all its columns. Raises UserError if it is damaged or lacks a column."""
    import datasets

    try:
        part = datasets.load_from_disk(path)
    except Exception as error:  # whatever pyarrow and datasets raise for a file that is cut or empty
        raise UserError(f"{flag} {path}: cannot be loaded ({type(error).__name__}: {error}); prepare it again")
    missing = {"input_ids", "labels"} - set(getattr(part, "column_names", ()))
    if missing:
        raise UserError(f"{path}: has no column {' and '.join(sorted(missing))}; prepare the data again")
    return part


def dataset_fingerprints(dataset_paths: Sequence[str]) -> list[str]:
    """What `datasets` noted of each folder's content when it was written; a prepare command notes a hash of it."""
    fingerprints = []
    for path in (Path(folder, "state.json") for folder in dataset_paths):
        try:
            fingerprints.append(str(json_input.read_object(path, unique_names=False).get("_fingerprint")))
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: is not what `datasets` writes ({error}); prepare the data again")
    return fingerprints


def check_lengths(dataset: "datasets.Dataset", max_length: int, *, flag: str = "--dataset") -> None:
    """Raise a UserError for a sample that is too long, empty, or whose columns do not fit each other.

    It has a label for each token, documents that fill it, and a source and a category for each of them.
    """
    import pyarrow.compute as compute

    for rows in dataset.iter(CHECK_ROWS):
        lengths = compute.list_value_length(rows["input_ids"])
        shortest, longest = compute.min_max(lengths).as_py().values()
        if longest > max_length:
            raise UserError(
                f"a sample of {flag} has {longest} tokens, --max_length {max_length} given; "
                f"raise it, or prepare the data with that --max_length"
            )
        if shortest == 0 or not compute.all(compute.equal(lengths, compute.list_value_length(rows["labels"]))).as_py():
            raise UserError(f"a sample of {flag} is empty, or has more labels than tokens or fewer; prepare it again")
        if DOCUMENT_COLUMN in rows.column_names and not _documents_fill(rows[DOCUMENT_COLUMN], lengths):
            raise UserError(f"a sample of {flag} has {DOCUMENT_COLUMN} that are not its length; prepare it again")
        for name in sorted(set(NAME_COLUMNS) & set(rows.column_names)):
            if not _same_counts(rows[name], rows[DOCUMENT_COLUMN]):
                raise UserError(f"a sample of {flag} has not one of {name} for each document; prepare it again")


def _documents_fill(documents: Any, lengths: Any) -> bool:
    """Whether the lists of positive whole numbers in an arrow column sum to these lengths."""
    import pyarrow.compute as compute

    counts = np.asarray(compute.list_value_length(documents))
    values = np.asarray(compute.list_flatten(documents))
    if counts.min() < 1 or values.min() < 1:
        return False
    sums = np.add.reduceat(values.astype(np.int64), np.cumsum(counts) - counts)
    return bool((sums == np.asarray(lengths)).all())


def _same_counts(lists: Any, others: Any) -> bool:
    """Whether the lists in an arrow column have as many entries as those in another, which has no null."""
    import pyarrow.compute as compute

    is_same = compute.equal(compute.list_value_length(lists), compute.list_value_length(others))
    return compute.all(compute.fill_null(is_same, False)).as_py()


def highest_token_id(dataset: "datasets.Dataset", *, share: int, shares: int) -> int:
    """The highest token id in one of `shares` equal shares of the data, so that ranks can divide the reading."""
    import pyarrow.compute as compute

    part = dataset.select(range(len(dataset) * share // shares, len(dataset) * (share + 1) // shares))
    return max(
        (compute.max(compute.list_flatten(rows["input_ids"])).as_py() for rows in part.iter(CHECK_ROWS)), default=0
    )


@dataclass(frozen=True)
class SampleOrder:
    """The order of samples over epochs, steps and ranks: a pure function of these numbers.

    One seeded permutation an epoch, or bucket after bucket; each micro batch of the whole job takes the next samples of
    it, and each rank its slice of them. So the order does not depend on the number of ranks, and a place in it is a
    count of samples.

    Attributes:
        num_samples: of an epoch: those of the data, or of `buckets` if there are some.
    """

    num_samples: int
    micro_batch_size: int
    data_size: int
    accumulation_steps: int
    seed: int
    buckets: Buckets | None = None

    @property
    def samples_per_micro_step(self) -> int:
        """Samples that all ranks together take in one forward pass."""
        return self.micro_batch_size * self.data_size

    def steps_after(self, consumed: int) -> int:
        """Optimizer steps left in an epoch of which `consumed` samples are done.

        The last one has fewer micro batches where they do not come out even.
        """
        micro_steps = (self.num_samples - consumed) // self.samples_per_micro_step
        return -(-micro_steps // self.accumulation_steps)

    def dropped_after(self, consumed: int) -> int:
        """Samples at the end of that epoch which are too few for one more micro batch of all ranks."""
        return (self.num_samples - consumed) % self.samples_per_micro_step

    def rows(self, epoch: int, begin: int, end: int) -> list[int]:
        """The rows of the data that are the samples `begin` to `end` - 1 of an epoch."""
        return self.epoch_rows(epoch)[begin:end].tolist()

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """(num_samples,) rows of the data in the order of an epoch, those that are left over at its end included."""
        if self.buckets is not None:
            return self.buckets.rows(seed=self.seed, epoch=epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def bucket_of(self, position: int) -> int:
        """The bucket of the sample at that place of any epoch, both counted from 0; 0 without buckets."""
        return self.buckets.bucket_of(position) if self.buckets is not None else 0

    def steps(self, epoch: int, consumed: int, data_rank: int) -> Iterator[tuple[list[np.ndarray], int]]:
        """Yield, for each optimizer step, this rank's sample indices per micro batch and the samples all ranks took."""
        order = self.epoch_rows(epoch)
        width = self.samples_per_micro_step
        while consumed + width <= self.num_samples:
            micro_steps = min(self.accumulation_steps, (self.num_samples - consumed) // width)
            starts = [consumed + i * width + data_rank * self.micro_batch_size for i in range(micro_steps)]
            yield [order[start : start + self.micro_batch_size] for start in starts], micro_steps * width
            consumed += micro_steps * width


@dataclass(frozen=True)
class Batch:
    """One micro batch, on the CPU.

    Attributes:
        input_ids, labels: (batch, length) int64, padded on the right; labels are IGNORE_INDEX there.
        attention_mask: (batch, length) int64, 1 on tokens and 0 on padding; None if nothing is padded.
        lengths: (batch,) int64, tokens per sample.
        predicted: number of labels that count in the loss: not IGNORE_INDEX, and not a sample's first.
        documents: (batch, length) int64, the number of a token's document in its row from 1, and 0 on padding; None if
            each row is one document, or documents are not kept apart.
        groups: (batch, length) int64, the group (see `Groups`) of the token that each token predicts, 0 where there is
            none; None if groups are not told apart.
        group_counts: (groups,) how many predicted tokens each group has.
    """

    input_ids: "torch.Tensor"
    labels: "torch.Tensor"
    attention_mask: Optional["torch.Tensor"]
    lengths: "torch.Tensor"
    predicted: int
    documents: Optional["torch.Tensor"] = None
    groups: Optional["torch.Tensor"] = None
    group_counts: Optional["np.ndarray"] = None

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    def pinned(self) -> "Batch":
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if hasattr(value, "pin_memory")}
        return replace(self, **tensors)


class Collator:
    """Turns rows of the dataset into a Batch.

    Pads to the longest sample, rounded up to a multiple of 8. The mask comes from the lengths, not from the token ids,
    so that a padding token that is also a real one (</s>) is never hidden. Where rows say how long their documents are,
    documents are kept apart, and the first token of a document is not predicted from the one before.
    """

    def __init__(
        self,
        *,
        pad_token_id: int,
        max_length: int,
        length_divisor: int = 1,
        groups: Groups | None = None,
        keeps_apart: bool = True,
    ):
        """
        Args:
            length_divisor: divides `max_length` and the length of every batch.
            groups: to be told apart.
            keeps_apart: False lets the documents of a row attend to each other. Their first tokens are still not
                predicted, so the same tokens are.
        """
        self.groups, self._keeps_apart = groups, keeps_apart
        self._pad_token_id, self._max_length = pad_token_id, max_length
        self._multiple = math.lcm(PAD_TO_MULTIPLE, length_divisor)

    def __call__(self, rows) -> Batch:
        """Collate an arrow table of `load_tokenized_dataset`, which `check_lengths` has accepted."""
        import torch

        ids = [np.asarray(row.values) for row in rows["input_ids"]]
        labels = [np.asarray(row.values) for row in rows["labels"]]
        lengths = np.array([len(row) for row in ids])
        width = min(-(-lengths.max() // self._multiple) * self._multiple, self._max_length)
        padded_ids = np.full((len(ids), width), self._pad_token_id, dtype=np.int64)
        padded_labels = np.full((len(ids), width), IGNORE_INDEX, dtype=np.int64)
        for row, (row_ids, row_labels) in enumerate(zip(ids, labels, strict=True)):
            padded_ids[row, : len(row_ids)] = row_ids
            padded_labels[row, : len(row_labels)] = row_labels
        documents = None
        if DOCUMENT_COLUMN in rows.column_names:
            documents = _document_numbers([np.asarray(row.values) for row in rows[DOCUMENT_COLUMN]], width)
        if documents is not None:
            padded_labels[:, 1:][documents[:, 1:] != documents[:, :-1]] = IGNORE_INDEX
        mask = np.arange(width) < lengths[:, None]
        groups = counts = None
        if self.groups is not None:
            groups, counts = self.groups.of_predicted(rows, padded_labels)
        return Batch(
            input_ids=torch.from_numpy(padded_ids),
            labels=torch.from_numpy(padded_labels),
            attention_mask=None if mask.all() else torch.from_numpy(mask.astype(np.int64)),
            lengths=torch.from_numpy(lengths),
            predicted=int((padded_labels[:, 1:] != IGNORE_INDEX).sum()),
            documents=torch.from_numpy(documents) if documents is not None and self._keeps_apart else None,
            groups=None if groups is None else torch.from_numpy(groups),
            group_counts=counts,
        )


def _document_numbers(lengths: Sequence[np.ndarray], width: int) -> np.ndarray | None:
    """(rows, width) numbers of documents of these lengths, as `Batch` has them; None if each row is one."""
    if all(len(row) == 1 for row in lengths):
        return None
    numbers = np.zeros((len(lengths), width), dtype=np.int64)
    for row, row_lengths in enumerate(lengths):
        numbers[row, : row_lengths.sum()] = np.repeat(np.arange(1, len(row_lengths) + 1), row_lengths)
    return numbers


class StepLoader:
    """Reads this rank's micro batches, one optimizer step at a time, some of them ahead.

    With `pins` they lie in memory that a GPU copies from while it works.
    """

    def __init__(
        self, dataset: "datasets.Dataset", order: SampleOrder, collator: Collator, data_rank: int, *, pins: bool = False
    ):
        dataset = without_names(dataset) if collator.groups is None else dataset
        self._dataset, self.order, self._collator, self._data_rank = dataset, order, collator, data_rank
        self._pins = pins

    def steps(self, epoch: int, consumed: int) -> Iterator[tuple[list[Batch], int]]:
        """Yield (micro batches of this rank, samples that all ranks took) for each optimizer step left in the epoch."""
        return prefetched(self._steps(epoch, consumed))

    def _steps(self, epoch: int, consumed: int) -> Iterator[tuple[list[Batch], int]]:
        for indices, taken in self.order.steps(epoch, consumed, self._data_rank):
            batches = [self._collator(self._dataset[rows]) for rows in indices]
            yield [batch.pinned() for batch in batches] if self._pins else batches, taken
