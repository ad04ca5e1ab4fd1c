"""The input of the training commands of these checks: a tokenizer, a model, samples; and when two results are equal."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.train.run_folder import checkpoint_files
from tests import tiny
from tests.faults import warm

PLUGINS = {
    "zero2": ["--plugin", "zero2", "--mixed_precision", "bf16"],
    "gemini": ["--plugin", "gemini", "--mixed_precision", "bf16"],
    "3d": ["--plugin", "3d", "--mixed_precision", "bf16"],
}


@dataclass(frozen=True)
class Place:
    """A folder with `model`, its tokenizer in it, and `samples`, a prepared folder; runs are put beside them."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def samples(self) -> Path:
        return self.folder / "samples"

    def flags(self, name: str, *more: Any) -> list[str]:
        """Flags of a run that saves to `save_dir(name)`."""
        home = self.folder / name
        words = ["--pretrained", self.model, "--dataset", self.samples, "--max_length", 64, "--lr", "2e-3"]
        words += ["--save_dir", self.save_dir(name), "--tensorboard_dir", home / "tb"]
        words += ["--config_file", home / "config.json", *more]
        return [str(word) for word in words]

    def save_dir(self, name: str) -> Path:
        return self.folder / name / "save_dir"

    def log(self, name: str) -> Path:
        return self.folder / name / "log"


def make(folder: Path, *, samples: int) -> Place:
    """Write tokenizer, model and samples. A child process does it, since it starts threads."""
    place = Place(folder)
    job = warm.Job(lambda: _write(place, samples), folder / "made.log")
    assert job.wait() == 0, job.output
    return place


def _write(place: Place, samples: int) -> None:
    import datasets

    from colossal_llama2.encoding.registry import load_encoder

    tokenizer = tiny.make_tokenizer(place.folder / "tokenizer")
    tiny.make_model(place.model, tokenizer)
    encoded = load_encoder(tokenizer).encode(tiny.english_documents()[:samples])
    rows = [[1, *ids[: 16 + number % 9], 2] for number, ids in enumerate(encoded)]
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(place.samples)


def trained(save_dir: Path) -> dict[str, Any]:
    """The result of training: hashes of all weights and states of the last checkpoint, and of the final model."""
    newest = checkpoint_files.complete_checkpoints(save_dir)[-1]
    states = json.loads((newest / "running_states.json").read_text())
    counts = {name: states[name] for name in ("epoch", "step", "samples_seen", "tokens_seen", "ranks")}
    return {**counts, "checkpoint": _inner_hashes(newest), "model": model_hashes(save_dir / "modeling")}


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a final model except its card.

    The card also covers the log, which is not copied with a checkpoint.
    """
    return {name: digest for name, digest in hashes(folder).items() if name != "README.md"}


def _inner_hashes(checkpoint: Path) -> dict[str, str]:
    # Of the files outside the folders, one lists flags, and a resumed run has more of them.
    return {name: digest for name, digest in hashes(checkpoint).items() if "/" in name}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
