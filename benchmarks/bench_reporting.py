"""What it costs to show a run: a step with TensorBoard, train_log.jsonl, lines and losses by source, or without.

    python benchmarks/bench_reporting.py --work_dir /tmp/bench_reporting

One rank, plugin zero2, on the CPU or the first GPU. Runs with and without take turns, over the same samples, and the
median step of each kind is compared, by the clock and by the CPU time of all threads, which a busy machine changes
less.
The smaller the model, the more shows.
"""

import dataclasses
import itertools
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

from colossal_llama2 import logs  # noqa: E402
from colossal_llama2.cli import train_flags  # noqa: E402
from colossal_llama2.train.stepping.silent_reporter import SilentReporter  # noqa: E402

VOCABULARY, LENGTH = 8000, 256
MODELS = {
    "0.6 M": {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "8 M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4},
}
GROUPS = [(f"source{number % 4}", f"category{number % 6}") for number in range(12)]


@dataclasses.dataclass(frozen=True)
class Size:
    """The steps of a run, those before the measured ones, the runs of each kind, and the models."""

    steps: int = 40
    warmup_steps: int = 5
    turns: int = 3
    models: tuple[str, ...] = tuple(MODELS)


SMALLEST = Size(steps=4, warmup_steps=1, turns=1, models=("0.6 M",))


def main() -> None:
    """Measure each model and print a row for it."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    add_smallest(parser)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    from colossal_llama2.engine.process_group import launch, leave

    work_dir = make_folder(parser, args.work_dir)
    print_note(args)
    # As on a cluster, where stderr is a file.
    logs.configure_logging()
    logs.get_logger().setLevel("ERROR")
    try:
        launch(seed=1)
        part = make_data(work_dir / "part-00000", size.steps)
        print("model     step with / without  CPU with / without  CPU time of showing a step")
        for name in size.models:
            model_dir = make_model(work_dir / name.replace(" ", ""), MODELS[name])
            seconds: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
            for turn in range(size.turns):
                for kind, steps in seconds.items():
                    found = step_seconds(work_dir / f"{name}-{kind}-{turn}", model_dir, part, kind)
                    steps += found[size.warmup_steps :]
            (clock, busy), (silent_clock, silent_busy) = (
                [statistics.median(values) for values in zip(*steps, strict=True)] for steps in seconds.values()
            )
            ratios = f"{clock / silent_clock:19.3f}  {busy / silent_busy:18.3f}"
            print(f"{name:8}  {ratios}  {1e3 * (busy - silent_busy):.2f} ms of {1e3 * busy:.1f} ms", flush=True)
        leave()
    finally:
        shutil.rmtree(work_dir)


def make_model(folder: Path, shape: dict[str, int]) -> Path:
    """Write a LLaMA of random weights, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import tiny

    tiny.make_tokenizer(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **shape)).save_pretrained(folder)
    return folder


def make_data(folder: Path, count: int) -> Path:
    """Full samples of random tokens, four documents each."""
    import datasets
    import numpy as np

    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        ids = random.integers(3, 500, LENGTH).tolist()
        sources, categories = zip(*(GROUPS[(number + i) % len(GROUPS)] for i in range(4)), strict=True)
        rows.append(
            {
                "input_ids": ids,
                "labels": ids,
                "sequence_lengths": [LENGTH // 4] * 4,
                "document_sources": list(sources),
                "document_categories": list(categories),
            }
        )
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


class Clock(SilentReporter):
    """A run's reporter, with a note of when it has shown each step: by the clock, and in CPU time."""

    def __init__(self, reporter: SilentReporter):
        self._reporter, self.timer = reporter, reporter.timer
        self.ends: list[tuple[float, float]] = []

    def step(self, *args, **keywords) -> None:
        self._reporter.step(*args, **keywords)
        self.ends.append((time.perf_counter(), time.process_time()))


def step_seconds(home: Path, model_dir: Path, part: Path, kind: str) -> list[tuple[float, float]]:
    """Run once; returns the time of each step but the first one, by the clock and of the CPU."""
    from colossal_llama2.train.build_run import build_run, make_record
    from colossal_llama2.train.checkpointing import resuming
    from colossal_llama2.train.checks import JobChecks
    from colossal_llama2.train.inputs import open_inputs
    from colossal_llama2.train.loop import fit
    from colossal_llama2.train.settings.from_flags import resolve
    from colossal_llama2.train.stepping.stopping import NoSignals

    flags = ["--pretrained", model_dir, "--dataset", part, "--max_length", LENGTH, "--micro_batch_size", 1]
    flags += ["--plugin", "zero2", "--mixed_precision", "fp32", "--save_dir", home / "ckpt", "--peak_tflops", 1]
    flags += ["--tensorboard_dir", home / "tb", "--config_file", home / "config.json", "--use_flash_attn"]
    config = resuming.settle(resolve(train_flags.train_parser().parse_args([str(flag) for flag in flags])))
    inputs = open_inputs(config, JobChecks())
    record = make_record(config, inputs)
    with build_run(config, inputs, record, NoSignals(), reports=kind == "with") as parts:
        clock = Clock(parts.reporter)
        fit(inputs.start.state, dataclasses.replace(parts, reporter=clock), num_epochs=config.recipe.num_epochs)
    return [(end[0] - begin[0], end[1] - begin[1]) for begin, end in itertools.pairwise(clock.ends)]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
