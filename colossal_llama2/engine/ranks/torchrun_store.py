"""torchrun's key-value store on MASTER_PORT, read and written before PyTorch is imported.

PyTorch's own client is in torch.distributed, whose import takes seconds, in which a rank could die unnoticed. This
client sends the commands that are needed, in the protocol of torch/csrc/distributed/c10d/TCPStoreBackend.hpp, which is
the same in PyTorch 2.4 to 2.8. With another protocol `connect` raises, and the caller uses PyTorch's client.
"""

import os
import selectors
import socket
import struct
import threading
from datetime import timedelta
from typing import Any

MAGIC = 0x3C85F7CE
VALIDATE, SET, GET, ADD, CHECK = 0, 1, 3, 4, 5
READY = 0
# PyTorch's client puts this before each key.
PREFIX = b"/"
MAX_VALUE = 1 << 20
ANSWER_SECONDS = 10.0
# Shows that the other end speaks this protocol: a word that is stored and read back.
GREETING = "colossal_llama2/greeting"


class StoreError(Exception):
    """The store cannot be reached, or speaks another protocol."""


class WireStore:
    """A connection to the store. Its methods may be called from any thread.

    They raise StoreError if the store does not answer.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._asking = connection, threading.Lock()
        connection.settimeout(ANSWER_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send(struct.pack("=BI", VALIDATE, MAGIC))

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        with self._asking:
            self._send(bytes([SET]) + _text(PREFIX + key.encode()) + _text(value))

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if it has none yet."""
        name = _text(PREFIX + key.encode())
        with self._asking:
            self._send(bytes([CHECK]) + struct.pack("=Q", 1) + name)
            if self._receive(1)[0] != READY:
                return None
            self._send(bytes([GET]) + name)
            (size,) = struct.unpack("=Q", self._receive(8))
            if size > MAX_VALUE:
                raise StoreError("its answer is too long")
            return self._receive(size)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum."""
        with self._asking:
            self._send(bytes([ADD]) + _text(PREFIX + key.encode()) + struct.pack("=q", amount))
            return struct.unpack("=q", self._receive(8))[0]

    def is_open(self) -> bool:
        """Whether the process that serves the store still runs, as far as the network has noticed."""
        with self._asking, selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            # The store sends nothing unasked, except the end of the connection.
            return not selector.select(0)

    def _send(self, content: bytes) -> None:
        try:
            self._connection.sendall(content)
        except OSError as error:
            raise StoreError(error.strerror or str(error))

    def _receive(self, size: int) -> bytes:
        content = b""
        while len(content) < size:
            try:
                more = self._connection.recv(size - len(content))
            except OSError as error:
                raise StoreError(error.strerror or str(error))
            if not more:
                raise StoreError("it closed the connection")
            content += more
        return content


class TorchStore:
    """The same through PyTorch's client, for versions with another protocol."""

    def __init__(self, store: Any):
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        """Store a value."""
        self._store.set(key, value)

    def get(self, key: str) -> bytes | None:
        """The value of a key; None if it has none yet."""
        return self._store.get(key) if self._store.check([key]) else None

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first, and return the sum."""
        return self._store.add(key, amount)

    def is_open(self) -> bool:
        """PyTorch's client does not report the end of a connection."""
        return True


Store = WireStore | TorchStore


def connect(*, attempt_seconds: float) -> WireStore:
    """Connect to MASTER_ADDR and MASTER_PORT without PyTorch. Raises StoreError."""
    try:
        connection = socket.create_connection(_address(), timeout=attempt_seconds)
    except (OSError, UnicodeError) as error:
        raise StoreError(getattr(error, "strerror", None) or str(error))
    store = WireStore(connection)
    store.set(GREETING, b"hello")
    if store.get(GREETING) != b"hello":
        raise StoreError("it speaks another protocol")
    return store


def connect_with_torch(*, timeout_seconds: float) -> TorchStore:
    """Connect with PyTorch's client. Raises RuntimeError, ValueError."""
    from torch.distributed import TCPStore

    host, port = _address()
    return TorchStore(TCPStore(host, port, None, False, timedelta(seconds=timeout_seconds), wait_for_workers=False))


def _address() -> tuple[str, int]:
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _text(content: bytes) -> bytes:
    return struct.pack("=Q", len(content)) + content
