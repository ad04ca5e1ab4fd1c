"""Detect dead ranks: each rank keeps a connection to rank 0, which the system closes when a process dies.

The launcher and the network library report a dead rank late, or without its number. There is no heartbeat, so a busy
rank is never mistaken for a dead one. A rank that hangs is detected by the network's timeout.

Ranks connect before anything else (meeting.py): in PyTorch's own rendezvous a rank would wait for a dead one until the
timeout. Under torchrun they also hold a connection to its store, which ends with the torchrun of rank 0's host.
"""

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.cluster.hostfile import is_loopback
from colossal_llama2.engine.ranks import collectives, interfaces, meeting, torchrun_store
from colossal_llama2.engine.ranks.meeting import HELLO, REFUSED, WELCOME, Line, NoRoute
from colossal_llama2.engine.ranks.torchrun_store import Store, StoreError
from colossal_llama2.errors import LaunchError, RankError, RunError, Stopped
from colossal_llama2.launcher import RESTART_COUNT, Place, place
from colossal_llama2.plurals import some
from colossal_llama2.terminal_text import report_line

# How long a rank whose network failed waits for the number of the dead rank, and how long a rank waits for its own
# error after it was notified of another rank's.
VERDICT_SECONDS = 5.0
# How long a rank that fails at the start keeps trying to reach rank 0, to report its error.
REPORT_SECONDS = 1.0
# When a rank first logs that it is waiting for others, and how often after that.
SILENT_SECONDS, REMIND_SECONDS = 5.0, 30.0
LOOK_SECONDS = 0.2
# How often a rank that waits looks into torchrun's store.
STORE_SECONDS = 1.0
FINISHED, FAILED, STOPPED = "bye", "failed", "stopped"
ALL_CONNECTED, LOST = "met", "lost"
MAX_REASON = 400
MAX_NAMED = 8
# gloo's messages for a rank that did not answer in time, and for every collective after that. NCCL aborts the process.
TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")


@contextmanager
def watching(
    command: str, *, timeout_seconds: float, before_end: Callable[[], None] = lambda: None
) -> Iterator["Watch"]:
    """End this process with one line when another rank's process dies inside the `with`. Called on all ranks.

    Args:
        timeout_seconds: how long to wait for ranks that start later.
        before_end: called before this process ends for that reason.

    Raises:
        LaunchError: the ranks cannot connect.
        RunError: another rank did not answer for `timeout_seconds`.
    """
    watch = Watch(command, place(), timeout_seconds, before_end)
    ending = FAILED
    try:
        watch.begin()
        yield watch
        ending = FINISHED
    except Stopped:
        ending = FINISHED if watch.is_settled else STOPPED
        raise
    except RuntimeError as error:
        if place().world_size == 1:
            raise
        if is_timeout(error):
            # Rank 0 may be the one that hangs.
            raise (RankError if place().rank == 1 else RunError)(
                f"another rank did not answer {socket.gethostname()} for --dist_timeout {timeout_seconds:g} s: it "
                f"hangs or needs more time; earlier checkpoints are complete, continue with --resume auto"
            )
        # Most likely the network's error about a dead rank, whose number arrives over our own connection.
        time.sleep(VERDICT_SECONDS)
        raise
    except Exception as error:
        ending = f"{FAILED} {' '.join(str(error).split())[:MAX_REASON]}"
        raise
    finally:
        watch.leave(ending)


def is_timeout(error: BaseException | None) -> bool:
    """Whether this error, or one that caused it, is gloo's timeout while waiting for a rank."""
    while error is not None:
        if any(words in str(error) for words in TIMED_OUT):
            return True
        error = error.__cause__ or error.__context__
    return False


