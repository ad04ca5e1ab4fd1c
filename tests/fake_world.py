"""Build rank 0 of a large job with ColossalAI's own plugins, and compare what it holds with the memory forecast.

    python -m tests.fake_world                                    a 7B on 64 ranks, in the layouts of LAYOUTS
    python -m tests.fake_world --layers 2 --only zero2 "3d tp8"   fewer layers, and all layouts that begin so

Nothing is sent and no memory is allocated: PyTorch's fake process group has as many ranks as it is given, and all
tensors are on the meta device. The engine is the one of training, so what is counted is what its plugin keeps after
boosting and one update: half-precision weights, and in float32 master weights and, except for Gemini, Adam's moments.
Activations and gradients are not counted; benchmarks/bench_memory.py measures them.

zero2_cpu and gemini_auto may fail to be built, since they offload to a host whose memory is real; they are listed with
the error that ends them. The command ends with 1 if another layout cannot be built, or if one that was built holds more
than 2 % more or less than its forecast.
"""

import argparse
import contextlib
import gc
import os
import sys
import time
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.plugin_names import GEMINI, GEMINI_AUTO, ZERO2_CPU
from colossal_llama2.tables import print_table
from colossal_llama2.train.forecast.layouts import label, layouts
from colossal_llama2.train.forecast.memory import constant_memory
from colossal_llama2.train.forecast.suggestion import Job, plans
from tests.scaling_page import job

LAYOUTS = (
    "gemini",
    "gemini_auto",
    "zero2",
    "zero2_cpu",
    "ddp",
    "3d zero1",
    "3d zero2",
    "3d zero0",
    "3d sp4 zero1",
    "3d tp8 zero1",
    "3d tp8 split_gather zero1",
    "3d pp8 zero1",
    "3d tp2 pp4 sp2 zero1",
)
ALLOWED = 0.02
# Plugins that offload to a host whose memory is real.
MAY_FAIL = (GEMINI_AUTO, ZERO2_CPU)
COLLECTIVES = (
    "barrier",
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "reduce_scatter",
)


class _Sent:
    """The handle of a message that is complete."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _send_nothing(*tensors: Any, async_op: bool = False, **options: Any) -> _Sent | None:
    return _Sent() if async_op else None


def prepare() -> None:
    """Import ColossalAI and apply the changes to it, as `engine.process_group.launch` does."""
    warnings.filterwarnings("ignore")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    # What is left of a plugin that could not be built fails in its destructor.
    sys.unraisablehook = lambda _: None
    from colossal_llama2.engine.patches import placeholders

    placeholders.import_colossalai()
    from colossal_llama2.engine.patches import adam_kernels, bug_fixes, cpu_device

    cpu_device.install()
    adam_kernels.install()
    bug_fixes.install()


@contextlib.contextmanager
def world(ranks: int) -> Iterator[None]:
    """A process group in which this process is rank 0 and no other rank exists, and whose device is meta.

    Collectives are replaced, since tensors without content have nothing to send. All ranks have the same JSON values,
    such as their host's name. Gemini's chunks stay where they are made.
    """
    import torch
    import torch.distributed as dist
    from colossalai.accelerator import get_accelerator
    from colossalai.device.device_mesh import DeviceMesh
    from colossalai.shardformer.layer.utils import Randomizer
    from colossalai.zero.gemini.chunk.chunk import Chunk
    from torch.nn.parallel import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from colossal_llama2.engine import adam, engine
    from colossal_llama2.engine.ranks import collectives

    meta, accelerator = torch.device("meta"), type(get_accelerator())

    def same_values(value: Any) -> list[Any]:
        return [value] * ranks

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    with contextlib.ExitStack() as replaced:
        for owner, name, new in (
            *((dist, name, _send_nothing) for name in COLLECTIVES),
            (collectives, "gather_values", same_values),
            (collectives, "max_over_ranks", lambda value: value),
            (adam, "gather_values", same_values),
            (accelerator, "get_current_device", lambda _: meta),
            (engine, "current_device", lambda: meta),
            (Randomizer, "is_randomizer_index_synchronized", lambda *arguments: True),
            (distributed, "_verify_param_shape_across_processes", lambda *arguments: None),
            (distributed, "_sync_module_states", lambda *arguments, **options: None),
            (Chunk, "shard_move", lambda *arguments, **options: None),
        ):
            replaced.enter_context(unittest.mock.patch.object(owner, name, new))
        # By which it finds the device of a group.
        replaced.enter_context(unittest.mock.patch.dict(DeviceMesh._DIST_BACKEND, {"cpu": "fake"}))
        try:
            yield
        finally:
            dist.destroy_process_group()


def held_bytes(settings: EngineSettings, planned: Job) -> Counter:
    """Bytes that rank 0 of a layout holds after boosting and an update, by dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from colossal_llama2.engine import adam
    from colossal_llama2.engine.engine import Engine

    engine = Engine(settings, planned.facts.parameters)
    config = LlamaConfig(**planned.fields)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    engine.boost(model)
    adam.begin_moments(engine.optimizer.optim, without_gradient=True)
    del model
    gc.collect()
    # Several tensors may share a storage.
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.is_meta:
            storage = found.untyped_storage()
            storages[storage._cdata] = (str(found.dtype).removeprefix("torch."), storage.nbytes())
    sizes: Counter = Counter()
    for dtype, size in storages.values():
        sizes[dtype] += size
    return sizes


