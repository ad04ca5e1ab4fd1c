"""The file that answers are appended to, which a restarted command continues."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from colossal_llama2.errors import UserError
from colossal_llama2.logs import get_logger
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import errors_naming, open_no_link, parse_object, read_json, write_json
from colossal_llama2.storage.output_paths import check_output_file
from colossal_llama2.storage.row_errors import RowError

FLAG = "--output_file"
DTYPE = "dtype"


class AnswerFile:
    """A jsonl file with one line for each prompt, in their order: {"number": 1, ...}. Beside it is what decided it.

    Attributes:
        done: how many prompts have their line.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        prompts: int,
        asked: str = "prompt",
        changed: Mapping[str, str] | None = None,
    ):
        """
        Args:
            settings: what decides the answers. A file of other settings is refused. An entry "dtype" of None stands for
                any, and is then the one of the file.
            prompts: how many there are.
            asked: what one is called in messages.
            changed: for the settings that are lists of a name and a hash, the message for names, put in place of {},
                whose hash was another.

        Raises:
            UserError: the path cannot be written, or is not a file of these settings.
        """
        self._path, self._settings, self._changed = path, dict(settings), changed or {}
        self._sidecar = settings_beside(path)
        self._file: IO[bytes] | None = None
        check_output_file(path, FLAG)
        check_output_file(self._sidecar, FLAG)
        self._prompts, self._asked = prompts, asked
        self.done = self._whole_lines() if path.exists() and path.stat().st_size else 0

    @property
    def dtype(self) -> str | None:
        """The precision of the answers that are there; None if there are none and none was given."""
        return self._settings.get(DTYPE)

    def open(self, dtype: str) -> None:
        """Write the settings beside the file, and open it to continue it.

        Raises:
            UserError: another process writes it, or has begun it with other settings.
        """
        self._settings[DTYPE] = dtype
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_no_link(self._path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{FLAG} {self._path}: another process is writing it; wait, or give a new file")
        except OSError:  # a file system without locks
            pass
        # Another process may have written it since this object was made.
        self.done = self._whole_lines() if self._path.stat().st_size else 0
        size = len(self._whole_bytes())
        if size < self._path.stat().st_size:
            get_logger().info(f"{self._path}: a line that was not written to its end is removed")
            os.ftruncate(self._file.fileno(), size)
        if self.done:
            get_logger().info(f"{self._path}: continuing after {counted(self.done, f'answered {self._asked}')}")
        write_json(self._sidecar, self._settings)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append the line of the next prompt, at once."""
        assert self._file is not None
        self.done += 1
        text = json.dumps({"number": self.done, **record}, ensure_ascii=False)
        with errors_naming(self._path):
            self._file.write(text.encode() + b"\n")
            self._file.flush()

    def records(self) -> list[dict[str, Any]]:
        """What its lines hold, in their order."""
        return [parse_object(line) for line in self._whole_bytes().split(b"\n")[:-1]] if self._path.exists() else []

    def close(self) -> None:
        """Close it. Its lines are complete."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _whole_lines(self) -> int:
        """How many prompts have a line. Raises UserError for a file of other settings, or of something else."""
        if not self._sidecar.exists():
            raise UserError(
                f"{FLAG} {self._path} exists, and {self._sidecar.name}, with the settings of its answers, does not; "
                "give a new file"
            )
        before = read_json(self._sidecar)
        if self._settings.get(DTYPE) is None:
            self._settings[DTYPE] = before.get(DTYPE)
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise UserError(
                    f"{FLAG} {self._path} was begun with {self._difference(name, before.get(name), value)}; give a new "
                    "file, or the same input and settings"
                )
        lines = self._whole_bytes().split(b"\n")[:-1]
        if len(lines) > self._prompts:
            raise UserError(
                f"{FLAG} {self._path}: has {len(lines):,} answers for {counted(self._prompts, self._asked)}; "
                "give a new file"
            )
        for number, line in enumerate(lines, start=1):
            if not _is_answer(line, number):
                raise UserError(
                    f"{self._path}:{number}: is not the answer to {self._asked} {number:,}; give a new file"
                )
        return len(lines)

    def _difference(self, name: str, before: Any, now: Any) -> str:
        """What of a setting was different; of a list of names with hashes, only the names."""
        if name in self._changed and isinstance(before, list) and all(isinstance(pair, list) for pair in before):
            names, names_now = ([str(pair[0]) for pair in pairs if pair] for pairs in (before, now))
            if names != names_now:
                return f"the {name} {', '.join(names)}, now {', '.join(names_now)}"
            return self._changed[name].format(", ".join(pair[0] for pair in now if pair not in before))
        return f"another {name}: {_short(before)}, now {_short(now)}"

    def _whole_bytes(self) -> bytes:
        """The lines that have been written to their end."""
        content = self._path.read_bytes()
        return content[: content.rfind(b"\n") + 1]


def settings_beside(path: Path) -> Path:
    """The file with what decided the answers of a file."""
    return path.with_name(f"{path.name}.settings.json")


def model_digest(folder: Path) -> str:
    """A hash that changes when a model's folder does: of its small files, and of the size and time of its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model") and path.is_file():
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        elif path.suffix == ".safetensors" and path.is_file():
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _is_answer(line: bytes, number: int) -> bool:
    try:
        return parse_object(line).get("number") == number
    except RowError:
        return False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
