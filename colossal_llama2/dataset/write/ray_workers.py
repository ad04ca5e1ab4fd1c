"""Run tasks on a Ray cluster: the same tasks as `workers` runs on this machine's cores.

Ray lives in a process of its own, which this one feeds with tasks. So its messages stay out of the log, it replaces
nobody's signal handlers, and when it ends itself, as it does without its head node, the command can still tell.

    command --(function, task)--> driver --> Ray workers        at most `slots` tasks are with the driver
    command <--(slots, result)--- driver <-- Ray workers        an exception instead of a result ends it
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
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.dataset.write.local_workers import JOIN_SECONDS, TASKS_AHEAD, begin_worker
from colossal_llama2.errors import RunError, UserError

OLDEST_VERSION = (2, 54)
# So often a task runs again after its worker or node was lost; more often, and the task is what kills workers.
MAX_RETRIES = 10
# Ray's least is 75 MiB. Tasks hand over nothing through it: what they make is in files.
OBJECT_STORE_BYTES = 100 << 20
ANSWER_SECONDS = 10
CONNECT_SECONDS = 120
GO_ON = "give the same command again, and it goes on where it stopped"


@contextlib.contextmanager
def ray_runner(address: str | None, *, num_workers: int) -> Iterator[Callable]:
    """Yield `run(function, tasks)`, which yields what tasks give as they are done, as `workers.run_tasks` does.

    `address` is that of a cluster that this machine is a node of, HOST:PORT or "auto"; None starts a Ray with
    `num_workers` cores on this machine, which ends with the context. Raises UserError if Ray is missing or too old or
    no cluster answers, and RunError if Ray ends early.
    """
    _check(address)
    # Not a fork: Ray's driver begins with nothing of this process.
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
        # It ends when the connection does, unless tasks are running, which Ctrl+C does not wait for.
        connection.close()
        driver.join(seconds_to_end)
        driver.terminate()
        driver.join(JOIN_SECONDS)
        driver.kill()
        driver.join()
        _kill_session(driver.pid)


def _kill_session(leader: int) -> None:
    """End what a Ray that broke down has left running: it stays in its driver's session, whoever its parent is now.

    Until there is none but this process: one may be starting another.
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
    logs.get_logger().warning("Ray has left processes that do not end: %s", [process.pid for process in left])


def _is_alive_in(leader: int, process) -> bool:
    import psutil

    try:
        is_other = process.pid != os.getpid()
        return is_other and os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):  # it has ended
        return False


def _check(address: str | None) -> None:
    """Raise UserError for what can be told without Ray, which takes its time to say so."""
    install = "pip install 'ray>={}.{}'".format(*OLDEST_VERSION)
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"--executor ray: Ray is not installed; run {install}, or leave the flag out")
    if tuple(map(int, version.split(".")[:2])) < OLDEST_VERSION:
        raise UserError(f"--executor ray: Ray {version} is installed, which is too old; run {install}")
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


def _run(connection, slots: int, function: Callable, tasks: Iterable[Any]) -> Iterator[Any]:
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


def _send(connection, message: Any) -> None:
    try:
        connection.send(message)
    except OSError:
        _received(connection)  # why the driver has ended


def _received(connection) -> tuple[int, Any]:
    try:
        slots, result = connection.recv()
    except (EOFError, OSError):
        raise RunError(f"Ray has ended, perhaps because the cluster's head node did; {GO_ON}")
    if isinstance(result, Exception):
        raise result
    return slots, result


# The driver's process.


def _drive(connection, address: str | None, num_workers: int) -> None:
    """Connect to Ray, and do tasks until the command closes the connection."""
    os.setsid()  # what Ray starts is known by it
    begin_worker(before_end=partial(_kill_session, os.getpid()))
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # Ray runs what anybody sends to its ports, if it is not told to ask for a token.
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
        # The folders may be taken back now: nobody may write to them any more.
        _cancel(ray, running)
        is_told = isinstance(error, (UserError, RunError, OSError))
        connection.send((0, error if is_told else RuntimeError(traceback.format_exc())))
    finally:
        ray.shutdown()


def _connect(ray, address: str | None, num_workers: int) -> None:
    # Nodes need the packages in requirements.txt, and get this one from here.
    where: dict[str, Any] = {"runtime_env": {"py_modules": [str(Path(__file__).resolve().parents[1])]}}
    if address is None:
        # RAY_ADDRESS does not count here.
        where.update(
            address="local", num_cpus=num_workers, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
        )
    else:
        where.update(address=address)
    try:
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        if address is None:
            raise RunError(f"--executor ray: Ray does not start here ({error}); {GO_ON}")
        raise UserError(_no_cluster(address, str(error)))


def _slots(ray) -> int:
    """How many tasks Ray may have: some for each core of the nodes that are there now."""
    return TASKS_AHEAD * max(int(ray.cluster_resources().get("CPU", 0)), 1)


def _serve(ray, connection, running: list[Any]) -> None:
    while True:
        # Wait for a task if there is none, else take those that have come.
        while not running or connection.poll():
            function, task = connection.recv()
            remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(function)
            running.append(remote.remote(task))
        (done,), _ = ray.wait(running, num_returns=1)
        result = _result(ray, running, done)
        running.remove(done)
        connection.send((_slots(ray), result))


def _result(ray, running: list[Any], done: Any) -> Any:
    """What a task gave. Raises the error of the first task that has one, if it has any: those before are waited for."""
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
            raise RunError(f"Ray has lost a task for good ({error}); {GO_ON}")
    raise RunError(f"Ray has lost a task and found it again; {GO_ON}")


def _cancel(ray, running: list[Any]) -> None:
    """End the workers that are at a task, and wait until they have ended."""
    for reference in running:
        ray.cancel(reference, force=True)
    if running:
        ray.wait(list(running), num_returns=len(running), timeout=JOIN_SECONDS)
