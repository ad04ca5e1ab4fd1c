"""Run tasks on a Ray cluster: the same tasks that `local_workers` runs on this machine.

Ray runs in a separate driver process (`ray_driver`), to which the command sends tasks. So Ray's messages stay out of
the log, it does not replace signal handlers, and if it exits, as it does without its head node, the command can report
that.

    command --Request--> driver --> Ray workers (`ray_node`)        the driver has at most `slots` tasks
    command <--Report--- driver <-- Ray workers                     an exception instead of a result ends the run
"""

import contextlib
import importlib.metadata
import itertools
import multiprocessing
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.dataset.write.local_workers import JOIN_SECONDS
from colossal_llama2.dataset.write.ray_driver import GO_ON, Report, Request, drive, kill_session, no_cluster
from colossal_llama2.dataset.write.ray_node import Expected, expected_here
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted

OLDEST_VERSION = (2, 54)
REQUIREMENTS = "requirements-ray.txt"
ANSWER_SECONDS = 10
CONNECT_SECONDS = 120
# While tasks run, the driver reports every few seconds, unless it waits for a head node that does not answer.
SILENT_SECONDS = 150
MAX_NODES_NAMED = 8


@contextlib.contextmanager
def ray_runner(address: str | None, *, num_workers: int) -> Iterator[Callable]:
    """Yield `run(function, tasks)`, which yields the results of tasks as they finish, like `local_workers.run_tasks`.

    Each task has `cache_dir`, the shared folder with the work plan, and `name`, for messages.

    Args:
        address: HOST:PORT or "auto" for the cluster that this machine is a node of; None starts a Ray with
            `num_workers` cores on this machine, which ends with the context.

    Raises:
        UserError: Ray is missing or too old, or no cluster answers. Or, as a RefusedError, a node has other packages,
            or does not share the folders.
        RunError: Ray ends early.
    """
    _check(address)
    # Not a fork: Ray's driver must not inherit anything from this process.
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    driver = context.Process(target=drive, args=(theirs, address, num_workers), daemon=True)
    driver.start()
    theirs.close()
    seconds_to_end = 0
    try:
        slots = _received(connection, CONNECT_SECONDS).slots
        yield partial(_run, connection, slots, names_nodes=address is not None)
        seconds_to_end = JOIN_SECONDS
    except Exception:
        seconds_to_end = JOIN_SECONDS
        raise
    finally:
        # The driver ends with the connection, unless tasks are running; Ctrl+C does not wait for those.
        connection.close()
        driver.join(seconds_to_end)
        driver.terminate()
        driver.join(JOIN_SECONDS)
        driver.kill()
        driver.join()
        if driver.pid is not None:
            kill_session(driver.pid)


def _check(address: str | None) -> None:
    """Raise UserError for problems that can be found without starting Ray, which is slow to report them."""
    install = f"pip install --no-deps -r {REQUIREMENTS}"
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--executor ray: Ray is not installed; run {install}, or leave the flag out")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UserError(f"--executor ray: Ray {version} is installed, which is older than {oldest}; run {install}")
    if address in (None, "auto"):
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(no_cluster(address, error.strerror or str(error)))


def _run(
    connection: Connection, slots: int, function: Callable, tasks: Iterable[Any], *, names_nodes: bool
) -> Iterator[Any]:
    remaining, running = iter(tasks), 0
    expected: Expected | None = None
    nodes: Counter[str] = Counter()
    while True:
        for task in itertools.islice(remaining, max(slots - running, 0)):
            expected = expected or expected_here(task.cache_dir)
            _send(connection, Request(function, task, expected))
            running += 1
        if not running:
            break
        report = _received(connection, SILENT_SECONDS)
        slots = report.slots
        if report.node:
            nodes[report.node] += 1
            running -= 1
            yield report.result
    if names_nodes and nodes:
        logs.get_logger().info(_by_nodes(nodes))


def _by_nodes(nodes: Counter[str]) -> str:
    """How many tasks each node has done; of many nodes, the most and the fewest."""
    done = f"{counted(nodes.total(), 'task')} on {counted(len(nodes), 'Ray node')}"
    if len(nodes) > MAX_NODES_NAMED:
        return f"{done}, {min(nodes.values()):,} to {max(nodes.values()):,} on each"
    return f"{done}: {', '.join(f'{node} {count:,}' for node, count in sorted(nodes.items()))}"


def _send(connection: Connection, request: Request) -> None:
    try:
        connection.send(request)
    except OSError:
        # Raises why the driver has ended, perhaps after results that are dropped.
        while True:
            _received(connection, JOIN_SECONDS)


def _received(connection: Connection, seconds: float) -> Report:
    """The driver's next report; its warnings are logged. Raises its error, or RunError if there is none in time."""
    try:
        if not connection.poll(seconds):
            raise RunError(f"Ray has not answered for {seconds:g} s; {GO_ON}")
        report: Report = connection.recv()
    except (EOFError, OSError):
        raise RunError(f"Ray has ended, perhaps because the cluster's head node has; {GO_ON}")
    for warning in report.warnings:
        logs.get_logger().warning(warning)
    if isinstance(report.result, Exception):
        raise report.result
    return report
