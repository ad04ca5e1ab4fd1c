"""--benchmark --dry_run: what a benchmark with these flags needs. Reads no data, and only existing weights."""

from colossal_llama2 import logs
from colossal_llama2.engine.device import flops_per_token, known_peak
from colossal_llama2.model.loading import model_without_weights
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show
from colossal_llama2.train.checks import DryRunChecks
from colossal_llama2.train.forecast.memory_report import memory_lines
from colossal_llama2.train.inputs import JobInputs, open_benchmark_inputs
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.settings.config import BenchmarkConfig, TrainConfig
from colossal_llama2.train.settings.flag_problems import PROFILED_STEPS, WARMUP_STEPS
from colossal_llama2.train.settings.from_flags import Problems


def plan_benchmark(config: TrainConfig, settings: BenchmarkConfig, problems: Problems) -> None:
    """Check the model, and print the memory and the model FLOPs of a benchmark.

    Args:
        problems: those of the flags, see `resolve_with_problems`.

    Raises:
        UserError: with what is wrong.
    """
    problems.raise_any()
    checks = DryRunChecks(problems)
    inputs = open_benchmark_inputs(config, checks, num_samples=settings.num_samples)
    if not logs.is_first_rank():
        return
    run_metadata.log_sizes(config, inputs.ranks, inputs.model)
    llama_config = model_without_weights(config.source.weights_folder).config
    show(memory_lines(config, llama_config, has_documents=False))
    trains_weights, length = config.engine.trainable.adapter is None, config.data.max_length
    flops = flops_per_token(llama_config, inputs.model.parameters, length, trains_weights=trains_weights)
    show(flops_lines(config, inputs, flops, num_samples=settings.num_samples))
    show("dry run: nothing was measured, nothing was written")


def flops_lines(config: TrainConfig, inputs: JobInputs, flops: float, *, num_samples: int) -> str:
    """What is measured, and what it computes.

    Args:
        flops: of one token, forward and backward.
    """
    order, max_length, ranks = inputs.order, config.data.max_length, inputs.ranks.world_size
    samples = order.samples_per_micro_step * order.accumulation_steps
    of_step = flops * max_length * samples
    lines = [
        f"benchmark: {counted(num_samples, 'sample')} of {max_length:,} tokens make "
        f"{counted(order.steps_after(0), 'step')} of {samples:,}; {WARMUP_STEPS} of them warm up, {PROFILED_STEPS} are "
        f"profiled",
        f"model FLOPs, forward and backward, recomputation not counted: {scaled(flops)} a token, {scaled(of_step)} a "
        f"step, {scaled(of_step / ranks)} of them on each rank",
    ]
    peak: float | None = known_peak(config.reporting.peak_tflops)
    if peak is not None:
        least = of_step / ranks / (peak * 1e12)
        lines.append(f"at {peak:g} TFLOPS of each rank, a step takes at least {least:.3g} s")
    return "\n".join(lines)


def scaled(flops: float) -> str:
    """A number of operations with a unit prefix, such as 46.1 GFLOP."""
    for prefix in ("", "k", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g} {prefix}FLOP"
        flops /= 1000
    return f"{flops:,.3g} PFLOP" if flops < 1000 else f"{flops:,.0f} PFLOP"
