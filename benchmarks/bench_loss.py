"""The memory and time of the output head and its loss: in blocks of the vocabulary, relative to all logits at once.

    python benchmarks/bench_loss.py

4,096 tokens, a vocabulary of 69,104, float32, forward and backward on this machine's CPU, each in a separate process.
Memory is the peak of the process (VmHWM) minus its memory before the step and the two gradients, which remain in any
case. Time is that of one CPU core. Needs 8 GB and only requirements.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, print_note  # noqa: E402

WAYS = ("logits", "chunked")


@dataclass(frozen=True)
class Size:
    """Tokens, pieces, and hidden sizes."""

    tokens: int = 4096
    vocabulary: int = 69_104
    widths: tuple[int, ...] = (512, 1024)


SMALLEST = Size(tokens=1024, vocabulary=8192, widths=(32,))


def main() -> None:
    """Measure each case both ways and print the ratios."""
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    if args.measure:
        print(json.dumps(measured(args.measure, args.width, size)))
        return
    print_note(args)
    print("hidden size    memory    time    loss differs by    gradients' norms by")
    for width in size.widths:
        logits, chunked = (run(way, width, is_smallest=args.smallest) for way in WAYS)
        memory, seconds = (chunked[name] / logits[name] for name in ("bytes", "seconds"))
        loss = abs(chunked["loss"] / logits["loss"] - 1)
        norms = max(abs(a / b - 1) for a, b in zip(chunked["norms"], logits["norms"], strict=True))
        print(f"{width:>11,}{memory:>10.3f}{seconds:>8.2f}{loss:>19.1e}{norms:>23.1e}", flush=True)


def run(way: str, width: int, *, is_smallest: bool) -> dict:
    """Measure in a new process, since a peak covers the lifetime of a process."""
    command = [sys.executable, __file__, "--measure", way, "--width", str(width)]
    command += ["--smallest"] if is_smallest else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout)


def measured(way: str, width: int, size: Size) -> dict:
    """Memory in bytes, seconds, loss and the norms of both gradients."""
    import torch

    torch.manual_seed(0)
    hidden = torch.randn(size.tokens, width).requires_grad_()
    weight = (torch.randn(size.vocabulary, width) / width**0.5).requires_grad_()
    targets = torch.randint(size.vocabulary, (size.tokens,))
    step(way, hidden[:64], weight[:512], targets[:64] % 512)
    # 5 resets the peak to the present value.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_field("VmRSS")
    start = time.process_time()
    loss, gradients = step(way, hidden, weight, targets)
    seconds = time.process_time() - start
    peak = memory_field("VmHWM") - before - sum(value.numel() * value.element_size() for value in gradients)
    norms = [float(value.norm()) for value in gradients]
    return {"bytes": peak, "seconds": seconds, "loss": float(loss), "norms": norms}


def step(way: str, hidden, weight, targets):
    """Forward and backward; returns the summed loss and the gradients of both."""
    import torch

    from colossal_llama2.engine.chunked_loss import HeadPart, chunked_cross_entropy

    if way == "chunked":
        loss = chunked_cross_entropy(hidden, weight, targets, HeadPart(0, len(weight)))
    else:
        # As in transformers.
        logits = (hidden @ weight.T).float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        del logits
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


def memory_field(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
