"""Render conversations with a chat template, in a process of its own with limits of time and memory."""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.storage.row_errors import RowError

# For one conversation, and for the start of the process on a busy machine. The process limits its own CPU time too.
SECONDS = 20.0
START_SECONDS = 120.0

REFUSED = "a conversation that the chat template refuses"
LIMIT = "a conversation for which the chat template needs too much time or memory"
NOT_A_PREFIX = "a conversation whose answers the chat template changes when the conversation continues"

Messages = Sequence[Mapping[str, str]]


class RenderedText(NamedTuple):
    """The text of a conversation, and the spans of its characters that the model generates, one for each answer."""

    text: str
    spans: list[tuple[int, int]]


class Renderer:
    """A template that is ready to render. The process starts with the first use, and ends with this one."""

    def __init__(self, template: str, *, names: Mapping[str, Any], origin: str):
        """
        Args:
            template: in Jinja.
            names: what the template can use besides the messages, such as bos_token and eos_token.
            origin: the file or the flag that the template is from, for messages.
        """
        self._template, self._names, self._origin = template, dict(names), origin
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._has_markers = False

    @property
    def has_markers(self) -> bool:
        """Whether the template marks what is generated with `{% generation %}`."""
        self._start()
        return self._has_markers

    def prompt(self, messages: Messages) -> str:
        """The text after which the model answers the last message.

        Raises:
            RowError: the template refuses the conversation.
            UserError: the template is damaged, or exceeds its limits.
        """
        return self._render(messages, add_generation_prompt=True, answers=False).text

    def conversation(self, messages: Messages) -> RenderedText:
        """The text of a conversation, with one span for each message of the assistant.

        Raises:
            RowError: the template refuses the conversation, or its answers cannot be found in the text.
            UserError: the template is damaged, or exceeds its limits.
        """
        rendered = self._render(messages, add_generation_prompt=False, answers=True)
        count = sum(message["role"] == "assistant" for message in messages)
        if len(rendered.spans) != count:
            raise RowError(
                f"the chat template {self._origin} marks {len(rendered.spans)} answers of a conversation with {count}",
                reason=REFUSED,
            )
        return rendered

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    # A process that has ended leaves what it was sent in the buffer, which cannot be written.
                    with contextlib.suppress(OSError):
                        stream.close()
            atexit.unregister(self.close)

    def _render(self, messages: Messages, *, add_generation_prompt: bool, answers: bool) -> RenderedText:
        self._start()
        request = {"messages": messages, "add_generation_prompt": add_generation_prompt, "answers": answers}
        try:
            answer = self._ask(request, SECONDS)
        except TooSlow as error:
            raise RowError(str(error), reason=LIMIT)
        if "not_a_prefix" in answer:
            raise RowError(
                f"the chat template {self._origin} does not write message {answer['not_a_prefix']}, an answer, as a "
                "continuation of the text before it, so it is not clear what is generated; mark it in the template "
                "with {% generation %}",
                reason=NOT_A_PREFIX,
            )
        if "limit" in answer:
            problem = f"the chat template {self._origin} cannot be used: {answer['error']}; correct it"
            raise RowError(problem, reason=LIMIT)
        if "error" in answer:
            raise RowError(f"the chat template {self._origin} refuses: {_shortened(answer)}", reason=REFUSED)
        return RenderedText(answer["text"], [(begin, end) for begin, end in answer["spans"]])

    def _start(self) -> None:
        """Start the process, unless it runs; a forked process starts its own."""
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return
            # Killed between two requests, perhaps since memory was short. A request depends on no earlier one.
            self.close()
        script = Path(__file__).with_name("render_process.py")
        # -I: nothing from the working directory is imported.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._owner = os.getpid()
        atexit.register(self.close)
        answer = self._ask({"template": self._template, "names": self._names}, START_SECONDS)
        if "limit" in answer:
            self.close()
            raise UserError(f"the chat template {self._origin} cannot be used: {answer['error']}; correct it")
        if "error" in answer:
            self.close()
            where = f"{self._origin}:{answer['line']}" if "line" in answer else self._origin
            raise UserError(f"{where}: not a Jinja template ({_shortened(answer)}); correct it")
        self._has_markers = answer["has_markers"]

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), seconds)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            raise self._too_slow(seconds)
        if not line:
            code = process.wait()
            self.close()
            if code == -signal.SIGXCPU:
                raise self._too_slow(seconds)
            raise UserError(
                f"the process that renders the chat template {self._origin} ended (exit code {code}); correct the "
                "template, or free memory"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _too_slow(self, seconds: float) -> "TooSlow":
        return TooSlow(f"the chat template {self._origin} takes over {seconds:.0f} s; correct it")


class TooSlow(UserError):
    """A request took too long; its process has ended."""


def _shortened(answer: Mapping[str, Any]) -> str:
    """The error of an answer in one line of at most 200 characters."""
    return " ".join(answer["error"].split())[:200]


def _read_line(source: int, seconds: float) -> bytes:
    """One line from a pipe, empty if it ends before. Raises TimeoutError if it takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    parts: list[bytes] = []
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([source], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        part = os.read(source, 1 << 20)
        if not part:
            return b""
        parts.append(part)
    return b"".join(parts)
