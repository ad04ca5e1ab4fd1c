"""Run tasks in processes on this machine (`local_workers`) or on a Ray cluster (`ray_workers`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from colossal_llama2.dataset.layout.prepare_settings import Execution
from colossal_llama2.dataset.write.local_workers import run_tasks


@contextmanager
def task_runner(execution: Execution) -> Iterator[Callable]:
    """Yield `run(function, tasks)`: `run_tasks` on this machine, or the same on a Ray cluster."""
    if execution.executor == "local":
        yield partial(run_tasks, num_workers=execution.num_workers)
        return
    from colossal_llama2.dataset.write.ray_workers import ray_runner

    with ray_runner(execution.ray_address, num_workers=execution.num_workers) as run:
        yield run
