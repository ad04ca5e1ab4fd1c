"""Does ColossalAI's Adam build here, does it equal PyTorch's, and how fast is it beside PyTorch's fused one?

Building is a part of the run of its own, which all training parts need; they do not need the comparison.
"""

import argparse
import time

from tests.gpu.parts import print_figures

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEPS, TIMED_STEPS = 5, 20
# Relative difference of weights that counts as rounding, in float32.
ALLOWED = 1e-5


def main() -> None:
    """Build, or compare and time; ends with code 1 if the weights differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.adam", description=__doc__.splitlines()[0])
    parser.add_argument("--compare", metavar="N", type=int, help="compare with PyTorch's, and time, over N weights")
    args = parser.parse_args()

    from colossal_llama2.engine.process_group import current_device, launch, leave

    launch(1024)
    device = current_device()
    if args.compare is None:
        start = time.monotonic()
        (ours, _), _ = make_adams(1024, device)
        seconds = time.monotonic() - start
        leave()
        print_figures(build_seconds=seconds, is_compiled=is_compiled(ours))
        return
    differences = {place: difference(place) for place in sorted({"cpu", device.type})}
    ratio = time_ratio(args.compare, device)
    leave()
    pairs = {place: [found, ALLOWED] for place, found in differences.items()}
    print_figures(differences=pairs, time_over_pytorch=ratio)
    wrong = [place for place, found in differences.items() if not found <= ALLOWED]
    if wrong:
        raise SystemExit(f"AssertionError: Adam's weights differ from PyTorch's on {', '.join(wrong)}")


def make_adams(size: int, device):
    """ColossalAI's Adam as the suite makes it, and PyTorch's, over equal weights; each with its weight."""
    import torch

    from colossal_llama2.engine.adam import make_adam

    torch.manual_seed(0)
    model = torch.nn.Linear(size // 1024, 1024, bias=False, device=device)
    other = model.weight.detach().clone().requires_grad_()
    ours = make_adam(model, learning_rate=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"])
    return (ours, model.weight), (torch.optim.AdamW([other], fused=True, **SETTINGS), other)


def is_compiled(adam) -> bool:
    """Whether all kernels of a HybridAdam are ColossalAI's own, and none of those that replace them."""
    from colossal_llama2.engine.patches import adam_kernels

    return not adam_kernels.is_replaced(adam)


def difference(place: str) -> float:
    """Norm of the difference of the weights after a few steps, over their norm."""
    import torch

    pairs = make_adams(2**16, torch.device(place))
    for step in range(STEPS):
        gradient = torch.randn(pairs[0][1].shape, generator=torch.Generator().manual_seed(step)).to(place)
        for optimizer, weight in pairs:
            weight.grad = gradient.clone()
            optimizer.step()
    ours, other = (weight.detach().double() for _, weight in pairs)
    return float((ours - other).norm() / other.norm())


def time_ratio(parameters: int, device) -> float:
    """Seconds of ColossalAI's steps over those of PyTorch's fused AdamW, by turns."""
    import torch

    pairs = make_adams(parameters, device)
    seconds = [0.0, 0.0]
    for _, weight in pairs:
        weight.grad = torch.full_like(weight, 1e-3)
    for step in range(TIMED_STEPS):
        for index, (optimizer, _) in enumerate(pairs):
            synchronize()
            start = time.perf_counter()
            optimizer.step()
            synchronize()
            # The first step allocates the moments.
            seconds[index] += time.perf_counter() - start if step else 0.0
    return seconds[0] / seconds[1]


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
