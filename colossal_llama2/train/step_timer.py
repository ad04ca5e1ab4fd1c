"""How long the parts of an optimizer step take, measured without making it longer."""

import contextlib
import time
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Tuple


class NoTimer:
    """Measures nothing: for training."""

    def part(self, name: str) -> ContextManager[None]:
        """A context whose time belongs to a part of the step."""
        return contextlib.nullcontext()

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items; the time that they take to come belongs to a part of the step."""
        return iter(items)


class StepTimer(NoTimer):
    """Adds up the seconds of each part, on a GPU those of the work that is queued there.

    There a part is two events in the queue, which nobody waits for before `seconds` is asked.
    """

    def __init__(self):
        import torch

        self._on_gpu = torch.cuda.is_available()
        self._marks: List[Tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._mark()
        yield
        self._marks.append((name, begin, self._mark()))

    def each(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(items)
        while True:
            # On the clock of the host: what is waited for is no work of the GPU.
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

    def seconds(self) -> Dict[str, float]:
        """The sum of each part, by name, since the last call. Waits for the GPU."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        sums: Dict[str, float] = {}
        for name, begin, end in self._marks:
            passed = end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
            sums[name] = sums.get(name, 0.0) + passed
        self._marks.clear()
        return sums
