"""Whether the other ranks live: a connection of each rank to rank 0, which the system closes when a process dies.

What the launcher or the network library tells of a dead rank comes late, or without its number. This needs no pulse,
so a rank that is busy for long is never taken for dead; one that hangs is found by the time limit of the network.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import Callable, Dict, Iterator

from colossal_llama2 import logs
from colossal_llama2.errors import RankError, RunError, Stopped
from colossal_llama2.terminal_text import show_line
from colossal_llama2.train.engine import exchange

CONNECT_SECONDS = 30.0
# How long a rank whose network failed waits to hear which rank is dead, and one that hears of an error to meet it too.
VERDICT_SECONDS = 5.0
GOODBYE, FAILED = b"bye\n", b"failed\n"
# gloo's words for a rank that did not answer in time; NCCL ends the process itself.
TIMED_OUT = "Timed out waiting"


@contextmanager
def watching(
    command: str, *, timeout_seconds: float, before_end: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """End this process with one line when another rank's process dies inside the `with`. Called on all ranks.

    Args:
        before_end: called before this process ends so.

    Raises:
        RunError: another rank did not answer for `timeout_seconds`.
    """
    rank, ranks = exchange.place()
    if ranks == 1:
        yield
        return
    hosts = dict(enumerate(exchange.gather_values(socket.gethostname())))
    watch = _Watch(command, rank, hosts, _connect(rank, ranks), before_end)
    threading.Thread(target=watch.run, daemon=True).start()
    farewell = FAILED
    try:
        yield
        farewell = GOODBYE
    except Stopped:
        farewell = GOODBYE
        raise
    except RuntimeError as error:
        if TIMED_OUT in str(error):
            # Rank 0 may be the one that hangs.
            raise (RankError if rank == 1 else RunError)(
                f"another rank did not answer {hosts[rank]} for --dist_timeout {timeout_seconds:g} s, so it hangs, or "
                f"needs more time; earlier checkpoints are whole, go on with --resume auto"
            )
        # Most likely the network's complaint about a rank that died, whose number comes by the other way.
        time.sleep(VERDICT_SECONDS)
        raise
    finally:
        watch.leave(farewell)


class _Watch:
    """One end or, on rank 0, all ends of the connections."""

    def __init__(
        self,
        command: str,
        rank: int,
        hosts: Dict[int, str],
        connections: Dict[int, socket.socket],
        before_end: Callable[[], None],
    ):
        self._command, self._rank, self._hosts, self._connections = command, rank, hosts, connections
        self._before_end, self._is_leaving = before_end, False

    def leave(self, farewell: bytes) -> None:
        """Tell the others that this rank ends, and how."""
        self._is_leaving = True
        self._tell(farewell)

    def run(self) -> None:
        """Wait for the end of a connection that nobody announced."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    text = _receive(key.fileobj)
                    if text.startswith((GOODBYE, FAILED)):
                        selector.unregister(key.fileobj)
                        if text.startswith(FAILED):
                            threading.Timer(VERDICT_SECONDS, self._end, (key.data, "failed")).start()
                    elif text.strip().isdigit():
                        self._end(int(text), "died")
                    else:
                        selector.unregister(key.fileobj)
                        self._end(key.data, "died")

    def _end(self, lost: int, what: str) -> None:
        if self._is_leaving:
            return
        self._tell(f"{lost}\n".encode())
        # Rank 0 tells it, or if that is lost, rank 1.
        if self._rank == (0 if lost else 1):
            show_line(
                f"{self._command}: error: rank {lost} on {self._hosts[lost]} {what}; earlier checkpoints are whole, "
                f"go on with --resume auto",
                file=sys.stderr,
            )
        self._before_end()
        os._exit(1)

    def _tell(self, text: bytes) -> None:
        for connection in self._connections.values():
            # If that rank is gone, its own connection tells.
            with suppress(OSError):
                connection.sendall(text)


def _receive(connection: socket.socket) -> bytes:
    """What the other end says, nothing if it is gone."""
    try:
        return connection.recv(64)
    except OSError:
        return b""


def _connect(rank: int, ranks: int) -> Dict[int, socket.socket]:
    """Connect each rank with rank 0, by number. If there is no way between two hosts, it is said and left at that."""
    listener = socket.create_server(("", 0), backlog=ranks) if rank == 0 else None
    port = listener.getsockname()[1] if listener else 0
    port, secret = exchange.first_rank_value([port, secrets.token_hex(8)])
    connections: Dict[int, socket.socket] = {}
    try:
        if listener:
            _accept(listener, ranks - 1, secret, into=connections)
        else:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=CONNECT_SECONDS)
            connection.sendall(f"{secret} {rank}".encode())
            connections[0] = _lasting(connection)
    except OSError as error:
        logs.get_logger().warning("Ranks cannot watch each other (%s); a dead one is noticed by --dist_timeout", error)
    finally:
        if listener:
            listener.close()
    return connections


def _accept(listener: socket.socket, count: int, secret: str, *, into: Dict[int, socket.socket]) -> None:
    """Wait for the ranks from 1 to `count`. Whoever else connects, and says something else or nothing, is ignored."""
    deadline = time.monotonic() + CONNECT_SECONDS
    ranks = {str(rank) for rank in range(1, count + 1)}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(into) < count and time.monotonic() < deadline:
            for key, _ in selector.select(max(deadline - time.monotonic(), 0.01)):
                if key.fileobj is listener:
                    with suppress(OSError):
                        selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                selector.unregister(key.fileobj)
                said = _receive(key.fileobj).decode(errors="replace").split()
                if len(said) == 2 and said[0] == secret and said[1] in ranks:
                    into[int(said[1])] = _lasting(key.fileobj)
                else:
                    key.fileobj.close()
        for key in selector.get_map().values():
            if key.fileobj is not listener:
                key.fileobj.close()
    if len(into) < count:
        raise TimeoutError(f"{count - len(into)} of them did not connect within {CONNECT_SECONDS:g} s")


def _lasting(connection: socket.socket) -> socket.socket:
    """A connection without time limit, of which the system notices within seconds that the other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
