"""How the ranks of a job find each other before PyTorch is imported: each rank connects to rank 0.

    by hand, srun, mpirun    rank 0 listens on MASTER_PORT until all have connected, then PyTorch uses the port
    torchrun                 torchrun listens on MASTER_PORT; rank 0 stores its own port there, with a secret

Ranks exchange lines of text: first `hello SECRET RANK WORLD_SIZE HOST`, which rank 0 answers with `welcome HOST`, or
with `no` and a reason. When all have connected, rank 0 sends `met ADDRESS`, the address of a rank on another host, if
there is one.

torchrun's store lives longer than the processes that it starts again after a failure, so it may hold the port of a
dead rank 0. Each new rank 0 overwrites it and counts the attempt; other ranks read it until they reach a live one.
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from colossal_llama2 import launcher, logs
from colossal_llama2.engine.ranks.torchrun_store import Store
from colossal_llama2.errors import LaunchError
from colossal_llama2.launcher import REQUIRED, Place

HELLO, WELCOME, REFUSED = "hello", "welcome", "no"
MAX_LINE = 4096
# Ranks that are started by hand share no secret, so this constant only identifies the program.
KNOWN_SECRET = "colossal_llama2"
KEY = "colossal_llama2"
# How long a rank retries an unreachable host, or waits for an answer on the port that should be rank 0's.
UNREACHABLE_SECONDS = 10.0
ATTEMPT_SECONDS = 5.0
# How long a rank under torchrun tries a port that refuses connections, until it assumes that there is no route.
REFUSED_SECONDS = 30.0
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


class Published(NamedTuple):
    """What rank 0 stores under torchrun: its port and secret, and how many rank 0s there have been so far."""

    port: int
    secret: str
    attempt: int

    @property
    def address(self) -> Address:
        """Where rank 0 listens."""
        return Address(given_address().host, self.port, self.secret)


class NoRoute(LaunchError):
    """Rank 0 of this attempt cannot be reached, though torchrun's store can."""

    def __init__(self, message: str, attempt: int):
        super().__init__(message)
        self.attempt = attempt


def publish(store: Store, port: int) -> Published:
    """Store where rank 0 listens. Raises StoreError."""
    published = Published(port, secrets.token_hex(8), store.add(_key("attempts"), 1))
    store.set(_key("rank-0"), json.dumps(published).encode())
    return published


def published(store: Store) -> Published | None:
    """What the last rank 0 stored; None if there was none yet. Raises StoreError, and ValueError for anything else."""
    content = store.get(_key("rank-0"))
    if content is None:
        return None
    port, secret, attempt = json.loads(content)
    return Published(int(port), str(secret), int(attempt))


def report_no_route(store: Store, attempt: int) -> None:
    """Store that a rank of this attempt cannot reach rank 0. Raises StoreError."""
    store.set(_key(f"no-route/{attempt}"), b"1")


def has_no_route(store: Store, attempt: int) -> bool:
    """Whether a rank of this attempt cannot reach rank 0. Raises StoreError."""
    return store.get(_key(f"no-route/{attempt}")) is not None


def _key(name: str) -> str:
    # Several jobs may share a store.
    return f"{KEY}/{os.environ.get(launcher.TORCHRUN_ID, '')}/{name}"


def introduce_through(
    store: Store, here: Place, name: str, *, until: float, on_retry: Callable[[str], None]
) -> tuple[Line, str, Published]:
    """`introduce` to the rank 0 that is stored, which may be a dead one of an earlier attempt at first.

    Returns:
        The connection, rank 0's answer, and what it stored.

    Raises:
        NoRoute: rank 0 cannot be reached.
        LaunchError: it did not start.
        StoreError: the store does not answer.
    """
    tried: Published | None = None
    give_up_at = until
    while True:
        found = published(store)
        if found is not None:
            if found != tried:
                tried, give_up_at = found, min(until, time.monotonic() + REFUSED_SECONDS)
            try:
                line, answer = introduce(found.address, here, name, until=0.0, on_retry=on_retry)
                return line, answer, found
            except LaunchError as error:
                if time.monotonic() > give_up_at:
                    raise NoRoute(str(error), found.attempt)
        elif time.monotonic() > until:
            raise LaunchError("rank 0 did not start; start all ranks at the same time")
        on_retry("it has not started")
        time.sleep(RETRY_SECONDS)


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
