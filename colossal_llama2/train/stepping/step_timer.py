"""Time the parts of an optimizer step, without slowing it down."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

# Name of a part, its begin and its end: seconds of the host's clock, or CUDA events.
Mark = tuple[str, Any, Any]


class NoTimer:
    """Measures nothing: for ranks whose times are not reported."""

    def part(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A context whose time is counted as that part of the step."""
        return contextlib.nullcontext()

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items; the time that passes until each of them is counted as that part of the step."""
        return iter(items)


class StepTimer(NoTimer):
    """Sums the seconds of each part; on a GPU, of the work that is queued in it.

    On a GPU a part is delimited by two events in the queue, and nothing waits for them until `seconds` is called.
    """

    def __init__(self) -> None:
        import torch

        self._on_gpu = torch.cuda.is_available()
        self._marks: list[Mark] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(items)
        while True:
            # By the clock of the host, since the GPU does not read data.
            begin = time.perf_counter()
            item = next(iterator, self)
            self._marks.append((name, begin, time.perf_counter()))
            if item is self:
                return
            yield item

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """The seconds of each part, by name, since the last call. Waits for the GPU."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return seconds_of(self.take())

    @property
    def is_late(self) -> bool:
        """Whether `take` may return marks that the GPU has not reached yet; one optimizer step later it has."""
        return self._on_gpu

    def take(self) -> list[Mark]:
        """The marks since the last call, for `seconds_of`. Does not wait."""
        marks, self._marks = self._marks, []
        return marks


def seconds_of(marks: Iterable[Mark]) -> dict[str, float]:
    """The seconds of each part, by name; a GPU must have reached all marks."""
    sums: dict[str, float] = {}
    for name, begin, end in marks:
        passed = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        sums[name] = sums.get(name, 0.0) + passed
    return sums