def row(settings: EngineSettings, planned: Job) -> tuple[list[str], bool]:
    """The layout in the table: figures or the error, and whether all is as forecast."""
    plan, _ = next(plans(settings, planned))
    forecast = constant_memory(planned.shape, replace(plan, on_cpu=True))
    states = forecast["master weights"]
    if settings.plugin not in (GEMINI, GEMINI_AUTO):
        # Gemini hands its optimizer the parts of chunks only while it makes a step.
        states += forecast["optimizer"]
    started = time.perf_counter()
    try:
        with world(planned.ranks):
            sizes = held_bytes(plan.settings, planned)
    except Exception as error:
        return [label(settings), _reason(error)], settings.plugin in MAY_FAIL
    finally:
        gc.collect()
    seconds = time.perf_counter() - started
    pairs = [(sizes["bfloat16"], forecast["weights"]), (sizes["float32"], states)]
    cells = [cell for held, wanted in pairs for cell in (gib(held), gib(wanted), f"{held / wanted:.3f}")]
    is_equal = all(abs(held / wanted - 1) <= ALLOWED for held, wanted in pairs)
    return [label(settings), *cells, f"{seconds:.0f}"], is_equal


def _reason(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    assert frame is not None, "it was raised"
    where = frame.tb_frame.f_code.co_filename.rpartition("site-packages/")[2]
    message = " ".join(str(error).split())
    return f"not built: {type(error).__name__} at {where}:{frame.tb_lineno}: {message[:90]}"


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{size / 2**30:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Build the layouts and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fake_world", description=__doc__.splitlines()[0])
    parser.add_argument("--model_size", default="7b", help="as for train.py (default: 7b)")
    parser.add_argument("--vocab_size", type=int, default=69_104, help="as for train.py (default: 69104)")
    parser.add_argument("--layers", type=int, help="number of layers instead of the model's")
    parser.add_argument("--num_ranks", type=int, default=64, help="as for train.py (default: 64)")
    parser.add_argument("--only", nargs="+", metavar="LAYOUT", help="layouts whose names begin so")
    args = parser.parse_args(argv)
    planned = job(args.model_size, args.vocab_size, args.num_ranks)
    if args.layers:
        planned = replace(planned, fields={**planned.fields, "num_hidden_layers": args.layers})
    known = layouts(planned.base, ranks=planned.ranks, model=planned.facts, max_length=planned.max_length)
    by_label = {label(settings): settings for settings in known}
    unknown = [name for name in args.only or () if not any(found.startswith(name) for found in by_label)]
    if unknown:
        parser.error(f"--only {unknown[0]}: no layout begins so; give one of {', '.join(by_label)}")
    chosen = {
        name: settings
        for name, settings in by_label.items()
        if (name.startswith(tuple(args.only)) if args.only else name in LAYOUTS)
    }
    prepare()
    head = ["layout", "bf16 GiB", "forecast", "ratio", "float32 GiB", "forecast", "ratio", "s"]
    found = [row(settings, planned) for settings in chosen.values()]
    print_table([head, *(cells for cells, _ in found if len(cells) == len(head))])
    for name, *reasons in (cells for cells, _ in found):
        if len(reasons) == 1:
            print(f"{name}: {reasons[0]}")
    return 0 if all(is_equal for _, is_equal in found) else 1


if __name__ == "__main__":
    sys.exit(main())