class Watch:
    """This rank's end of the connection to rank 0; on rank 0, of all connections. Does nothing with a single rank."""

    def __init__(self, command: str, here: Place, timeout_seconds: float, before_end: Callable[[], None]):
        self._command, self._here, self._timeout, self._before_end = command, here, timeout_seconds, before_end
        self._lines: dict[int, Line] = {}
        self._hosts: dict[int, str] = {here.rank: socket.gethostname()}
        self._problem: Exception | None = None
        self._all_are_here, self._is_linked = threading.Event(), threading.Event()
        self._is_calling = self._is_leaving = self._gives_up = self.is_settled = self._awaits_itself = False
        self._lines_are_awaited = False
        self._own_name = f"{socket.gethostname()}/{secrets.token_hex(8)}"
        self._next_reminder = time.monotonic() + SILENT_SECONDS
        # The address of a rank on another host, if there is one.
        self._far_address: str | None = None
        # Under torchrun.
        self._store: Store | None = None
        self._attempt: int | None = None
        self._next_look = 0.0

    def begin(self) -> None:
        """Start connecting to the others. Raises LaunchError if rank 0 cannot be reached."""
        if self._here.world_size == 1:
            return
        if self._here.uses_agent_store:
            # With a version of PyTorch whose store is unknown, `reach_out` connects.
            with suppress(StoreError):
                self._connect_through(torchrun_store.connect(attempt_seconds=meeting.ATTEMPT_SECONDS))
            return
        if self._here.rank > 0:
            self._is_calling = True
            self._start(self._connect_by_hand)
            return
        listener = meeting.listen_as_given(backlog=self._here.world_size)
        # The other ranks may all connect before this one has reached itself.
        self._awaits_itself = self._lines_are_awaited = True
        self._start(self._run, listener, meeting.KNOWN_SECRET)
        self._check_own_address()

    def reach_out(self) -> None:
        """Start connecting to the others if `begin` could not. Imports PyTorch in that case."""
        if self._here.world_size == 1 or not self._here.uses_agent_store or self._store is not None:
            return
        # Errors here are reported once the ranks are connected.
        with suppress(RuntimeError, ValueError, OSError, StoreError):
            self._connect_through(torchrun_store.connect_with_torch(timeout_seconds=self._timeout))

    def wait(self) -> None:
        """Wait until all ranks have connected. Rank 0 then stops listening.

        Under torchrun it also returns if there is no route between two ranks, so that they cannot notice a death.

        Raises:
            LaunchError: they did not connect in time, or belong to different jobs.
        """
        if self._here.world_size == 1:
            return
        # Rank 0 gives up first, and reports the ranks that are missing.
        deadline = time.monotonic() + self._timeout + (VERDICT_SECONDS if self._here.rank else 0)
        while not self._all_are_here.wait(LOOK_SECONDS):
            if self._here.uses_agent_store and not self._may_meet():
                self._gives_up = True
                break
            if self._problem is None and time.monotonic() > deadline:
                self._problem = self._too_late()
            if self._problem is not None:
                raise self._problem
            if self._here.rank == 0:
                self._remind(f"waiting for {self._missing()}")
        if self._attempt is not None:
            # PyTorch's keys in torchrun's store begin with this number. torchrun's own may differ between hosts, or
            # repeat, after a host has left and another has joined.
            os.environ[RESTART_COUNT] = str(self._attempt)
        if self._far_address is not None or self._gives_up:
            hosts = [meeting.given_address().host, self._far_address]
            interfaces.use_route_to([host for host in hosts if host])

    def _too_late(self) -> LaunchError:
        address = meeting.given_address()
        cure = "start all ranks"
        if not self._here.uses_agent_store:
            cure += ", or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT to run without a launcher"
        return LaunchError(
            f"{self._missing()} did not connect to MASTER_ADDR={address.host} MASTER_PORT={address.port} "
            f"within --dist_timeout {self._timeout:g} s; {cure}"
        )

    def _may_meet(self) -> bool:
        """Under torchrun: False if a rank has no route to rank 0. Notices that torchrun on rank 0's host has ended."""
        if self._store is None:
            return False
        if time.monotonic() < self._next_look:
            return True
        self._next_look = time.monotonic() + STORE_SECONDS
        try:
            if not self._store.is_open():
                raise StoreError("it closed the connection")
            return self._attempt is None or not meeting.has_no_route(self._store, self._attempt)
        except (StoreError, RuntimeError) as error:
            # The other ranks' own reports arrive first.
            self._problem = self._problem or LaunchError(
                f"torchrun at MASTER_ADDR={meeting.given_address().host} has ended ({error}); "
                f"nothing was trained, start again"
            )
            return True

    def settle(self) -> None:
        """Called on all ranks once they are connected. From now on there may be checkpoints of this run."""
        if self._here.world_size == 1:
            return
        self._gives_up = True
        facts = [self._all_are_here.is_set(), socket.gethostname(), os.environ.get(interfaces.GLOO)]
        gathered = collectives.gather_values(facts)
        self.is_settled = True
        if not all(is_here for is_here, *_ in gathered):
            # Without a route between two hosts, training continues; the log has a warning.
            logs.get_logger().warning(
                "Ranks cannot monitor each other: %s did not connect to rank 0; a dead rank is detected only after "
                "--dist_timeout",
                self._missing(),
            )
        used = {host: interface for _, host, interface in gathered if interface}
        if len({host for _, host, _ in gathered}) > 1 and used:
            named = ", ".join(f"{interface} on {host}" for host, interface in used.items())
            logs.get_logger().info("Network interfaces for gloo (%s): %s", interfaces.GLOO, named)

    def leave(self, ending: str) -> None:
        """Notify the other ranks that this rank ends, and how."""
        self._is_leaving = True
        if ending != FINISHED and self._is_calling:
            self._is_linked.wait(REPORT_SECONDS)
        elif ending != FINISHED and self._lines_are_awaited:
            # Ranks that connect later would wait for this one.
            self._all_are_here.wait(REPORT_SECONDS)
        self._send_to_all(ending)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=work, args=args, daemon=True).start()

    def _missing(self) -> str:
        missing = [str(rank) for rank in range(self._here.world_size) if rank not in self._hosts]
        if not missing or self._here.rank > 0:
            return "other ranks"
        return f"rank{'s' if len(missing) > 1 else ''} {some(missing, MAX_NAMED)} of {self._here.world_size}"

    def _remind(self, text: str) -> None:
        if time.monotonic() > self._next_reminder:
            self._next_reminder = time.monotonic() + REMIND_SECONDS
            report_line(f"{self._command}: rank {self._here.rank}: {text}")

    # On ranks other than 0.

    def _connect_by_hand(self) -> None:
        """Connect to rank 0 at MASTER_PORT."""
        address = meeting.given_address()

        def on_retry(reason: str) -> None:
            self._remind(f"waiting for rank 0 at {address.host}:{address.port} ({reason})")

        try:
            self._connect_to_first(address, seconds=self._timeout, on_retry=on_retry)
        except Exception as error:  # raised by `wait`, in the main thread
            self._problem = error
            self._is_linked.set()

    def _connect_through(self, store: Store) -> None:
        """Under torchrun: rank 0 listens and stores where; the other ranks start to connect. Raises StoreError."""
        if self._here.rank > 0:
            self._store, self._is_calling = store, True
            self._start(self._connect_to_published, store)
            return
        listener = meeting.listen(0, backlog=self._here.world_size)
        published = meeting.publish(store, listener.getsockname()[1])
        self._store, self._attempt = store, published.attempt
        self._lines_are_awaited = True
        self._start(self._run, listener, published.secret)

    def _connect_to_published(self, store: Store) -> None:
        """Connect to the rank 0 of this attempt. Without a route the ranks start without a connection."""

        def on_retry(reason: str) -> None:
            self._remind(f"waiting for rank 0 at {meeting.given_address().host} ({reason})")

        until = time.monotonic() + self._timeout
        try:
            line, answer, published = meeting.introduce_through(
                store, self._here, socket.gethostname(), until=until, on_retry=on_retry
            )
            self._attempt = published.attempt
            self._keep(line, answer)
        except NoRoute as error:
            self._attempt = error.attempt
            # If the store is gone, `wait` notices it.
            with suppress(StoreError, RuntimeError):
                meeting.report_no_route(store, error.attempt)
        except Exception as error:  # raised by `wait`, in the main thread
            self._problem = error
        self._is_linked.set()

    def _connect_to_first(self, address: meeting.Address, *, seconds: float, on_retry: Callable[[str], None]) -> None:
        """Connect to rank 0 and keep the connection. Raises LaunchError if that fails in time."""
        until = time.monotonic() + seconds
        line, answer = meeting.introduce(address, self._here, socket.gethostname(), until=until, on_retry=on_retry)
        self._keep(line, answer)

    def _keep(self, line: Line, answer: str) -> None:
        """Handle rank 0's messages until the connection ends. Raises LaunchError if it refused this rank."""
        kind, _, rest = answer.partition(" ")
        if kind == REFUSED:
            raise LaunchError(rest)
        self._hosts[0], line.rank, self._lines[0] = rest, 0, line
        meeting.keep_alive(line.connection)
        self._is_linked.set()
        self._run(None, "")

    # On rank 0.

    def _check_own_address(self) -> None:
        """Check that MASTER_ADDR resolves to this process. Raises LaunchError."""
        address = meeting.given_address()
        # A service's name, as in Kubernetes, may resolve only seconds after its process has started.
        until = time.monotonic() + meeting.UNREACHABLE_SECONDS
        line, answer = meeting.introduce(address, self._here, self._own_name, until=until, on_retry=lambda reason: None)
        line.connection.close()
        if not answer.startswith(WELCOME):
            raise LaunchError(answer.partition(" ")[2])

    def _identify(self, line: Line, text: str, secret: str) -> bool:
        """Identify a caller. Returns False if it is not a rank of this job; the connection is then closed."""
        words = text.split()
        is_rank = len(words) == 5 and words[:2] == [HELLO, secret] and words[2].isdecimal() and words[3].isdecimal()
        if not is_rank:
            return False
        rank, size, host = int(words[2]), int(words[3]), words[4].partition("/")[0]
        if words[4] == self._own_name:
            line.send(f"{WELCOME} {socket.gethostname()}")
            self._awaits_itself = False
        elif size != self._here.world_size:
            self._refuse(line, f"rank {rank} on {host} has WORLD_SIZE={size}, rank 0 has {self._here.world_size}")
        elif rank in self._hosts:
            self._refuse(line, f"two processes have RANK={rank}, on {self._hosts[rank]} and on {host}")
        else:
            meeting.keep_alive(line.connection)
            line.rank, self._hosts[rank], self._lines[rank] = rank, host, line
            line.send(f"{WELCOME} {socket.gethostname()}")
        return True

    def _refuse(self, line: Line, reason: str) -> None:
        self._problem = LaunchError(f"{reason}; correct these variables in all processes, or start with torchrun")
        line.send(f"{REFUSED} {self._problem}")

    # On all ranks.

    def _run(self, listener: socket.socket | None, secret: str) -> None:
        """Handle all messages, and detect a connection that ends without announcing it."""
        with selectors.DefaultSelector() as selector:
            if listener:
                selector.register(listener, selectors.EVENT_READ)
            for line in self._lines.values():
                selector.register(line.connection, selectors.EVENT_READ, line)
                for text in line.waiting:
                    self._handle(line, text)
            while selector.get_map():
                for key, _ in selector.select(LOOK_SECONDS if listener else None):
                    if key.fileobj is listener:
                        with suppress(OSError):
                            caller = listener.accept()[0]
                            selector.register(caller, selectors.EVENT_READ, Line(caller))
                    else:
                        self._receive(selector, key.data, secret)
                all_are_here = len(self._lines) == self._here.world_size - 1 and not self._awaits_itself
                if listener and (self._gives_up or all_are_here):
                    self._stop_listening(selector, listener)
                    listener = None

    def _stop_listening(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        lines: list[Line] = [key.data for key in selector.get_map().values() if key.data]
        strangers = [line.connection for line in lines if line.rank is None]
        for connection in (listener, *strangers):
            selector.unregister(connection)
            connection.close()
        if not self._gives_up:
            self._far_address = self._address_on_another_host()
            self._send_to_all(f"{ALL_CONNECTED} {self._far_address or ''}")
            self._all_are_here.set()

    def _address_on_another_host(self) -> str | None:
        """The address from which a rank on another host has connected; None if all are on this host."""
        for line in tuple(self._lines.values()):
            with suppress(OSError):
                far, near = line.connection.getpeername()[0], line.connection.getsockname()[0]
                if far != near and not is_loopback(far):
                    return far.removeprefix("::ffff:")
        return None

    def _receive(self, selector: selectors.BaseSelector, line: Line, secret: str) -> None:
        texts = line.read()
        is_over = texts is None
        for text in texts or ():
            if line.rank is not None:
                self._handle(line, text)
            elif not self._identify(line, text, secret):
                is_over = True
                break
        if is_over:
            selector.unregister(line.connection)
            line.connection.close()
            if line.rank is not None and not line.has_left:
                self._end(line.rank, "died")

    def _handle(self, line: Line, text: str) -> None:
        kind, _, rest = text.partition(" ")
        if kind == ALL_CONNECTED:
            self._far_address = rest or None
            self._all_are_here.set()
        elif kind == LOST:
            lost, _, what = rest.partition(" ")
            self._end(int(lost), what)
        else:
            # That rank ends by itself, and has reported why, unless it assumed that all ranks have the same error.
            line.has_left = True
            if kind == STOPPED or kind == FAILED:
                what = f"{kind}: {rest}" if rest else kind
                threading.Timer(VERDICT_SECONDS, self._end, (line.rank, what)).start()

    def _end(self, lost: int, what: str) -> None:
        if self._is_leaving:
            return
        self._send_to_all(f"{LOST} {lost} {what}")
        # Rank 0 reports it, or rank 1 if rank 0 is lost.
        if self._here.rank == (0 if lost else 1):
            what = what.partition(":")[0] if self.is_settled else what
            then = "earlier checkpoints are complete, continue with --resume auto"
            then = then if self.is_settled else "nothing was trained, start again"
            report_line(f"{self._command}: error: rank {lost} on {self._hosts.get(lost)} {what}; {then}")
        self._before_end()
        os._exit(1)

    def _send_to_all(self, text: str) -> None:
        for line in tuple(self._lines.values()):
            line.send(text)
