"""Report and refuse every connection of this process to another machine, and every lookup of a machine's address."""

import socket
import sys
from typing import Any

LOCAL_NAMES = ("localhost", "localhost.localdomain", "0.0.0.0", "::", "::1", "")


def install(report: str) -> None:
    """Watch from now on; cannot be undone.

    Args:
        report: gets a line per attempt.
    """
    own_name = socket.gethostname()

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            return
        host = _host(arguments[1] if event == "socket.connect" else arguments[0])
        if host not in (*LOCAL_NAMES, own_name) and not host.startswith("127."):
            with open(report, "a") as lines:
                lines.write(f"network: {event} {host}\n")
            raise OSError(f"no network here: {event} {host}")

    sys.addaudithook(watch)


def _host(address: Any) -> str:
    """The name or number of a machine; empty for a local address without one, such as a Unix socket."""
    if isinstance(address, tuple):
        address = address[0]
    elif isinstance(address, str) and "/" in address:
        return ""
    if isinstance(address, bytes):
        return address.decode(errors="replace")
    return address or ""
