"""What a step costs a GPU and the host besides the model's own work: counts beside those of a bare PyTorch loop.

    python benchmarks/bench_operations.py --work_dir /tmp/bench_operations

One step of each plugin after warm-up, on two ranks of the CPU, in bf16. Two models with different numbers of layers,
from which follow the counts per layer and the constant part, and so the ratio for a 7B model's 32 layers. Counts do not
depend on the width, nor on the machine.

- operations: calls that start a kernel on a GPU. Views, allocations and reads by the host are none. What one kernel
  does on a GPU and this project does in several operations on a CPU counts as one (KERNELS). So does one call for many
  tensors (`_foreach`), for which a GPU starts several kernels if they are many or large.
- copies: those of them that move or convert data without computing.
- waits: values that the host reads. On a GPU it waits until they are there.
- exchanges: collectives.
- host: CPU time of the step's thread, less a bare loop's forward and backward, over the same of the bare loop. The
  kernels of these models are so short that most of it is Python and PyTorch's dispatcher. A median of many steps.

The bare loop is that of bench_training.py: AdamW on float32 copies of the weights, clipping, no communication. Every
process measures it as well. Each plugin runs twice: with the loss in chunks, as is the default, and with
--chunked_loss off. The chunks save memory and are many operations; on a GPU, Liger's kernel replaces them.

--places prints which lines of code the operations come from, per layer and for the constant part; lines of the model's
own forward and backward are left out.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_training import PLUGINS, launch  # noqa: E402
from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

VOCABULARY, LENGTH, BATCH = 512, 64, 2
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
LARGE_LAYERS = 32
CHUNKED = {"chunked": (), "whole logits": ("--chunked_loss", "off")}

# Operations that start no kernel, besides views.
NO_KERNEL = {
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "_reshape_alias"),
    *("lift_fresh", "set_", "resize_", "detach_", "is_pinned", "record_stream", "_local_scalar_dense"),
}
COPIES = {"copy_", "_to_copy", "clone", "cat", "stack", "constant_pad_nd", "_foreach_copy_"}
# Operations in which the host waits for a result, and methods of tensors that copy to the host.
WAITS = {"_local_scalar_dense", "nonzero", "equal"}
WAITING_METHODS = ("tolist", "numpy")
# This project's replacements of collectives, whose messages and sums are one exchange for each call.
COLLECTIVES = ("reduce_scatter", "all_to_all", "reduce_scatter_tensor", "all_gather_into_tensor")
COLLECTIVES_FILE = "colossal_llama2/engine/patches/gloo_collectives.py"
# File and function of what replaces one GPU kernel: an unbroken run of operations from here counts as one.
KERNELS = (
    ("colossal_llama2/engine/patches/cpu_device.py", None),
    ("colossal_llama2/engine/patches/adam_kernels.py", None),
    ("colossal_llama2/engine/patches/bug_fixes.py", "promote_gradients"),
)
# A line of code is named by the innermost frame of one of these packages.
PACKAGES = ("/colossalai/", "/colossal_llama2/", "/transformers/", "/torch/optim/", "/torch/nn/utils/", "/benchmarks/")
MODEL = ("transformers/", "colossal_llama2/engine/llama_forward.py")
BACKWARD = "backward"
OWN_FRAMES = (
    "__torch_dispatch__",
    "__torch_function__",
    "count",
    "place_of_call",
    "counting_method",
    "counting_collective",
)


@dataclass(frozen=True)
class Size:
    """The layers of both models, the steps before the counted one, those that are timed, and the plugins."""

    layers: tuple[int, int] = (2, 6)
    warmup_steps: int = 3
    timed_steps: int = 21
    plugins: tuple[str, ...] = tuple(PLUGINS)


SMALLEST = Size(layers=(1, 2), warmup_steps=1, timed_steps=1, plugins=("zero2",))


def main() -> None:
    """Count the operations of each plugin and print a table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, help="which (default: all)")
    parser.add_argument("--places", action="store_true", help="print the lines of code that operations come from")
    add_smallest(parser)
    parser.add_argument("--measure", choices=PLUGINS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    if args.measure:
        measure_here(PLUGINS[args.measure], args.work_dir, size)
        return
    work_dir = make_folder(parser, args.work_dir)
    try:
        print_note(args)
        for layers in size.layers:
            make_model(work_dir / str(layers), layers)
        print_titles(size.layers)
        script = [__file__, "--work_dir", str(work_dir), *(["--smallest"] if args.smallest else [])]
        for name in args.plugins or size.plugins:
            printed = launch([*script, "--measure", name])
            found = json.loads(printed[printed.index('{"bare"') :].splitlines()[0])
            print_plugin(name, found, size.layers, places=args.places)
    finally:
        shutil.rmtree(work_dir)


def make_model(folder: Path, layers: int) -> None:
    """Write a LLaMA of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=LENGTH, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure_here(flags: tuple[str, ...], models: Path, size: Size) -> None:
    """Count on this rank; rank 0 prints one line of JSON: variant -> one record for each number of layers."""
    from colossal_llama2 import logs
    from colossal_llama2.engine.process_group import launch, leave

    logs.configure_logging()
    logs.get_logger().setLevel("ERROR")
    launch(seed=1)
    found: dict[str, list[dict]] = {"bare": [], **{name: [] for name in CHUNKED}}
    for layers in size.layers:
        found["bare"].append(measured(bare_step(models / str(layers)), size))
        for name, more in CHUNKED.items():
            step = plugin_step(models / str(layers), (*flags, *more))
            found[name].append(measured(step, size, offloads=offloads(flags)))
    if os.environ["RANK"] == "0":
        # One write: ranks share their output.
        os.write(1, (json.dumps(found) + "\n").encode())
    leave()


def token_ids():
    """(BATCH, LENGTH) random token ids."""
    import torch

    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def bare_step(model_dir: Path) -> Callable[[], float]:
    """A function that makes one step of a plain loop, and returns the CPU seconds of its forward and backward."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_dir, torch_dtype=torch.bfloat16, attn_implementation="sdpa")
    working = list(model.parameters())
    masters = [param.detach().float().requires_grad_() for param in working]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    ids = token_ids()

    def step() -> float:
        start = time.thread_time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        seconds = time.thread_time() - start
        for master, param in zip(masters, working, strict=True):
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_([param.data for param in working], [master.data for master in masters])
        loss.item()
        return seconds

    return step


def plugin_step(model_dir: Path, flags: tuple[str, ...]) -> Callable[[], float]:
    """A function that makes one step of train.py with these flags, and returns 0."""
    import torch

    from colossal_llama2.cli import train_flags
    from colossal_llama2.dataset.read.batch import Batch
    from colossal_llama2.model.neftune import NoNoise
    from colossal_llama2.train.checks import JobChecks
    from colossal_llama2.train.inputs import open_benchmark_inputs
    from colossal_llama2.train.load_weights import attention_of, load_weights
    from colossal_llama2.train.settings.from_flags import resolve
    from colossal_llama2.train.stepping.step import step_totals, train_step
    from colossal_llama2.train.stepping.stopping import NoSignals

    samples = BATCH * 64
    words = ["--benchmark", "--pretrained", model_dir, "--max_length", LENGTH, "--num_samples", samples]
    words += ["--micro_batch_size", BATCH, "--mixed_precision", "bf16", *flags]
    config = resolve(train_flags.train_parser().parse_args([str(word) for word in words]))
    inputs = open_benchmark_inputs(config, JobChecks(), num_samples=samples)
    load_weights(config, inputs.engine, inputs.model, attention=attention_of(config))
    ids, lengths = token_ids(), torch.full((BATCH,), LENGTH)
    batches = [Batch(ids, ids, attention_mask=None, lengths=lengths, predicted=BATCH * (LENGTH - 1))]

    totals = step_totals(inputs.engine, batches, NoSignals())

    def step() -> float:
        train_step(inputs.engine, batches, totals, noise=NoNoise(), step=0)
        return 0.0

    return step


def offloads(flags: tuple[str, ...]) -> bool:
    """Whether a plugin keeps something in the host's memory, so that a copy to a device of the same type is one."""
    return not {"zero2", "3d", "ddp"}.intersection(flags)


def measured(step: Callable[[], float], size: Size, *, offloads: bool = False) -> dict[str, Any]:
    """Counts of one step after some others, and median CPU seconds of many: of all of it, and of what it returns."""
    for _ in range(size.warmup_steps):
        step()
    counter = counter_of(offloads=offloads)
    with plain_backward(), counting_waits(counter), counting_collectives(counter), counter:
        step()
    seconds, model_seconds = [], []
    for _ in range(size.timed_steps):
        start = time.thread_time()
        model_seconds.append(step())
        seconds.append(time.thread_time() - start)
    times = {"seconds": median(seconds), "model_seconds": median(model_seconds)}
    return {**counter.counts, **times, "places": counter.places}


def counter_of(*, offloads: bool) -> Any:
    """A context that counts operations by what they are, in `counts`, and by place, in `places`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class OperationCounter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.counts = Counter(operations=0, copies=0, waits=0, exchanges=0)
            self.places: Counter[str] = Counter()
            self.in_kernel = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

        def count(self, func, args, kwargs) -> None:
            """Add one call of an operation."""
            space, _, name = func._schema.name.partition("::")
            place, is_kernel = place_of_call()
            self.counts["waits"] += name in WAITS
            if place.startswith(COLLECTIVES_FILE) or space == "profiler" or func.is_view or name in NO_KERNEL:
                return
            was_in_kernel, self.in_kernel = self.in_kernel, is_kernel
            if space == "c10d":
                self.counts["exchanges"] += 1
            elif not (is_kernel and was_in_kernel) and (offloads or not only_moves(name, args, kwargs)):
                self.counts["operations"] += 1
                self.counts["copies"] += name in COPIES and not is_kernel
                self.places[place] += 1

    return OperationCounter()


def only_moves(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy has the dtype of its source: on a CPU "cpu:0" is another device than "cpu"."""
    return name == "_to_copy" and kwargs.get("device") is not None and kwargs.get("dtype") in (None, args[0].dtype)


def place_of_call() -> tuple[str, bool]:
    """PACKAGE/FILE:LINE of the operation that is being counted, or `BACKWARD`, and whether it is one of KERNELS."""
    place, frame = "", sys._getframe(1)
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        package = next((name for name in PACKAGES if name in path), None)
        if function == "_engine_run_backward" and not place:
            return BACKWARD, False
        if package is not None and function not in OWN_FRAMES:
            file = path[path.rindex(package) + 1 :]
            place = place or f"{file}:{frame.f_lineno}"
            if file == COLLECTIVES_FILE:
                return f"{file}:{frame.f_lineno}", False
            if any(file == own and name in (None, function) for own, name in KERNELS):
                return place, True
        frame = frame.f_back
    return place, False


@contextmanager
def plain_backward() -> Iterator[None]:
    """Within it, Gemini's tensors call autograd directly. Under a dispatch mode their way there has no end."""
    import torch
    from colossalai.tensor.colo_tensor import ColoTensor

    usual = ColoTensor.__torch_function__.__func__

    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.backward:
            return torch.autograd.backward(args[0])
        return usual(cls, func, types, args, kwargs)

    with mock.patch.object(ColoTensor, "__torch_function__", classmethod(__torch_function__)):
        yield


@contextmanager
def counting_waits(counter: Any) -> Iterator[None]:
    """Within it, methods by which the host reads tensors are counted, which are no operations on a CPU."""
    import torch

    def counting(method):
        def counting_method(*args, **kwargs):
            counter.counts["waits"] += 1
            return method(*args, **kwargs)

        return counting_method

    with ExitStack() as stack:
        for name in WAITING_METHODS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counting(getattr(torch.Tensor, name))))
        yield


