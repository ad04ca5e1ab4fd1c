"""Run tasks on a Ray cluster: the same tasks that `local_workers` runs on this machine.

Ray runs in a separate driver process, to which the command sends tasks. So Ray's messages stay out of the log, it does
not replace signal handlers, and if it exits, as it does without its head node, the command can report that.

    command --(function, task)--> driver --> Ray workers        the driver has at most `slots` tasks
    command <--(slots, result)--- driver <-- Ray workers        an exception instead of a result ends the run
"""

import contextlib
import importlib.metadata
import itertools
import multiprocessing
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import colossal_llama2
from colossal_llama2 import logs
from colossal_llama2.dataset.write.local_workers import JOIN_SECONDS, TASKS_AHEAD, begin_worker
from colossal_llama2.errors import RunError, UserError

if TYPE_CHECKING:
    import psutil

OLDEST_VERSION = (2, 54)
REQUIREMENTS = "requirements-ray.txt"
# Independent of where this file is in the package.
PACKAGE = Path(colossal_llama2.__file__).resolve().parent
# Retries after a worker or node was lost. If more are needed, the task itself kills its workers.
MAX_RETRIES = 10
# Ray's minimum is 75 MiB. Tasks do not use the object store: their output is in files.
OBJECT_STORE_BYTES = 100 << 20
ANSWER_SECONDS = 10
CONNECT_SECONDS = 120
GO_ON = "run the same command again, and it continues where it stopped"


@contextlib.contextmanager
def ray_runner(address: str | None, *, num_workers: int) -> Iterator[Callable]:
    """Yield `run(function, tasks)`, which yields the results of tasks as they finish, like `local_workers.run_tasks`.

    Args:
        address: HOST:PORT or "auto" for the cluster that this machine is a node of; None starts a Ray with
            `num_workers` cores on this machine, which ends with the context.

    Raises:
        UserError: Ray is missing or too old, or no cluster answers.
        RunError: Ray ends early.
    """
    _check(address)
    # Not a fork: Ray's driver must not inherit anything from this process.
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    driver = context.Process(target=_drive, args=(theirs, address, num_workers), daemon=True)
    driver.start()
    theirs.close()
    seconds_to_end = 0
    try:
        if not connection.poll(CONNECT_SECONDS):
            raise RunError(f"Ray has not answered for {CONNECT_SECONDS} seconds; {GO_ON}")
        slots, _ = _received(connection)
        yield partial(_run, connection, slots)
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
            _kill_session(driver.pid)


def _kill_session(leader: int) -> None:
    """Kill the processes that a failed Ray left running. They stay in the driver's session, even without their parent.

    Repeats until only this process is left, because a process may be starting another one.
    """
    import psutil

    end = time.monotonic() + JOIN_SECONDS
    while left := [process for process in psutil.process_iter() if _is_alive_in(leader, process)]:
        if time.monotonic() > end:
            break
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)
    else:
        return
    logs.get_logger().warning("Ray left processes that do not end: %s", [process.pid for process in left])


def _is_alive_in(leader: int, process: "psutil.Process") -> bool:
    import psutil

    try:
        is_other = process.pid != os.getpid()
        return is_other and os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):  # it has ended
        return False


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
        raise UserError(_no_cluster(address, error.strerror or str(error)))


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"--ray_address {address}: no Ray cluster answers there ({reason}); start one with `ray start --head`, join "
        "this machine to it with `ray start --address HOST:PORT`, or leave the flag out"
    )


def _run(connection: Connection, slots: int, function: Callable, tasks: Iterable[Any]) -> Iterator[Any]:
    remaining, running = iter(tasks), 0
    while True:
        for task in itertools.islice(remaining, max(slots - running, 0)):
            _send(connection, (function, task))
            running += 1
        if not running:
            return
        slots, result = _received(connection)
        running -= 1
        yield result


def _send(connection: Connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:
        _received(connection)  # raises why the driver has ended


def _received(connection: Connection) -> tuple[int, Any]:
    try:
        slots, result = connection.recv()
    except (EOFError, OSError):
        raise RunError(f"Ray has ended, perhaps because the cluster's head node has; {GO_ON}")
    if isinstance(result, Exception):
        raise result
    return slots, result


# The driver's process.


def _drive(connection: Connection, address: str | None, num_workers: int) -> None:
    """Connect to Ray, and do tasks until the command closes the connection."""
    os.setsid()  # identifies the processes that Ray starts
    begin_worker(before_end=partial(_kill_session, os.getpid()))
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Without a token, Ray runs any code that is sent to its ports.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    running: list[Any] = []
    try:
        _connect(ray, address, num_workers)
        connection.send((_slots(ray), None))
        _serve(ray, connection, running)
    except EOFError:  # the command is done
        pass
    except Exception as error:
        # The folders may be removed now, so no worker may write to them any more.
        _cancel(ray, running)
        is_expected = isinstance(error, (UserError, RunError, OSError))
        connection.send((0, error if is_expected else RuntimeError(traceback.format_exc())))
    finally:
        ray.shutdown()


def _connect(ray: ModuleType, address: str | None, num_workers: int) -> None:
    # Nodes need the packages in requirements.txt; this package is sent to them.
    where: dict[str, Any] = {"runtime_env": {"py_modules": [str(PACKAGE)]}}
    if address is None:
        # "local" overrides RAY_ADDRESS.
        where.update(
            address="local", num_cpus=num_workers, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
        )
    else:
        where.update(address=address)
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        if address is None:
            raise RunError(f"--executor ray: Ray does not start on this machine ({error}); {GO_ON}")
        raise UserError(_no_cluster(address, str(error)))


def _slots(ray: ModuleType) -> int:
    """The number of tasks that Ray may have at a time: some for each core of the current nodes."""
    return TASKS_AHEAD * max(int(ray.cluster_resources().get("CPU", 0)), 1)


def _serve(ray: ModuleType, connection: Connection, running: list[Any]) -> None:
    while True:
        # Wait for a task if none is running, otherwise receive those that have arrived.
        while not running or connection.poll():
            function, task = connection.recv()
            remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
            running.append(remote.remote(task))
        (done,), _ = ray.wait(running, num_returns=1)
        result = _result(ray, running, done)
        running.remove(done)
        connection.send((_slots(ray), result))


def _result(ray: ModuleType, running: list[Any], done: Any) -> Any:
    """The result of a task. If it failed, waits for all tasks before it and raises the first error."""
    try:
        return ray.get(done)
    except ray.exceptions.RayError:
        pass
    for reference in running:
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (UserError, RunError, OSError)):
                raise error.cause
            raise RuntimeError(str(error))
        except ray.exceptions.RayError as error:
            raise RunError(f"Ray has lost a task ({error}); {GO_ON}")
    raise RunError(f"Ray lost a task and found it again; {GO_ON}")


def _cancel(ray: ModuleType, running: list[Any]) -> None:
    """Stop the workers that run tasks, and wait until they have ended."""
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(list(running), num_returns=len(running), timeout=JOIN_SECONDS)
