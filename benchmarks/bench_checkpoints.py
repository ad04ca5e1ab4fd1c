"""The memory of loading a model, of saving a checkpoint and of resuming it, per rank and plugin, on growing models.

    python benchmarks/bench_checkpoints.py --work_dir /tmp/bench_checkpoints

train.py --benchmark, started on two ranks of the CPU in bf16, on random weights in four files. Memory is a rank's
anonymous memory (RssAnon, read 200 times a second), less what it has after its imports: what was allocated, without the
pages of mapped files, which the system can drop at any time. Of the rank with the most:

    held      after loading, and after a step, which makes the optimizer's states
    file      the largest file that is read, and that is written
    loading   the peak from the first read to the split model
    saving    the peak while weights, optimizer and master weights are written
    resuming  the peak while optimizer and master weights are read again; what is held and the files are those of saving
    ratio     of the peak to what is held and one file; 1.3 or less is the target

The largest model needs 20 GiB. Files are written with a quarter of the weights' size, but the states of a parameter are
never divided: the largest file has the moments of the embeddings.
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
    "941 M": (2048, 5504, 16, 16, 16, 32000, False),
}
# Two ranks of it need more than 24 GiB.
TOO_LARGE = [("941 M", "ddp")]
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
# With those whose peaks are compared with the same figures.
PHASES = {"loading": ("loading",), "saving": ("saving", "resuming")}


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
        columns = "".join(
            f"   held   file{''.join(f' {phase:>8}  ratio' for phase in PHASES[name])}" for name in PHASES
        )
        print(f"{'MB per rank':20} model{columns}", flush=True)
        for name, sizes in models.items():
            for plugin in args.plugins or (["zero2"] if args.smallest else PLUGINS):
                if (name, plugin) in TOO_LARGE:
                    continue
                folder = work_dir / name.replace(" ", "")
                if not folder.exists():
                    bench_memory.make_model(folder, *sizes, shards=SHARDS)
                size = sum(sizes_of_files(folder))
                print(line(f"{name}, {plugin}", size, run(folder, size, PLUGINS[plugin])), flush=True)
    finally:
        shutil.rmtree(work_dir)


def line(title: str, size: int, found: dict[str, int]) -> str:
    """One row of the table."""
    cells = ""
    for name, phases in PHASES.items():
        held, file = found[f"held, {name}"], found[f"file, {name}"]
        cells += f" {held / 1e6:>6,.0f} {file / 1e6:>6,.0f}"
        cells += "".join(f" {found[phase] / 1e6:>8,.0f} {found[phase] / (held + file):>6.2f}" for phase in phases)
    return f"{title:20} {size / 1e6:>5,.0f}{cells}"


def run(folder: Path, size: int, flags: str) -> dict[str, int]:
    """Bytes of the rank with the most, and of the largest files."""
    words = ["--benchmark", "--pretrained", str(folder), "--max_length", "16", "--num_samples", "24"]
    words += ["--mixed_precision", "bf16", *flags.split()]
    saved, shard = folder.with_name("saved"), max(size // SHARDS // MIB, 1)
    environment = {**bench_memory.MALLOC, "BENCH_SAVE_DIR": str(saved), "BENCH_SHARD_MIB": str(shard)}
    found = bench_memory.launch(words, RANKS, environment, script=__file__, marker=f'{{"{REPORT}"')
    found["file, loading"], found["file, saving"] = (max(sizes_of_files(place)) for place in (folder, saved))
    shutil.rmtree(saved)
    return found


def sizes_of_files(folder: Path) -> list[int]:
    """Bytes of the files of weights and states, without master weights, which each rank writes for itself."""
    return [path.stat().st_size for path in folder.rglob("*.safetensors") if path.parent.name != "masters"]


class Sampler(threading.Thread):
    """Reads this process's anonymous memory all the time, and keeps the most."""

    def __init__(self, base: int):
        super().__init__(daemon=True)
        self.base, self.peak = base, 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Until the process ends."""
        while True:
            # Between reading the peak and writing it, the other thread may not restart it.
            with self._lock:
                self.peak = max(self.peak, self.now())
            time.sleep(0.005)

    def now(self) -> int:
        """Bytes now."""
        return anonymous_bytes() - self.base

    def restart(self) -> int:
        """Forget the peak. Returns what is held now."""
        with self._lock:
            self.peak = held = self.now()
        return held


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure(words: list[str]) -> None:
    """One rank: load, make a step, save, resume, and report."""
    bench_memory.import_all(words)
    import train
    from colossal_llama2 import logs
    from colossal_llama2.engine.patches import checkpoint_io
    from colossal_llama2.train import benchmark
    from colossal_llama2.train.stepping.step_timer import NoTimer

    checkpoint_io.SHARD_MIB = int(os.environ["BENCH_SHARD_MIB"])
    sampler = Sampler(anonymous_bytes())
    sampler.start()

    def measure_saving(parts, **options):
        found = {REPORT: 0, "loading": sampler.peak, "held, loading": sampler.restart()}
        benchmark._Steps(parts, parts.loader.steps(0, 0), NoTimer()).run_one(logs.SilentProgress())
        found["held, saving"] = sampler.restart()
        save(parts.engine)
        found["saving"] = max(sampler.peak, sampler.now())
        sampler.restart()
        resume(parts.engine)
        found["resuming"] = max(sampler.peak, sampler.now())
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


def resume(engine) -> None:
    """Read what `save` wrote of the optimizer, as a resumed run does."""
    folder = Path(os.environ["BENCH_SAVE_DIR"])
    engine.barrier()
    engine.load_optimizer(str(folder / "optimizer"))
    engine.load_masters(str(folder / "masters"))


if __name__ == "__main__":
    main()
