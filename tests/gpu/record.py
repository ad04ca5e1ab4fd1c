"""The two files of a run, gpu.json and gpu.md, which are written anew after each part."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu import page
from tests.gpu.parts import SKIPPED, Outcome, Part

JSON_FILE, PAGE_FILE = "gpu.json", "gpu.md"
NOT_REACHED = Outcome(SKIPPED, reason="the run ended before it")


class Recorder:
    """Collects how parts end. A run that is killed leaves files with what it had found."""

    def __init__(self, output: Path, parts: Sequence[Part], *, small: bool, minutes: float):
        """
        Args:
            output: existing folder for the files.
            parts: all parts of the run.
            minutes: limit of the run.
        """
        self._output, self._parts = output, parts
        self._facts = {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", "small": small, "minutes": minutes}
        self._began = time.monotonic()
        self._outcomes: dict[str, Outcome] = {}

    def add(self, part: Part, outcome: Outcome) -> None:
        """Print a line about a part that ended or was skipped, and write the files."""
        self._outcomes[part.name] = outcome
        line = f"{outcome.status:8}{outcome.seconds:6.0f} s  {part.name}"
        print(f"{line}: {outcome.reason}" if outcome.reason else line, file=sys.stderr, flush=True)
        record = self.record()
        _write(self._output / JSON_FILE, json.dumps(record, indent=1) + "\n")
        _write(self._output / PAGE_FILE, page.page(record))

    def record(self) -> dict[str, Any]:
        """All that is known, as JSON has it."""
        parts = [
            {
                "name": part.name,
                "section": part.section,
                "command": " ".join(("python", *part.command)),
                "limit_seconds": part.seconds,
                **asdict(self._outcomes.get(part.name, NOT_REACHED)),
            }
            for part in self._parts
        ]
        return {**self._facts, "seconds": time.monotonic() - self._began, "parts": parts}


def _write(path: Path, text: str) -> None:
    """Replace a file; whoever reads it sees the old or the new one whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
