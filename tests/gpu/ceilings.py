"""How fast is this device at most? A large matrix product, a large copy, and copies from the host, by PyTorch."""

import argparse
import time
from collections.abc import Callable

from tests.gpu.adam import synchronize
from tests.gpu.parts import print_figures

WARMUP, REPEATS = 3, 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.ceilings", description=__doc__)
    parser.add_argument("--width", type=int, required=True, help="rows and columns of the matrices")
    parser.add_argument("--copied_bytes", type=int, required=True, help="size of what is copied")
    args = parser.parse_args()

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # On zeros, some GPUs are faster than on data.
    left, right = (torch.randn(args.width, args.width, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: left @ right)
    source = torch.ones(args.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source))
    on_host = torch.ones(args.copied_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
    from_host = seconds_of(lambda: target.copy_(on_host, non_blocking=True))
    print_figures(
        matmul_tflops=2 * args.width**3 / product / 1e12,
        copy_bytes_per_second=2 * args.copied_bytes / copy,
        from_host_bytes_per_second=args.copied_bytes / from_host,
    )


def seconds_of(call: Callable[[], object]) -> float:
    """Mean seconds of a call, after some to warm up."""
    for _ in range(WARMUP):
        call()
    synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    synchronize()
    return (time.perf_counter() - start) / REPEATS


if __name__ == "__main__":
    main()
