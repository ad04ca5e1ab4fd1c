"""Read and collate the next batches while the model computes."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

# Optimizer steps ahead. One is enough if reading is faster than training; two absorb an occasional slow read.
DEPTH = 2
LOOK_SECONDS = 0.2


def prefetched(items: Iterable[Any], *, depth: int = DEPTH) -> Iterator[Any]:
    """Yield the items in order. A thread makes up to `depth` of them ahead, and ends when this iterator does.

    An error in making an item is raised here, in its place.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    ended = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, ended), daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        ended.set()
        thread.join()


def _fill(items: Iterable[Any], ready: "queue.Queue[tuple[str, Any]]", ended: threading.Event) -> None:
    try:
        for item in items:
            if not _put(ready, ("item", item), ended):
                return
        _put(ready, ("end", None), ended)
    except BaseException as error:
        _put(ready, ("error", error), ended)


def _put(ready: "queue.Queue[tuple[str, Any]]", entry: tuple[str, Any], ended: threading.Event) -> bool:
    """Pass an entry to the consumer; False if the consumer has ended."""
    while not ended.is_set():
        try:
            ready.put(entry, timeout=LOOK_SECONDS)
            return True
        except queue.Full:
            pass
    return False
