"""What can happen to a file of a checkpoint, by name."""

import json
from pathlib import Path

from colossal_llama2.model.training_history import HISTORY_FILE
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.stepping.state import COUNTED_LATER


def cut(path: Path) -> None:
    """Lose the last byte, or half of a longer file."""
    content = path.read_bytes()
    path.write_bytes(content[: min(len(content) - 1, len(content) // 2 + 1)])


def flip(path: Path) -> None:
    """Change one bit in the middle; the size is unchanged."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def delete(path: Path) -> None:
    """Remove the file."""
    path.unlink()


def swap(path: Path) -> None:
    """Replace the file by one of the same size: the same bytes, reversed."""
    content = path.read_bytes()
    path.write_bytes(content[::-1] if content[::-1] != content else bytes(len(content)))


def add(path: Path) -> None:
    """Add a file that did not exist."""
    path.write_text("{}")


def exchange(path: Path, other: Path) -> None:
    """Exchange two files."""
    content, others = path.read_bytes(), other.read_bytes()
    path.write_bytes(others)
    other.write_bytes(content)


def age(checkpoint: Path) -> None:
    """Turn a checkpoint into one of an earlier version: without later counters and history, intact by its manifest."""
    states = json.loads((checkpoint / "running_states.json").read_bytes())
    for name in (*COUNTED_LATER, "numerics", "base_model"):
        del states[name]
    (checkpoint / "running_states.json").write_text(json.dumps(states))
    (checkpoint / "modeling" / HISTORY_FILE).unlink()
    saved_at = checkpoint_files.read_manifest(checkpoint)["saved_at"]
    entries = checkpoint_files.file_entries(checkpoint, checkpoint_files.list_files(checkpoint))
    checkpoint_files.write_manifest(checkpoint, entries, saved_at=saved_at)


KINDS = {"cut": cut, "flip": flip, "delete": delete, "swap": swap, "add": add, "age": age}
