"""The memory of loading a model and of saving a checkpoint, per rank and plugin, on models of growing size.

    python benchmarks/bench_checkpoints.py --work_dir /tmp/bench_checkpoints

train.py --benchmark, started on two ranks of the CPU in bf16, on random weights in four files. Memory is a rank's
anonymous memory (RssAnon, read 200 times a second), less what it has after its imports: what was allocated, without the
pages of mapped files, which the system can drop at any time. Of the rank with the most:

    held      after loading, and after a step, which makes the optimizer's states
    loading   the peak from the first read to the split model, over what is held then and one file of weights
    saving    the peak while weights, optimizer and master weights are written, over what is held then and one file

Files that are written have the size of a quarter of the weights. A ratio of 1.3 or less is the target: a rank then
needs hardly more than its share and one file.
"""

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench_memory  # noqa: E402
from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

# hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, tied embeddings.
MODELS = {
    "45 M": (512, 1376, 4, 8, 8, 32000, False),
    "161 M": (1024, 2752, 8, 16, 16, 29000, False),
    "330 M": (1024, 2752, 22, 16, 16, 32000, False),
}
PLUGINS = {
    "zero2": "--plugin zero2",
    "gemini": "--plugin gemini",
    "ddp": "--plugin ddp",
    "3d, zero 1": "--plugin 3d --zero 1",
    "3d, tp 2": "--plugin 3d --tp 2 --zero 1",
    "3d, pp 2": "--plugin 3d --pp 2 --zero 1 --micro_batch_size 2",
}
SMALLEST_MODEL = (64, 128, 2, 4, 4, 512, False)
SHARDS, RANKS, MIB = 4, 2, 2**20
REPORT = "BENCH_CHECKPOINTS"


def main() -> None:
    """Measure each plugin with each model, and print a line for it."""
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
        return
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, help="which (default: all)")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="which (default: all)")
    args = parser.parse_args()
    models = {"45 M": SMALLEST_MODEL} if args.smallest else {name: MODELS[name] for name in args.models or MODELS}
    work_dir = make_folder(parser, args.work_dir)
    try:
        print_note(args)
        print(
            f"{'MB per rank':20} model  held  loading  over share + file   held  saving  over share + file", flush=True
        )
        for name, sizes in models.items():
            for plugin in args.plugins or (["zero2"] if args.smallest else PLUGINS):
                folder = work_dir / name.replace(" ", "")
                if not folder.exists():
                    bench_memory.make_model(folder, *sizes, shards=SHARDS)
                size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
                print(line(f"{name}, {plugin}", size, run(folder, size, PLUGINS[plugin])), flush=True)
    finally:
        shutil.rmtree(work_dir)


def line(name: str, size: int, found: dict[str, int]) -> str:
    """One row of the table."""
    cells = []
    for phase in ("loading", "saving"):
        held, peak = found[f"held, {phase}"], found[phase]
        cells.append(f"{held / 1e6:>6,.0f} {peak / 1e6:>8,.0f} {peak / (held + size / SHARDS):>17.2f}")
    return f"{name:20} {size / 1e6:>5,.0f}{cells[0]} {cells[1]}"


def run(folder: Path, size: int, flags: str) -> dict[str, int]:
    """Bytes of the rank with the most."""
    words = ["--benchmark", "--pretrained", str(folder), "--max_length", "16", "--num_samples", "24"]
    words += ["--mixed_precision", "bf16", *flags.split()]
    saved = {"BENCH_SAVE_DIR": str(folder.with_name("saved")), "BENCH_SHARD_MIB": str(max(size // SHARDS // MIB, 1))}
    found = bench_memory.launch(words, RANKS, {**bench_memory.MALLOC, **saved}, script=__file__, marker=f'{{"{REPORT}"')
    shutil.rmtree(saved["BENCH_SAVE_DIR"], ignore_errors=True)
    return found


class Sampler(threading.Thread):
    """Reads this process's anonymous memory all the time, and keeps the most."""

    def __init__(self, base: int):
        super().__init__(daemon=True)
        self.base, self.peak = base, 0

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def now(self) -> int:
        """Bytes now."""
        return anonymous_bytes() - self.base

    def restart(self) -> int:
        """Forget the peak. Returns what is held now."""
        self.peak = held = self.now()
        return held


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(words: list[str]) -> None:
    """One rank: load, make steps, save, and report."""
    bench_memory.import_all(words)
    import train
    from colossal_llama2.engine.patches import checkpoint_io
    from colossal_llama2.train import benchmark

    checkpoint_io.SHARD_MIB = int(os.environ["BENCH_SHARD_MIB"])
    sampler, run_steps = Sampler(anonymous_bytes()), benchmark.measure
    sampler.start()

    def measure_saving(parts, **options):
        found = {REPORT: 0, "loading": sampler.peak, "held, loading": sampler.restart()}
        run_steps(parts, **options)
        found["held, saving"] = sampler.restart()
        save(parts.engine)
        found["saving"] = max(sampler.peak, sampler.now())
        # One write: ranks share their output, and print writes the end of a line by itself.
        os.write(1, (json.dumps(found) + "\n").encode())
        parts.engine.barrier()
        time.sleep(1)
        os._exit(0)

    benchmark.measure = measure_saving
    train.main(words)


def save(engine) -> None:
    """The tensors of a checkpoint, as CheckpointWriter writes them."""
    folder = Path(os.environ["BENCH_SAVE_DIR"])
    if engine.rank == 0:
        for part in ("model", "optimizer"):
            (folder / part).mkdir(parents=True)
    engine.barrier()
    engine.save_model(str(folder / "model"))
    engine.save_optimizer(str(folder / "optimizer"))
    engine.save_masters(str(folder / "masters"))


if __name__ == "__main__":
    main()
