"""Which plugin reads what each plugin wrote: weights and complete checkpoints, tied and untied, on two CPU ranks.

    python -m tests.plugin_matrix                                every writer with every reader, both models
    python -m tests.plugin_matrix --layouts gemini "3d pp2" --models tied

A writer trains STEPS steps in bf16 and saves in the middle. A reader loads the model of that checkpoint, trains one
step with a learning rate that changes no number, and must write the same bits again; or it resumes the checkpoint, and
must get the writer's result: bit for bit in the writer's own layout, otherwise within the rounding of bf16, since
float32 master weights are restored only in the same layout. The figure is the distance of the final weights, divided by
the distance from the checkpoint to the end.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests import launching, layouts, tiny, training_jobs
from tests.training_jobs import GLOBAL_BATCH

STEPS, SAVED = 6, 3
# Relative to the distance from the checkpoint to the end. Without the moments, steps differ by their own length.
RESUMED_ALLOWED = 0.25
# Adam moves a weight by at most this much in a step, and the smallest bf16 weights here are about 1e-8.
NO_RATE = "1e-15"
# Names from the table of tests/layouts.py, in bf16.
LAYOUTS = {
    "ddp": "ddp",
    "zero2": "zero2",
    "zero2_cpu": "zero2_cpu",
    "gemini": "gemini",
    "gemini_auto": "gemini_auto",
    "3d": "3d zero1",
    "3d tp2": "3d tp2 zero1",
    "3d pp2": "3d pp2 zero1",
}
MODELS = ("untied", "tied")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Cell:
    """The outcome of one writer and one reader; `error` is None, or the message or the difference."""

    model: str
    writer: str
    reader: str
    kind: str
    error: str | None
    figure: float | None = None

    def __str__(self) -> str:
        if self.error:
            return self.error
        if self.kind == "written":
            return "right"
        return "same bits" if not self.figure else f"{self.figure:.3f}"


def spec(name: str, home: Path, model: Path, parts: list[str], layout: str, *more: Any) -> dict:
    """A command for train_worker.py, with a layout of LAYOUTS and further flags."""
    of_layout = layouts.flags(f"bf16 {LAYOUTS[layout]}", "--save_interval", SAVED, *more, batch=GLOBAL_BATCH)
    words = [*training_jobs.common_flags(home, model, parts), *of_layout]
    return {"name": name, "script": "train.py", "flags": [str(word) for word in words]}


def weights_in(folder: Path) -> dict:
    """The tensors of a model folder, as they are stored."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def stored_wrong(folder: Path, *, tied: bool) -> str | None:
    """The difference from what transformers writes; None if there is none."""
    from transformers import AutoModelForCausalLM

    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    if set(index["weight_map"]) != names or (HEAD in names) == tied:
        return f"stores {HEAD}: {HEAD in names}, lists it: {HEAD in index['weight_map']}"
    _, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {kind: found for kind, found in report.items() if found}
    return f"transformers finds {wrong}" if wrong else None


def different(weights: dict, expected: dict) -> list[str]:
    """The names of tensors that are not bit-identical."""
    names = sorted(weights.keys() | expected.keys())
    return [
        name for name in names if name not in weights or name not in expected or not weights[name].equal(expected[name])
    ]


def judge_weights(written: Path, rewritten: Path) -> str | None:
    """The first tensor that a reader did not write as it had read it."""
    changed = different(weights_in(rewritten), weights_in(written))
    return f"changes {changed[0]}" if changed else None


def judge_resumed(start: Path, end: Path, resumed: Path) -> float:
    """The distance of a resumed run from the uninterrupted one, relative to the distance trained; 0 if identical."""
    first, expected, found = map(weights_in, (start, end, resumed))
    if not different(found, expected):
        return 0.0
    way = launching.distance(first, expected)
    return launching.distance({name: value.float() for name, value in found.items()}, expected) / way


def run(folder: Path, writers: list[str], models: list[str], readers: list[str] | None = None) -> list[Cell]:
    """Train, read and resume; every cell of the table."""
    readers = readers or writers
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    parts = training_jobs.write_data(folder / "data", tokenizer, STEPS)
    made = {name: tiny.make_model(folder / name, tokenizer, tie=name == "tied") for name in models}
    specs, cells = [], []
    for model in models:
        for writer in writers:
            home = folder / "runs" / f"{model} {writer}"
            specs.append(spec(f"{model} {writer}", home, made[model], parts, writer))
            saved = home / "ckpt" / f"epoch-0_step-{SAVED}"
            for reader in readers:
                name = f"{model} {writer} read by {reader}"
                there = folder / "runs" / name
                once = ["--load_checkpoint", saved / "modeling", "--max_steps", 1, "--lr", NO_RATE]
                specs.append(spec(name, there, made[model], parts, reader, *once))
                name = f"{model} {writer} resumed by {reader}"
                here = folder / "runs" / name
                specs.append(spec(name, here, made[model], parts, reader, "--load_checkpoint", saved))
    launching.launch(folder, specs)
    for one in specs:
        cells += _judged(folder, one["name"], json.loads((folder / f"{one['name']}.json").read_text())["error"])
    return cells


def _judged(folder: Path, name: str, error: str | None) -> list[Cell]:
    model, _, rest = name.partition(" ")
    ours = folder / "runs" / name / "ckpt" / "modeling"
    for word, kind in ((" read by ", "weights"), (" resumed by ", "resumed")):
        writer, found, reader = rest.partition(word)
        if not found:
            continue
        theirs = folder / "runs" / f"{model} {writer}" / "ckpt"
        saved = theirs / f"epoch-0_step-{SAVED}" / "modeling"
        figure = None
        if error is None and kind == "weights":
            error = judge_weights(saved, ours)
        elif error is None:
            figure = judge_resumed(saved, theirs / "modeling", ours)
            allowed = 0.0 if writer == reader else RESUMED_ALLOWED
            error = f"ends {figure:.3f} away" if figure > allowed else None
        return [Cell(model, writer, reader, kind, error, figure)]
    error = error or stored_wrong(ours, tied=model == "tied")
    return [Cell(model, rest, "", "written", error)]


def table(cells: list[Cell]) -> str:
    """A row per writer and a column per reader, for each model and kind."""
    lines = []
    for model, kind in dict.fromkeys((cell.model, cell.kind) for cell in cells):
        chosen = [cell for cell in cells if (cell.model, cell.kind) == (model, kind)]
        readers = list(dict.fromkeys(cell.reader for cell in chosen))
        lines += ["", f"{model}, {kind}", "".join(f"{word:>13}" for word in ["written by", *readers])]
        for writer in dict.fromkeys(cell.writer for cell in chosen):
            of_writer = {cell.reader: "FAILS" if cell.error else str(cell) for cell in chosen if cell.writer == writer}
            lines.append(f"{writer:>13}" + "".join(f"{of_writer[reader]:>13}" for reader in readers))
    failed = [cell for cell in cells if cell.error]
    lines += ["", *(f"{cell.model} {cell.writer} -> {cell.reader} {cell.kind}: {cell.error}" for cell in failed)]
    return "\n".join([*lines, f"{len(cells) - len(failed)} of {len(cells)} right"])


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.plugin_matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], help="who writes and who reads")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        cells = run(Path(folder), args.layouts, args.models)
    print(table(cells))
    return int(any(cell.error for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
