"""The time of ZeRO's and Gemini's exchanges between ranks on a CPU, relative to gloo's own collectives.

    python benchmarks/bench_collectives.py

Two and three ranks, one thread each, on 12 Mi numbers: a bucket of ZeRO. "sums" is reduce_scatter_tensor, "gather"
all_gather_into_tensor. Both implementations, that of gloo_collectives.py and PyTorch's, run in one process by turns.
The lower bound is the time to copy, within a process, the data that a rank receives. Three ranks need three cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, print_note  # noqa: E402

WAYS = ("gloo's own", "ours", "copy")


@dataclass(frozen=True)
class Size:
    """The numbers that are exchanged, the turns, and the numbers of ranks."""

    numbers: int = 12 * 2**20
    turns: int = 9
    ranks: tuple[int, ...] = (2, 3)


SMALLEST = Size(numbers=2**12, turns=1, ranks=(2,))


def main() -> None:
    """Measure each number of ranks in separate processes, and print a row for each exchange."""
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    if args.measure:
        measure(size)
        return
    print_note(args)
    print("exchange              ranks  ours / gloo's own  ours / a copy of what comes", flush=True)
    for ranks in size.ranks:
        for name, times in launch(ranks, is_smallest=args.smallest).items():
            own, ours, copy = (times[way] for way in WAYS)
            print(f"{name:20} {ranks:>6} {ours / own:>18.2f} {ours / copy:>28.2f}", flush=True)


def launch(ranks: int, *, is_smallest: bool) -> dict[str, dict[str, float]]:
    """The seconds of each exchange and implementation, measured by rank 0."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [__file__, "--measure", *(["--smallest"] if is_smallest else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout)


def measure(of: Size) -> None:
    """On one rank: the median time of each exchange in each implementation; rank 0 prints them."""
    import torch
    import torch.distributed as dist

    from colossal_llama2.engine.patches import cpu_device, gloo_collectives

    cpu_device.keep_freed_memory()
    dist.init_process_group("gloo")
    originals = dist.reduce_scatter_tensor, dist.all_gather_into_tensor
    gloo_collectives.install()
    functions = {"gloo's own": originals, "ours": (dist.reduce_scatter_tensor, dist.all_gather_into_tensor)}
    size = dist.get_world_size()
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.ones(of.numbers // size * size, dtype=dtype)
        part = torch.ones(of.numbers // size, dtype=dtype)
        coming, copied = torch.ones((2, (size - 1) * len(part)), dtype=dtype)
        for index, exchange in enumerate(("sums", "gather")):
            arguments = (part, whole) if exchange == "sums" else (whole, part)
            ways = {way: partial(do[index], *arguments) for way, do in functions.items()}
            ways["copy"] = partial(copied.copy_, coming)
            found[f"{exchange}, {str(dtype).split('.')[1]}"] = median_times(ways, of.turns)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def median_times(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The median over turns in which all ranks begin together, after one to warm up."""
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns + 1):
        for way, do in ways.items():
            dist.barrier()
            start = time.perf_counter()
            do()
            seconds[way].append(time.perf_counter() - start)
    return {way: median(times[1:]) for way, times in seconds.items()}


if __name__ == "__main__":
    main()
