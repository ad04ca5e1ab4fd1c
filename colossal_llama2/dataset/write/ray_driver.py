"""The driver of a Ray cluster, in a process of its own: starts tasks, repeats lost ones, and sends back the results.

Ray can repeat a task by itself, but reports neither that nor where a task runs, and waits without end for a worker on
a host that lost its connection. So Ray is asked for each attempt, and each writes its node into a file.
"""

import contextlib
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import colossal_llama2
from colossal_llama2 import logs
from colossal_llama2.dataset.layout.store import temporary_beside
from colossal_llama2.dataset.write.local_workers import JOIN_SECONDS, TASKS_AHEAD, begin_worker
from colossal_llama2.dataset.write.ray_node import Expected, claimed_by, run_on_node
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted, some

if TYPE_CHECKING:
    import psutil

# The timeout also limits how long Ray waits for a host to acknowledge what it was sent. By default that is two minutes,
# in which a task that was offered to a host without connection goes to no other node.
RAY_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_grpc_client_keepalive_timeout_ms": "20000"}
# Independent of where this file is in the package.
PACKAGE = Path(colossal_llama2.__file__).resolve().parent
# If a task is lost more often, it kills its workers itself.
MAX_RETRIES = 10
# Ray's minimum is 75 MiB. Tasks do not use the object store: their output is in files.
OBJECT_STORE_BYTES = 100 << 20
# Between two looks at the nodes. The command hears from the driver as often.
LOOK_SECONDS = 2.0
# How long tasks wait for a node with cores: at first, when a cluster may be growing, and after all nodes were lost.
FIRST_CORES_SECONDS = 600.0
LOST_CORES_SECONDS = 60.0
WARN_CORES_SECONDS = 10.0
# After a node was lost, a task that no other node has begun for so long may have been on its way to it. NFS may show a
# new file to other machines only a minute later.
DOUBT_SECONDS = 90.0
GO_ON = "run the same command again, and it continues where it stopped"


class Request(NamedTuple):
    """A task from the command: `function(task)`, on a node with `expected`."""

    function: Callable
    task: Any
    expected: Expected


class Report(NamedTuple):
    """The driver's message to the command.

    Attributes:
        slots: the number of tasks that the driver accepts at a time.
        result: of the task that has ended; an exception ends the run.
        node: where it ran; empty if no task has ended.
        warnings: for the log.
    """

    slots: int
    result: Any = None
    node: str = ""
    warnings: tuple[str, ...] = ()


def drive(connection: Connection, address: str | None, num_workers: int) -> None:
    """Connect to Ray, and do tasks until the command closes the connection."""
    os.setsid()  # identifies the processes that Ray starts
    begin_worker(before_end=partial(kill_session, os.getpid()))
    silent = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(silent, descriptor)
    for name, value in RAY_VARIABLES.items():
        os.environ.setdefault(name, value)
    if address is None:
        # Without a token, Ray runs any code that is sent to its ports.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    tasks: _Tasks | None = None
    try:
        connect(ray, address, num_workers)
        tasks = _Tasks(ray, connection)
        tasks.serve()
    except EOFError:  # the command is done
        pass
    except Exception as error:
        # The folders may be removed now, so no worker may write to them any more. A lost head node does not answer.
        if tasks is not None:
            canceling = threading.Thread(target=tasks.cancel, daemon=True)
            canceling.start()
            canceling.join(2 * JOIN_SECONDS)
        is_expected = isinstance(error, (UserError, RunError, OSError))
        connection.send(Report(0, error if is_expected else RuntimeError(traceback.format_exc())))
    finally:
        ray.shutdown()


def connect(ray: ModuleType, address: str | None, num_workers: int) -> None:
    """Start Ray here, or connect to a cluster. Raises RunError or UserError."""
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
        text = " ".join(str(error).split())
        if address is None:
            raise RunError(f"--executor ray: Ray does not start on this machine ({text}); {GO_ON}")
        if text.startswith("Version mismatch"):
            raise UserError(
                f"--ray_address {address}: {text}; install the same Python and requirements-ray.txt on all nodes"
            )
        raise UserError(no_cluster(address, text))


def no_cluster(address: str, reason: str) -> str:
    """The message for an address without a cluster."""
    return (
        f"--ray_address {address}: no Ray cluster answers there ({reason}); start one with `ray start --head`, join "
        "this machine to it with `ray start --address HOST:PORT`, or leave the flag out"
    )


