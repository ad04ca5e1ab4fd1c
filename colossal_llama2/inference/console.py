"""The two ends of a chat's terminal: messages that are typed, and lines that the chat itself prints."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.terminal_text import one_line, show

PROMPT, CONTINUED = "> ", ". "
FENCE = '"""'
WIDTH = 79


def notice(text: str) -> None:
    """Print a paragraph about the chat to stderr, in lines of at most 79 columns. stdout has the conversation only."""
    from rich.console import Console
    from rich.text import Text

    for line in Text(one_line(text)).wrap(Console(width=WIDTH), WIDTH):
        show(line.plain.rstrip(), file=sys.stderr)


class Typed(NamedTuple):
    """What was typed, and whether it is a command: a line that begins with a slash, outside of quotation marks."""

    text: str
    is_command: bool


class MessageInput:
    """Reads messages from stdin: with line editing and a history on a terminal, else as they are.

    A line that ends with a backslash goes on in the next one. Between two lines of three quotation marks, or after some
    at the beginning of a line and up to some at the end of one, everything is one message.

    Attributes:
        has_cleared: whether the last Ctrl-C has cleared something that was typed.
    """

    def __init__(self) -> None:
        """Raises UserError if stdin or stdout is closed."""
        if sys.stdin is None or sys.stdout is None:
            raise UserError("--interactive reads stdin and writes stdout, and one of them is closed; open both")
        self.has_cleared = False
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        # A broken character must not end the chat.
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")
        if self.is_terminal:
            with contextlib.suppress(ImportError):
                # `input` then edits lines, and goes back to earlier ones.
                import readline  # noqa: F401

    def read(self) -> Typed | None:
        """The next message; None at the end of the input. Raises KeyboardInterrupt for Ctrl-C."""
        line = self._line(PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(FENCE):
            return Typed(self._fenced(line.lstrip().removeprefix(FENCE)), is_command=False)
        is_command = line.startswith("/")
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(CONTINUED)
        return Typed("\n".join([*lines, *([] if line is None else [line])]), is_command)

    def _fenced(self, first: str) -> str:
        lines: list[str] = []
        line: str | None = first
        while line is not None and not line.rstrip().endswith(FENCE):
            lines.append(line)
            line = self._line(CONTINUED)
        if line is not None:
            lines.append(line.rstrip().removesuffix(FENCE))
        # The marks may have lines of their own.
        if len(lines) > 1 and not lines[0].strip():
            del lines[0]
        if len(lines) > 1 and not lines[-1].strip():
            del lines[-1]
        return "\n".join(lines)

    def _line(self, prompt: str) -> str | None:
        """One line without its end; None at the end of the input."""
        if self.is_terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.has_cleared = prompt == CONTINUED or bool(_typed_so_far())
                raise
        line = sys.stdin.readline()
        if not line:
            return None
        line = line.removesuffix("\n").removesuffix("\r")
        # A terminal shows what is typed; a transcript should too.
        show(prompt + line)
        return line


def _typed_so_far() -> str:
    """The line that was being edited."""
    try:
        import readline
    except ImportError:
        return ""
    return readline.get_line_buffer()


class StopOnInterrupt:
    """While it is entered, Ctrl-C only sets `is_requested`, which long work asks for.

    Inside `may_interrupt`, the second Ctrl-C raises KeyboardInterrupt: the work may ask too rarely.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._may_raise = False
        self._before: Any = None

    def __enter__(self) -> "StopOnInterrupt":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Work that a second Ctrl-C ends. The KeyboardInterrupt does not leave this block."""
        self._may_raise = True
        try:
            yield
        except KeyboardInterrupt:
            self.is_requested = True
        finally:
            self._may_raise = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested and self._may_raise:
            raise KeyboardInterrupt
        self.is_requested = True
