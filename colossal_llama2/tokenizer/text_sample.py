"""Read the documents of a corpus of any size in bounded memory, and draw samples by a hash."""

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from colossal_llama2 import logs
from colossal_llama2.corpus.data_files import Span, find_input_files
from colossal_llama2.corpus.row_reader import SpanReader
from colossal_llama2.dataset.write.records import read_pretrain_row
from colossal_llama2.errors import UserError

Item = TypeVar("Item")


def read_documents(data_input_dirs: Sequence[str]) -> Iterator[str]:
    """Yield source and target, joined, of every {"source", "target"} record, with a progress bar; skip empty texts.

    The files are those that the prepare commands read. Raises UserError for a folder without such files, and with
    file:line for a bad row or a damaged file.
    """
    files = find_input_files(data_input_dirs)
    total = sum(file.size for file in files)
    with logs.progress(total=total, description="read", unit="B", unit_scale=True) as progress:
        for number, file in enumerate(files):
            for line in SpanReader(file, Span(number, 0, None)):
                problem, row = line.problem, None
                if line.record is not None:
                    try:
                        row = read_pretrain_row(line.record)
                    except ValueError as error:
                        problem = f"{error}; correct or remove the line"
                if problem is not None:
                    raise UserError(f"{file.path}:{line.number}: {problem}")
                if row is not None and (row.source or row.target):
                    yield row.source + row.target
                progress.update(0 if file.is_one_span else line.size)
            progress.update(file.size if file.is_one_span else 0)


def draw(text: str, seed: int) -> tuple[float, int]:
    """Two independent random values that depend on text and seed only: a number in [0, 1), and a 64-bit key."""
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=seed.to_bytes(8, "big")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48, int.from_bytes(digest[8:], "big")


class Sample(Generic[Item]):
    """A uniform sample, without repetition, of a stream of any length, with at most `budget` as the sum of sizes.

    It keeps the items with the smallest keys, as many as fit. With hashes as keys, the sample depends only on the set
    of items, not on their order or repetition.
    """

    def __init__(self, budget: int):
        self._budget = budget
        self._heap: list[tuple[int, Item, int]] = []  # largest key first, so keys are negated
        self._keys: set = set()
        self._limit = 1 << 64  # keys from here on are always refused; otherwise small items would fill the last gap
        self.size = 0

    def wants(self, key: int) -> bool:
        """Whether an item with this key would be kept, to be called before making a costly item."""
        return key < self._limit and key not in self._keys

    def add(self, key: int, item: Item, size: int) -> None:
        """Offer an item with its key and its size."""
        if not self.wants(key):
            return
        heapq.heappush(self._heap, (-key, item, size))
        self._keys.add(key)
        self.size += size
        while self.size > self._budget:
            negated, _, size = heapq.heappop(self._heap)
            self._limit = -negated
            self._keys.remove(self._limit)
            self.size -= size

    def items(self) -> list[Item]:
        """The kept items, by key."""
        return [item for _, item, _ in sorted(self._heap, key=lambda entry: -entry[0])]