@dataclass(eq=False)
class _Task:
    """A task with its current attempt.

    Attributes:
        reference: Ray's name of the attempt.
        claim: the file in which the attempt names its node.
        doubtful_since: when a node was lost that may have it.
        lost: how many attempts were lost.
        error: what the task raised; it stays in the list until those before it have ended.
    """

    request: Request
    reference: Any = None
    claim: Path = Path()
    doubtful_since: float | None = None
    lost: int = 0
    error: Exception | None = None


class _Tasks:
    """The tasks that the driver has accepted, in their order."""

    def __init__(self, ray: ModuleType, connection: Connection) -> None:
        self._ray, self._connection = ray, connection
        self._running: list[_Task] = []
        self._lost: list[str] = []
        # Whether a task was lost, and no node since.
        self._is_loss_unexplained = False
        # No retries by Ray, so that each loss is reported.
        self._remote = ray.remote(num_cpus=1, max_retries=0)(run_on_node)
        self._nodes = _Nodes(ray)
        self._next_look = 0.0

    def serve(self) -> None:
        """Do what the command sends. Raises the error of the first task, in order, that failed, or EOFError."""
        self._look()
        while True:
            if self._running and self._running[0].error is not None:
                raise self._running[0].error
            self._accept()
            # With a time limit, since a node that loses its connection is noticed only by looking.
            waiting = {task.reference: task for task in self._running if task.error is None}
            done, _ = self._ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
            for reference in done:
                self._finish(waiting[reference])
            if time.monotonic() >= self._next_look:
                self._look()

    def cancel(self) -> None:
        """Stop the workers that run tasks, and wait until they have ended."""
        references = [task.reference for task in self._running if task.error is None]
        for reference in references:
            self._ray.cancel(reference, force=True)
        if references:
            self._ray.wait(references, num_returns=len(references), timeout=JOIN_SECONDS)

    def _accept(self) -> None:
        """Start tasks that have arrived; wait for one if none is running. After an error, none is started."""
        while not self._running or (self._connection.poll() and all(task.error is None for task in self._running)):
            task = _Task(self._connection.recv())
            self._running.append(task)
            self._start(task)

    def _start(self, task: _Task) -> None:
        function, data, _ = task.request
        task.claim, task.doubtful_since = temporary_beside(Path(data.cache_dir, f"{data.name}.node")), None
        task.reference = self._remote.options(name=function.__name__).remote(*task.request, task.claim)

    def _unclaim(self, task: _Task) -> None:
        with contextlib.suppress(OSError):
            task.claim.unlink(missing_ok=True)

    def _finish(self, task: _Task) -> None:
        """Send the result of a task, remember its error, or start it again if it was lost."""
        try:
            node, result = self._ray.get(task.reference)
        except self._ray.exceptions.RayTaskError as error:
            is_expected = isinstance(error.cause, (UserError, RunError, OSError))
            task.error = error.cause if is_expected else RuntimeError(str(error))
            self._unclaim(task)
        except self._ray.exceptions.RayError as error:
            text = " ".join(str(error).split())
            if self._is_final(error):
                task.error = RunError(f"Ray cannot run {task.request.task.name} ({text}); {GO_ON}")
                self._unclaim(task)
            else:
                self._repeat(task, text)
        else:
            self._unclaim(task)
            self._running.remove(task)
            if self._is_loss_unexplained and not self._running:
                # There may be no other look: the command may have no more tasks.
                self._look()
            self._connection.send(Report(self._nodes.slots, result, node))

    def _is_final(self, error: Exception) -> bool:
        """Whether each further attempt would fail as well, since no worker or node was lost."""
        kinds = self._ray.exceptions
        return isinstance(error, (kinds.AuthenticationError, kinds.RuntimeEnvSetupError, kinds.TaskUnschedulableError))

    def _repeat(self, task: _Task, reason: str, *, waits: bool = True) -> None:
        """Start a task again, or give up.

        Args:
            waits: whether to wait before, if it was lost more than once.
        """
        self._unclaim(task)
        self._is_loss_unexplained = True
        task.lost += 1
        if task.lost > MAX_RETRIES:
            task.error = RunError(f"Ray has lost {task.request.task.name} {task.lost} times ({reason}); {GO_ON}")
            return
        self._lost.append(task.request.task.name)
        # Such as after a lack of memory, which takes time to end. The first time, another node can start at once.
        if waits:
            time.sleep(min(task.lost - 1, LOOK_SECONDS))
        self._start(task)

    def _look(self) -> None:
        """Look at the nodes, and report what was lost. The command also hears in this way that the driver lives."""
        lost = self._nodes.look(bool(self._running))
        self._repeat_lost(is_new=bool(lost))
        self._is_loss_unexplained &= not lost
        nodes = tuple(f"the Ray node {node} is lost" for node in lost)
        warnings = nodes + self._losses() + self._nodes.take_warnings()
        self._connection.send(Report(self._nodes.slots, warnings=warnings))
        self._next_look = time.monotonic() + LOOK_SECONDS

    def _repeat_lost(self, *, is_new: bool) -> None:
        """Repeat the tasks of lost nodes. Those of a killed process end with an error, but others never end."""
        now = time.monotonic()
        running = [task for task in self._running if task.error is None]
        if is_new:
            for task in running:
                if task.doubtful_since is None:
                    task.doubtful_since = now
        doubtful = [task for task in running if task.doubtful_since is not None]
        claims = _existing(task.claim for task in doubtful)
        for task in doubtful:
            assert task.doubtful_since is not None
            node = claimed_by(task.claim) if task.claim in claims else None
            if node in self._nodes.lost:
                # One after the other, they would keep the command waiting.
                self._repeat(task, "its node is lost", waits=False)
            elif node is not None:
                task.doubtful_since = None
            elif now - task.doubtful_since > DOUBT_SECONDS:
                # It may also be waiting for a core. Then nothing is lost, and it must not be done twice.
                self._ray.cancel(task.reference)
                self._unclaim(task)
                self._start(task)

    def _losses(self) -> tuple[str, ...]:
        """A warning about the tasks that were lost since the last one."""
        lost, self._lost = self._lost, []
        if not lost:
            return ()
        return (
            f"{counted(len(lost), 'task')} lost with a worker or node of Ray, done again: {some(sorted(set(lost)))}",
        )


