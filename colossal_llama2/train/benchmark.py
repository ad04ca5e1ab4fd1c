"""The speed of a training command on this machine: train.py and train_sft.py with --benchmark, on random tokens.

Nothing is written except the trace of --profile.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.dataset.read.step_loader import StepLoader
from colossal_llama2.engine.device import flops_per_token, known_peak, peak_memory
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import Stopped
from colossal_llama2.model.config_fields import llama_config
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import new_file
from colossal_llama2.tables import print_table
from colossal_llama2.train.build_run import build_steps
from colossal_llama2.train.checks import JobChecks
from colossal_llama2.train.inputs import open_benchmark_inputs
from colossal_llama2.train.load_weights import attention_of
from colossal_llama2.train.settings.config import BenchmarkConfig, TrainConfig
from colossal_llama2.train.settings.flag_problems import PROFILED_STEPS, WARMUP_STEPS
from colossal_llama2.train.stepping.state import StepResult, StepTotals
from colossal_llama2.train.stepping.step import StepParts, step_totals, train_step
from colossal_llama2.train.stepping.step_timer import NoTimer, StepTimer
from colossal_llama2.train.stepping.stopping import NoSignals

if TYPE_CHECKING:
    import datasets

PADDING_ID = 0


@dataclass(frozen=True)
class Measured:
    """What the timed steps measured, over all ranks.

    Attributes:
        tokens: of all steps, without padding; `places`: with padding.
        seconds: wall time of all steps.
        parts: seconds of each part of a step on this rank; the rest belongs to no part.
        communication: share of a step's time with collectives in flight, measured on other steps.
        memory: peak bytes of the rank with the highest peak.
    """

    steps: int
    tokens: int
    places: int
    seconds: float
    parts: dict[str, float]
    communication: float
    memory: int


def random_dataset(num_samples: int, *, length: int, vocab_size: int, seed: int) -> "datasets.Dataset":
    """Samples of `length` random tokens, in the format of `load_parts`."""
    import datasets
    import numpy as np
    import pyarrow

    ids = np.random.default_rng(seed).integers(0, vocab_size, num_samples * length, dtype=np.int32)
    offsets = pyarrow.array(np.arange(num_samples + 1, dtype=np.int32) * length)
    column = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(ids))
    table = pyarrow.table({"input_ids": column, "labels": column})
    return datasets.Dataset(table).with_format("arrow")


def measure(parts: StepParts, *, profile_dir: str | None) -> Measured:
    """Run the steps of an epoch: the first warm up, the last two are profiled, and those between are timed.

    There are enough of them, see flag_problems.
    """
    engine, loader = parts.engine, parts.loader
    steps = loader.order.steps_after(0)
    timed = steps - WARMUP_STEPS - PROFILED_STEPS
    timer = StepTimer()
    source = timer.each("data", loader.steps(0, 0))
    steps_taken = _Steps(parts, source, timer)
    with logs.progress(total=steps, description="benchmark", unit="step") as progress:
        for _ in range(WARMUP_STEPS):
            steps_taken.run_one(progress)
        timer.seconds()
        engine.barrier()
        before, start = (steps_taken.tokens, steps_taken.places), time.perf_counter()
        for _ in range(timed):
            steps_taken.run_one(progress)
        shares = timer.seconds()
        seconds = time.perf_counter() - start
        tokens, places = steps_taken.tokens - before[0], steps_taken.places - before[1]
        memory = collectives.max_over_ranks(peak_memory())
        with _profiler(profile_dir, engine.rank) as profiler:
            start = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                steps_taken.run_one(progress)
            profiled_seconds = time.perf_counter() - start
        for _ in source:
            pass
    communication = communication_seconds(profiler) / profiled_seconds
    return Measured(timed, tokens, places, seconds, shares, communication, memory)


class _Steps:
    """Runs one optimizer step after the other, and counts tokens."""

    def __init__(self, parts: StepParts, source: Iterator[tuple[list[Batch], int]], timer: NoTimer):
        self._parts, self._source, self._timer = parts, source, timer
        self._step = self.tokens = self.places = 0

    def run_one(self, progress: logs.SilentProgress) -> StepResult:
        engine = self._parts.engine
        batches, _ = next(self._source)
        totals: StepTotals = step_totals(engine, batches, self._parts.stop)
        if totals.signal is not None:
            raise Stopped(totals.signal, f"{totals.signal.name} came; nothing was written")
        result = train_step(engine, batches, totals, noise=self._parts.noise, step=self._step, timer=self._timer)
        self._step += 1
        self.tokens += result.tokens
        # Those of this rank; the other ranks have about the same number.
        self.places += sum(batch.input_ids.numel() for batch in batches) * engine.data_size
        progress.update(loss=f"{result.loss:.4f}")
        return result


@contextlib.contextmanager
def _profiler(folder: str | None, rank: int) -> Iterator[Any]:
    """PyTorch's profiler; writes rank-00000.json to the folder, if any, for ui.perfetto.dev or chrome://tracing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    # Without a GPU the profiler's library warns about that on every rank.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
        yield profiler
    if folder is not None:
        path = Path(folder, f"rank-{rank:05d}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            profiler.export_chrome_trace(str(partial))
        logs.get_logger().info("Trace of %d steps: %s", PROFILED_STEPS, path)


def communication_seconds(profiler: Any) -> float:
    """Time in which at least one collective ran on this rank: NCCL's kernels, or gloo's work on a CPU."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.name.startswith(("gloo:", "ncclDevKernel", "ncclKernel"))
    )
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total / 1e6


def report(found: Measured, *, ranks: int, flops: float, peak_tflops: float | None) -> list[tuple[str, str, str]]:
    """Rows of name, figure and remark."""
    per_second = found.tokens / found.seconds
    rows = [
        ("tokens/s", f"{per_second:,.0f}", f"{counted(ranks, 'rank')}, {per_second / ranks:,.0f} on each"),
        ("step", f"{found.seconds / found.steps:.3f} s", f"mean of {found.steps}, after {WARMUP_STEPS} to warm up"),
    ]
    rest = found.seconds - sum(found.parts.values())
    for name, seconds in {**found.parts, "rest": rest}.items():
        rows.append((f"  {name}", f"{seconds / found.seconds:.1%}", ""))
    rows += [
        ("communication", f"{found.communication:.1%}", "of step time with communication in flight, overlapped or not"),
        ("peak memory", f"{found.memory / 2**20:,.0f} MiB", "of the rank with the highest peak"),
        ("padding", f"{1 - found.tokens / found.places:.1%}", ""),
        ("TFLOPS", f"{per_second * flops / ranks / 1e12:.3g}", "of each rank, recomputation not counted"),
    ]
    if peak_tflops is None:
        rows.append(("MFU", "-", "the peak of this device is unknown; give --peak_tflops"))
    else:
        share = per_second * flops / ranks / (peak_tflops * 1e12)
        rows.append(("MFU", f"{share:.1%}", f"of {peak_tflops:g} TFLOPS"))
    return rows


def benchmark(config: TrainConfig, settings: BenchmarkConfig, stop: NoSignals) -> None:
    """Load the model of --pretrained and measure. Called on all ranks, inside a process group.

    Raises:
        UserError: the model does not fit the flags.
        Stopped: a signal came to a rank.
    """
    inputs = open_benchmark_inputs(config, JobChecks(), num_samples=settings.num_samples)
    engine, max_length = inputs.engine, config.data.max_length
    dataset = random_dataset(
        settings.num_samples,
        length=max_length,
        vocab_size=inputs.model.vocab_size,
        seed=config.recipe.seed,
    )
    collator = Collator(pad_token_id=PADDING_ID, max_length=max_length)
    loader = StepLoader(dataset, inputs.order, collator, engine.data_rank, pins=engine.pins_batches)
    with build_steps(config, inputs, loader, stop, attention=attention_of(config)) as parts:
        found = measure(parts, profile_dir=settings.profile_dir)
    if engine.rank == 0:
        trains_weights = config.engine.trainable.adapter is None
        model_config, parameters = llama_config(config.source.weights_folder), inputs.model.parameters
        flops = flops_per_token(model_config, parameters, max_length, trains_weights=trains_weights)
        peak = known_peak(config.reporting.peak_tflops)
        rows = report(found, ranks=engine.world_size, flops=flops, peak_tflops=peak)
        print_table(rows, align="lrl", has_header=False)
