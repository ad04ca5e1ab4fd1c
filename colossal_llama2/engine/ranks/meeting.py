"""How the ranks of a job find each other before PyTorch is imported: each rank connects to rank 0.

    by hand, srun, mpirun    rank 0 listens on MASTER_PORT until all have connected, then PyTorch uses the port
    torchrun                 torchrun listens on MASTER_PORT; rank 0 stores the address of its own port there

Ranks exchange lines of text: first `hello SECRET RANK WORLD_SIZE HOST`, which rank 0 answers with `welcome HOST`, or
with `no` and a reason.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from colossal_llama2 import launcher, logs
from colossal_llama2.errors import LaunchError
from colossal_llama2.launcher import REQUIRED, Place

HELLO, WELCOME, REFUSED = "hello", "welcome", "no"
MAX_LINE = 4096
# Ranks that are started by hand share no secret, so this constant only identifies the program.
KNOWN_SECRET = "colossal_llama2"
KEY = "colossal_llama2/rank-0"
# How long a rank retries an unreachable host, or waits for an answer on the port that should be rank 0's.
UNREACHABLE_SECONDS = 10.0
ATTEMPT_SECONDS = 5.0
RETRY_SECONDS = 0.2


def settled_place() -> Place:
    """This process's place in its job. Logs what was ignored in the environment, if anything.

    Raises:
        LaunchError: the environment variables contradict each other.
    """
    here = launcher.settle()
    if here.problem:
        raise LaunchError(here.problem)
    if here.note:
        logs.get_logger().info("%s", here.note)
    return here


class Line:
    """One end of a connection that carries lines of text.

    Attributes:
        rank: the rank at the other end, None if it is unknown.
        waiting: lines that have arrived and are not handled yet.
        has_left: whether the other end has announced that it ends.
    """

    def __init__(self, connection: socket.socket, rank: int | None = None):
        self.connection, self.rank, self._rest = connection, rank, b""
        self.waiting: list[str] = []
        self.has_left = False

    def read(self) -> list[str] | None:
        """The lines that have arrived, possibly none; None at the end of the connection."""
        try:
            content = self.connection.recv(MAX_LINE)
        except OSError:
            content = b""
        *lines, self._rest = (self._rest + content).split(b"\n")
        # A rank never sends that much without a line break.
        is_over = not content or len(self._rest) >= MAX_LINE
        return None if is_over and not lines else [line.decode(errors="replace") for line in lines]

    def send(self, text: str) -> None:
        """Send a line."""
        # If the other end is gone, `read` returns None.
        with suppress(OSError):
            self.connection.sendall(f"{text}\n".encode())


class Address(NamedTuple):
    """Where rank 0 listens, and the secret that callers must send."""

    host: str
    port: int
    secret: str


def given_address() -> Address:
    """MASTER_ADDR and MASTER_PORT."""
    return Address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), KNOWN_SECRET)


def listen(port: int, *, backlog: int) -> socket.socket:
    """Listen on all interfaces, on any free port if it is 0. Raises OSError."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def listen_as_given(*, backlog: int) -> socket.socket:
    """Listen on MASTER_PORT. Raises LaunchError if it is taken."""
    address = given_address()
    try:
        return listen(address.port, backlog=backlog)
    except OSError as error:
        raise LaunchError(
            f"MASTER_PORT={address.port}: rank 0 cannot listen there on {socket.gethostname()} ({error.strerror}); "
            f"give all ranks another port, which is free"
        )


def address_through_torchrun(place: Place, own_port: int | None, *, timeout_seconds: float) -> Address:
    """Store the address of rank 0 in torchrun's store, or read it there. Raises PyTorch's errors."""
    from torch.distributed import TCPStore

    host, port, _ = given_address()
    store = TCPStore(host, port, None, False, timedelta(seconds=timeout_seconds), wait_for_workers=False)
    key = f"{KEY}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if place.rank == 0:
        store.set(key, json.dumps([own_port, secrets.token_hex(8)]))
    own_port, secret = json.loads(store.get(key))
    return Address(host, own_port, secret)


def introduce(
    address: Address, here: Place, name: str, *, until: float, on_retry: Callable[[str], None]
) -> tuple[Line, str]:
    """Connect to rank 0, identify this rank, and return the connection and rank 0's answer.

    Args:
        name: the name of this host.
        until, on_retry: as for `connect`.

    Raises:
        LaunchError: rank 0 did not listen there in time, or another program does.
    """
    strangers_until = None
    while True:
        line = Line(connect(address, until=until, on_retry=on_retry))
        strangers_until = strangers_until or time.monotonic() + UNREACHABLE_SECONDS
        line.send(f"{HELLO} {address.secret} {here.rank} {here.world_size} {name}")
        line.connection.settimeout(UNREACHABLE_SECONDS)
        answers = line.read()
        while answers == []:
            answers = line.read()
        if answers and answers[0].partition(" ")[0] in (WELCOME, REFUSED):
            line.waiting = answers[1:]
            return line, answers[0]
        line.connection.close()
        # A job that is just ending may still listen there.
        if time.monotonic() > strangers_until:
            raise LaunchError(not_rank_0(address, "another program listens there"))
        on_retry("another program listens there")
        time.sleep(RETRY_SECONDS)


def connect(address: Address, *, until: float, on_retry: Callable[[str], None]) -> socket.socket:
    """Connect to rank 0, which may start later.

    Args:
        until: by time.monotonic(), when to give up on a port on which nothing listens yet.
        on_retry: called with the reason each time that rank 0 cannot be reached.

    Raises:
        LaunchError: the host cannot be reached, or nothing listens on the port in time.
    """
    unreachable_since = None
    while True:
        try:
            return socket.create_connection((address.host, address.port), timeout=ATTEMPT_SECONDS)
        except UnicodeError:
            # No host can have this name: a label that is empty or too long.
            raise LaunchError(not_rank_0(address, "not a host name"))
        except OSError as error:
            reason = error.strerror or str(error)
            now = time.monotonic()
            # A host that refuses the connection is up.
            is_up = isinstance(error, ConnectionRefusedError)
            unreachable_since = None if is_up else unreachable_since or now
            if now > until or (unreachable_since is not None and now - unreachable_since > UNREACHABLE_SECONDS):
                raise LaunchError(not_rank_0(address, reason))
        on_retry(reason)
        time.sleep(RETRY_SECONDS)


def not_rank_0(address: Address, reason: str) -> str:
    """The message if rank 0 does not answer."""
    return (
        f"MASTER_ADDR={address.host} MASTER_PORT={address.port} does not lead to rank 0 ({reason}); give all ranks its "
        f"host and a free port there, or unset {', '.join(REQUIRED)} to run without a launcher"
    )


def keep_alive(connection: socket.socket) -> socket.socket:
    """Remove the connection's timeout, and let the system close it within seconds if the other host is gone."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection
