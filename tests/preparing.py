"""Shared by the tests of the prepare commands: rows, input files, the commands' keywords, and their output."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import measure_parts
from colossal_llama2.dataset.write.prepare import prepare_pretrain
from colossal_llama2.dataset.write.splicing import piece_lengths
from colossal_llama2.train.forecast.data_plan import buckets_of, build_plan, make_order
from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps
from colossal_llama2.train.stepping.state import TrainState
from tests import tiny

Piece = tuple[tuple[int, ...], tuple[int, ...], str]


def write_lines(path: Path, lines) -> Path:
    """Write rows, or lines that are already bytes, as jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = [line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


def settings(inputs, tokenizer_dir, output: Path, *, max_length: int = 128, bins: int = 1, **others) -> dict:
    """The keywords of `prepare_pretrain` and `prepare_sft`, which are the commands' flags."""
    return {
        "data_input_dirs": [str(folder) for folder in inputs],
        "tokenizer_dir": str(tokenizer_dir),
        "data_cache_dir": str(output / "cache"),
        "data_jsonl_output_dir": str(output / "jsonl"),
        "data_arrow_output_dir": str(output / "arrow"),
        "max_length": max_length,
        "num_spliced_dataset_bins": bins,
        "num_workers": 1,
        **others,
    }


def write_two_sources(folder: Path, tokenizer_dir: Path) -> Path:
    """Prepare real text as two sources: new/arrow of three parts and two categories, old/arrow of two parts."""
    documents = tiny.english_documents()
    rows = {
        "new": [{"target": text, "category": f"kind {number % 2}"} for number, text in enumerate(documents[:420])],
        "old": [{"target": text, "category": "docs"} for text in documents[420:500]],
    }
    for bins, (name, lines) in zip((3, 2), rows.items(), strict=True):
        write_lines(folder / "in" / name / "rows.jsonl", lines)
        output = settings([folder / "in" / name], tokenizer_dir, folder / name, bins=bins, eval_fraction=0.05)
        prepare_pretrain(**output)
    return folder


def plan_settings(
    data: Data,
    *,
    num_epochs: int,
    learning_rate: float,
    warmup: int | None = None,
    state: TrainState | None = None,
    max_steps: int | None = None,
    **order_settings,
) -> dict[str, Any]:
    """The plan of a run with these settings, which starts at the beginning or at `state`."""
    state, measured = state or TrainState(), measure_parts(data.parts)
    samples = sum(len(lengths) for _, lengths in measured)
    order = make_order(samples, **order_settings, buckets=buckets_of(data, measured))
    total_steps = state.step + order.steps_after(state.sample_start_index)
    total_steps += (num_epochs - state.epoch - 1) * order.steps_after(0)
    total_steps = min(total_steps, max_steps or total_steps)
    schedule = CosineSchedule(learning_rate, total_steps, warmup_steps(warmup, total_steps))
    return build_plan(data, measured, order, num_epochs=num_epochs, schedule=schedule, state=state)


def flags(keywords: dict) -> list:
    """The keywords as words of a command line."""
    values = {**keywords, "data_input_dirs": ",".join(keywords["data_input_dirs"])}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_jsonl(folder: Path) -> list:
    """The rows of all jsonl files of a folder, by name of the file."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def manifest(output: Path) -> dict:
    """The manifest of a finished run."""
    return json.loads((output / "arrow" / "manifest.json").read_bytes())


def pieces_of(samples: Sequence[dict]) -> Iterator[Piece]:
    """Ids, labels and category of every piece of the samples, by their recorded borders."""
    for sample in samples:
        assert sum(sample["sequence_lengths"]) == len(sample["input_ids"]) == len(sample["labels"])
        start = 0
        for length, category in zip(sample["sequence_lengths"], sample["document_categories"], strict=True):
            stop = start + length
            yield tuple(sample["input_ids"][start:stop]), tuple(sample["labels"][start:stop]), category
            start = stop


def expected_pieces(rows: Sequence[dict], *, encoder, max_length: int, overlong: str) -> Counter:
    """The expected result of pre-training rows, computed row by row from the rules in docs/data.md."""
    found: list[Piece] = []
    for row in rows:
        source, target, category = row.get("source", ""), row["target"], row.get("category", "unknown")
        masked = [encoder.bos_id, *encoder.encode([source])[0]] if source else []
        opening = [] if source else [encoder.bos_id]
        learnt = [*opening, *encoder.encode([target], dummy_prefix=not source)[0], encoder.eos_id]
        ids, labels = masked + learnt, [IGNORE_INDEX] * len(masked) + learnt
        lengths = piece_lengths(len(ids), max_length=max_length)
        start = 0
        for length in lengths if overlong == "split" else lengths[:1] if len(lengths) == 1 else [max_length]:
            stop = start + length
            if any(label != IGNORE_INDEX for label in labels[start + 1 : stop]):
                found.append((tuple(ids[start:stop]), tuple(labels[start:stop]), category))
            start = stop
    return Counter(found)
