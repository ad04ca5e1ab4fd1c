"""A Python whose processes are forks: what a forked command finds as sys.executable, for the children that it starts.

It accepts the words of python's command line: a script, "-m" and a module, or "-c" and code. It sends them with its
working directory, environment and standard streams to a server, which forks a process that has imported the libraries,
and ends as that process ends. So a child is a process of its own, with all that its parent gave it, but without the
seconds of imports. Other open files are not passed on.
"""

import array
import contextlib
import json
import os
import selectors
import shlex
import signal
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!I")
CODE = struct.Struct("!i")
STREAMS = (0, 1, 2)


def write_program(path: Path, address: Path) -> None:
    """Write the executable file, whose processes are forked by the server at `address`."""
    words = [sys.executable, "-I", "-S", __file__, address]
    path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
    path.chmod(0o755)


def listen(address: Path) -> socket.socket:
    """The socket of a server, at a path that does not exist."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    return listener


def serve(listener: socket.socket, body: Callable[[dict[str, Any]], None]) -> None:
    """Fork a process for each program that connects. Never returns.

    Args:
        body: what such a process does with its request: "argv", "cwd" and "env". It has the program's streams already.
    """
    from tests.faults import warm

    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    # Process descriptor and process, by connection.
    running: dict[socket.socket, tuple[int, int]] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                try:
                    request, streams = _receive(connection)
                except (OSError, ValueError, struct.error):
                    # The program was killed while it sent its request.
                    connection.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    warm.end_with(partial(body, request), streams)
                for stream in streams:
                    os.close(stream)
                descriptor = os.pidfd_open(pid)
                running[connection] = (descriptor, pid)
                selector.register(descriptor, selectors.EVENT_READ, connection)
                selector.register(connection, selectors.EVENT_READ)
                continue
            # Either the process has ended, or the program has, which was killed.
            connection = key.fileobj if key.data is None else key.data
            if connection not in running:
                continue
            descriptor, pid = running.pop(connection)
            if key.data is None:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):
                connection.sendall(CODE.pack(os.waitstatus_to_exitcode(status)))
            for registered in (descriptor, connection):
                selector.unregister(registered)
            os.close(descriptor)
            connection.close()


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and the program's streams."""
    head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, len(STREAMS), socket.MSG_WAITALL)
    (length,) = LENGTH.unpack(head)
    return json.loads(connection.recv(length, socket.MSG_WAITALL)), list(streams)


def main() -> None:
    """The program: let the server do it, and end in the same way."""
    import ctypes

    # A launcher that is killed takes its ranks with it.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    address, *words = sys.argv[1:]
    request = json.dumps({"argv": words, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    descriptors = array.array("i", STREAMS)
    connection.sendmsg([LENGTH.pack(len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
    connection.sendall(request)
    answer = connection.recv(CODE.size, socket.MSG_WAITALL)
    code = CODE.unpack(answer)[0] if answer else 1
    if code < 0:
        # The action of SIGKILL cannot be set.
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
