"""Run tasks in processes on this machine, and yield their results as they finish.

A task is the only argument of a function, which writes its output to shared folders, so a task may run twice.
"""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from colossal_llama2.errors import RunError

TASKS_AHEAD = 2
JOIN_SECONDS = 10
# Imported once for all workers, because tasks need them. Missing packages are ignored.
PRELOADED = [
    "colossal_llama2.dataset.write.bins",
    "colossal_llama2.dataset.write.tokenize_unit",
    "concurrent.futures.process",
    "kitoken",
    "numpy.random",
    "orjson",
    "pyarrow.compute",
    "sentencepiece.sentencepiece_model_pb2",
    "tokenizers",
]


def run_tasks(function: Callable, tasks: Iterable[Any], *, num_workers: int) -> Iterator[Any]:
    """Yield `function(task)` of each task as it finishes. Raises the error of the first task, in order, that failed.

    After an error no more tasks begin, and running ones are stopped.
    """
    if num_workers == 1:
        return map(function, tasks)
    return _run_in_processes(function, tasks, num_workers)


def _run_in_processes(function: Callable, tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    remaining = iter(tasks)
    first = list(itertools.islice(remaining, num_workers))
    if len(first) <= 1:
        yield from map(function, first)
        return
    # The fork server runs no threads, so forking it is safe, and it has imported what workers need.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(len(first), mp_context=context, initializer=begin_worker)
    try:
        # A dictionary, which keeps the order of the tasks.
        running = {pool.submit(function, task): None for task in first}
        for task in itertools.islice(remaining, (TASKS_AHEAD - 1) * num_workers):
            running[pool.submit(function, task)] = None
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            _raise_first_error(running, done)
            for future in done:
                del running[future]
                yield future.result()
            for task in itertools.islice(remaining, len(done)):
                running[pool.submit(function, task)] = None
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, perhaps because memory ran out; run the same command again, with fewer "
            "--num_workers, and it continues where it stopped"
        )
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join(JOIN_SECONDS)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _raise_first_error(running: Iterable[Future], done: Collection[Future]) -> None:
    """If any of `done` failed, wait for all tasks before it, and raise the error of the first that failed."""
    if not any(future.exception() for future in done):
        return
    for future in running:
        future.result()


def begin_worker(before_end: Callable = lambda: None) -> None:
    """Leave Ctrl+C to the parent, and end when the parent is killed, after `before_end()`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(before_end,), daemon=True).start()


def _end_with_parent(before_end: Callable) -> None:
    # The fork server lives as long as its workers, so wait for the command itself.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    try:
        before_end()
    finally:
        os._exit(1)
