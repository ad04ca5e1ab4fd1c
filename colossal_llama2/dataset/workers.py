"""Run tasks on the cores of this machine, or of a Ray cluster, and yield their results in the order of the tasks.

A task is a function's one argument; it writes what it makes to shared folders, so that a task may run twice.
"""

import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from colossal_llama2.dataset.settings import Execution
from colossal_llama2.errors import RunError, UserError

TASKS_AHEAD = 2
PR_SET_PDEATHSIG = 1
JOIN_SECONDS = 10


def run_tasks(function: Callable, tasks: Iterable[Any], *, execution: Execution) -> Iterator[Any]:
    """`function(task)` of each task, in order. The error of the first task that has one is raised; the others stop."""
    if execution.executor == "ray":
        return _run_on_ray(function, tasks, execution)
    if execution.num_workers == 1:
        return map(function, tasks)
    return _run_in_processes(function, tasks, execution.num_workers)


def _run_in_processes(function: Callable, tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    remaining = iter(tasks)
    first = list(itertools.islice(remaining, num_workers))
    if len(first) <= 1:
        yield from map(function, first)
        return
    # The server is a process without threads, so that forking it is safe, and has the imports that workers need.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["colossal_llama2.dataset.units"])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(len(first), mp_context=context, initializer=_begin_worker)
    try:
        running = deque(pool.submit(function, task) for task in first)
        for task in itertools.islice(remaining, (TASKS_AHEAD - 1) * num_workers):
            running.append(pool.submit(function, task))
        while running:
            yield running.popleft().result()
            for task in itertools.islice(remaining, 1):
                running.append(pool.submit(function, task))
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed, perhaps because memory ran out; give the same command again, with fewer "
            "--num_workers, and it goes on where it stopped"
        )
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join(JOIN_SECONDS)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl+C to the parent, and end when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)


def _run_on_ray(function: Callable, tasks: Iterable[Any], execution: Execution) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray; run: pip install 'ray>=2.54', or leave the flag out")
    root = str(Path(__file__).resolve().parents[2])
    was_running = ray.is_initialized()
    if not was_running:
        _connect(ray, execution.ray_address, root)
    try:
        # Tasks write whole files or nothing, so one that was lost with its worker runs again, however often.
        remote = ray.remote(num_cpus=1, max_retries=-1)(function)
        remaining = iter(tasks)
        ahead = TASKS_AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        running = deque(remote.remote(task) for task in itertools.islice(remaining, ahead))
        while running:
            try:
                yield ray.get(running.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause
            for task in itertools.islice(remaining, 1):
                running.append(remote.remote(task))
    finally:
        if not was_running:
            ray.shutdown()


def _connect(ray, address, root: str) -> None:
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        ray.init(
            address=address, include_dashboard=False if address is None else None, log_to_driver=False,
            logging_level="ERROR", runtime_env={"env_vars": {"PYTHONPATH": path}},
        )  # fmt: skip
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--ray_address {address}: no Ray cluster answers there ({error}); start one with: ray start")
