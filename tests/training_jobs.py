"""Training commands that tests compare: their data, and what they left behind."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from colossal_llama2.encoding.registry import load_encoder
from tests import tiny

LENGTH = 48
GLOBAL_BATCH = 16
LR = 2e-3
# The gradient norm of the small model is about 1 at the start: 0.3 clips every step.
CLIP = 0.3


@dataclass
class Job:
    """One finished command of a shared job; train_worker.py describes its records."""

    folder: Path
    error: str | None
    first_moment_norm: float | None
    chunks: list[bool] | None
    after: int | None = None
    buffers_error: float | None = None

    def scalars(self, name: str, run: str = "tb") -> list[float]:
        """A TensorBoard curve, by step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / run), size_guidance={"scalars": 0})
        events.Reload()
        return [event.value for event in events.Scalars(name)]

    @property
    def model(self) -> Path:
        return self.folder / "ckpt" / "modeling"


def write_data(folder: Path, tokenizer_dir: Path, steps: int, *, full: bool = False) -> list[str]:
    """Two prepared parts of real text, some samples with a masked start; 3 are left over.

    Args:
        full: all samples have LENGTH tokens, as spliced ones have; otherwise from the half of it.
    """
    encoder = load_encoder(tokenizer_dir)
    stream = [token for ids in encoder.encode(tiny.english_documents()[: 30 * steps]) for token in [1, *ids, 2]]
    random = np.random.default_rng(0)
    rows = []
    for index in range(GLOBAL_BATCH * steps + 3):
        length = LENGTH if full else int(random.integers(LENGTH // 2, LENGTH + 1))
        ids = stream[index * LENGTH : index * LENGTH + length]
        rows.append((ids, [-100] * 10 + ids[10:] if index % 3 == 0 else ids))
    kind = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"input_ids": kind, "labels": kind})
    half = len(rows) // 2
    for part, chosen in enumerate((rows[:half], rows[half:])):
        columns = {"input_ids": [ids for ids, _ in chosen], "labels": [labels for _, labels in chosen]}
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / f"part-{part:05d}")
    return [str(folder / f"part-{part:05d}") for part in range(2)]


def write_short_documents(folder: Path, tokenizer_dir: Path) -> str:
    """A prepared part of 24 documents of real text, of at most 32 tokens each."""
    encoder = load_encoder(tokenizer_dir)
    rows = [[1, *ids[:30], 2] for ids in encoder.encode(tiny.english_documents()[:24])]
    part = folder / "part-00000"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(part)
    return str(part)


def write_spliced_data(folder: Path, tokenizer_dir: Path, steps: int) -> str:
    """A prepared part of real text: one to four documents a sample, unequal lengths, some with a masked start."""
    encoder = load_encoder(tokenizer_dir)
    documents = iter(encoder.encode(tiny.english_documents()[: 100 * steps]))
    random = np.random.default_rng(0)
    rows: dict[str, list] = {"input_ids": [], "labels": [], "sequence_lengths": []}
    for _ in range(GLOBAL_BATCH * steps):
        pieces = [[1, *next(documents)[: int(random.integers(4, 40))], 2] for _ in range(int(random.integers(1, 5)))]
        while sum(map(len, pieces)) > LENGTH:
            pieces.pop()
        labels = [[-100] * 3 + piece[3:] if random.random() < 0.3 else piece for piece in pieces]
        rows["input_ids"].append(sum(pieces, []))
        rows["labels"].append(sum(labels, []))
        rows["sequence_lengths"].append([len(piece) for piece in pieces])
    kind = datasets.Sequence(datasets.Value("int32"))
    datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(rows, kind))).save_to_disk(folder)
    return str(folder)


def with_vocabulary(model_dir: Path, folder: Path, size: int) -> Path:
    """A copy of a model with this number of embedding rows."""
    shutil.copytree(model_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(size, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def common_flags(home: Path, model, parts: list[str], *, run: str = "tb") -> list:
    """The flags that every command has; later ones replace them."""
    flags = ["--pretrained", model, "--dataset", *parts, "--max_length", LENGTH, "--lr", LR, "--grad_clip", CLIP]
    flags += ["--save_dir", home / "ckpt", "--tensorboard_dir", home / run, "--config_file", home / "config.json"]
    return [*flags, "--micro_batch_size", 8, "--accumulation_steps", 1]


def finished(folder: Path, spec: dict) -> Job:
    """What a launched command left in `folder`."""
    result = json.loads((folder / f"{spec['name']}.json").read_text())
    return Job(
        folder=Path(spec["flags"][spec["flags"].index("--save_dir") + 1]).parent,
        error=result["error"],
        first_moment_norm=result.get("first_moment_norm"),
        chunks=result.get("chunks"),
        **{name: result.get(name) for name in ("after", "buffers_error")},
    )


def weights_of(job: Job) -> dict[str, torch.Tensor]:
    """The exported model's parameters, or its adapter's, in float32."""
    if (job.model / "adapter_config.json").is_file():
        return {name: tensor.float() for name, tensor in load_file(job.model / "adapter_model.safetensors").items()}
    return {
        name: param.detach().float()
        for name, param in AutoModelForCausalLM.from_pretrained(job.model).named_parameters()
    }
