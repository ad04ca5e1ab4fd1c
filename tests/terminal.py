"""A command in a pseudo-terminal of 80 columns, for tests: keys go in, and what the screen shows comes out."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Mapping, Sequence

COLUMNS, ROWS = 80, 24
CONTROL_C, CONTROL_D = b"\x03", b"\x04"
# What readline writes besides text: colours, modes such as bracketed paste, and the bell.
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x07")


class Terminal:
    """A running command. `written` is all that it has written, without escape sequences."""

    def __init__(self, argv: Sequence[str], *, cwd: str, env: Mapping[str, str]):
        self.pid, self._descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(argv[0], [*argv], {**env, "TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)})
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._bytes = b""
        self.code: int | None = None

    @property
    def written(self) -> str:
        """Text with line feeds, as a user could copy it from the terminal."""
        text = ESCAPES.sub("", self._bytes.decode(errors="replace"))
        # readline breaks a long line with a space and a carriage return.
        return text.replace(" \r", "").replace("\r\n", "\n").replace("\r", "")

    def type(self, keys: str | bytes) -> None:
        """Send keys; "\\n" is the return key."""
        os.write(self._descriptor, keys.encode() if isinstance(keys, str) else keys)

    def wait_for(self, text: str, *, after: int = 0, timeout: float = 120) -> int:
        """Read until `text` has been written after position `after` of `written`; returns the position behind it.

        Raises:
            TimeoutError: it has not been written in time, or the command has ended.
        """
        deadline = time.monotonic() + timeout
        while (place := self.written.find(text, after)) < 0:
            if not self._read(deadline - time.monotonic()):
                raise TimeoutError(f"{text!r} has not been written:\n{self.written}")
        return place + len(text)

    def wait(self, timeout: float = 60) -> int:
        """Read to the end, and return the exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline - time.monotonic()):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def close(self) -> None:
        """Kill the command if it is still running."""
        if self.code is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self._descriptor)

    def _read(self, seconds: float) -> bool:
        """Read once; False at the end, and if nothing comes in time."""
        if seconds <= 0 or not select.select([self._descriptor], [], [], seconds)[0]:
            return False
        try:
            content = os.read(self._descriptor, 65536)
        except OSError:  # the other end is closed
            return False
        self._bytes += content
        return bool(content)