class _Nodes:
    """The nodes of the cluster.

    Attributes:
        slots: the number of tasks that the cluster may have at a time: some for each core of the living nodes.
        lost: the ids of nodes that were lost.
    """

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._alive: dict[str, str] = {}
        self._has_had_cores = False
        self._without_cores_since: float | None = None
        self._has_warned = False
        self._warnings: list[str] = []
        self.slots = TASKS_AHEAD
        self.lost: set[str] = set()

    def look(self, is_busy: bool) -> list[str]:
        """Names of the nodes that were lost since the last look. Raises RunError if no node can do a task."""
        try:
            nodes = self._ray.nodes()
        except Exception as error:
            raise RunError(f"Ray's head node does not answer ({' '.join(str(error).split())}); {GO_ON}")
        lost, cores = [], 0
        for node in nodes:
            if node["Alive"]:
                self._alive[node["NodeID"]] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                cores += int(node["Resources"].get("CPU", 0))
            elif node["NodeID"] in self._alive:
                self.lost.add(node["NodeID"])
                lost.append(self._alive.pop(node["NodeID"]))
        self.slots = TASKS_AHEAD * max(cores, 1)
        self._check_cores(cores, is_busy)
        return lost

    def take_warnings(self) -> tuple[str, ...]:
        """The warnings since the last call."""
        warnings, self._warnings = self._warnings, []
        return tuple(warnings)

    def _check_cores(self, cores: int, is_busy: bool) -> None:
        if cores or not is_busy:
            self._has_had_cores |= cores > 0
            self._without_cores_since, self._has_warned = None, False
            return
        now = time.monotonic()
        if self._without_cores_since is None:
            self._without_cores_since = now
        limit = LOST_CORES_SECONDS if self._has_had_cores else FIRST_CORES_SECONDS
        waited = now - self._without_cores_since
        if waited > limit:
            raise RunError(f"the Ray cluster has had no node with a core for {limit:g} s; start nodes, and {GO_ON}")
        if waited >= WARN_CORES_SECONDS and not self._has_warned:
            self._has_warned = True
            self._warnings.append(f"the Ray cluster has no node with a core; start nodes within {limit:g} s")


def _existing(paths: Iterable[Path]) -> set[Path]:
    """Those of the files that exist. Only lists their folders: NFS remembers that a file was missing for a minute."""
    wanted = set(paths)
    found: set[Path] = set()
    for folder in {path.parent for path in wanted}:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            found |= {folder / entry.name for entry in entries}
    return wanted & found


def kill_session(leader: int) -> None:
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