@contextmanager
def counting_collectives(counter: Any) -> Iterator[None]:
    """Within it, each call of this project's collectives counts as one exchange, also where one calls another."""
    import torch.distributed as dist

    depth = 0

    def counting(collective):
        def counting_collective(*args, **kwargs):
            nonlocal depth
            counter.counts["exchanges"] += depth == 0
            depth += 1
            try:
                return collective(*args, **kwargs)
            finally:
                depth -= 1

        return counting_collective

    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, counting(getattr(dist, name))))
        yield


def split(records: list[dict[str, Any]], figure: str, layers: tuple[int, int]) -> tuple[float, float]:
    """The part of a count for each layer, and the constant part."""
    few, many = layers
    by_layer = (records[1][figure] - records[0][figure]) / (many - few)
    return by_layer, records[0][figure] - by_layer * few


def print_titles(layers: tuple[int, int]) -> None:
    """The head of the table."""
    print("                         operations       over bare, at layers      copies           waits  exchanges  host")
    large = "".join(f"{count:>7}" for count in (*layers, LARGE_LAYERS))
    print(
        f"                         layer  constant  {large}    layer  constant                   over bare", flush=True
    )


def print_plugin(name: str, found: dict[str, list[dict[str, Any]]], layers: tuple[int, int], *, places: bool) -> None:
    """The rows of one plugin, and of the bare loop before the first."""
    bare = found["bare"]
    outside = bare[1]["seconds"] - bare[1]["model_seconds"]
    for variant, records in found.items():
        ratios = []
        for count in (*layers, LARGE_LAYERS):
            own, theirs = (split(of, "operations", layers) for of in (records, bare))
            ratios.append((own[0] * count + own[1]) / (theirs[0] * count + theirs[1]))
        parts = (split(records, figure, layers) for figure in ("operations", "copies"))
        counts, copies = ("{:5.1f}  {:8.1f}".format(*part) for part in parts)
        host = (records[1]["seconds"] - bare[1]["model_seconds"]) / outside
        title = "bare" if variant == "bare" else f"{name}, {variant}"
        shares = "".join(f"{ratio:7.2f}" for ratio in ratios)
        rest = f"{records[1]['waits']:7}  {records[1]['exchanges']:9}  {host:9.1f}"
        print(f"{title:24} {counts}  {shares}    {copies}  {rest}", flush=True)
        if places and variant != "bare":
            print_places(records, layers)


def print_places(records: list[dict[str, Any]], layers: tuple[int, int]) -> None:
    """The lines of code outside the model from which operations come."""
    lines = sorted({place for record in records for place in record["places"] if not place.startswith(MODEL)})
    for place in lines:
        by_layer, constant = split([record["places"] for record in map(with_zeros(place), records)], place, layers)
        print(f"    {place:110} {by_layer:5.1f}  {constant:5.1f}", flush=True)


def with_zeros(place: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function that adds a place to a record that lacks it."""
    return lambda record: {"places": {place: 0, **record["places"]}}


if __name__ == "__main__":
    main()
