"""--benchmark --dry_run: what a benchmark with these flags would take, without data, and without weights if need be."""

import argparse
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.cli.dependent_flags import with_defaults
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.engine.device import flops_per_token, known_peak
from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import (
    INDEX_FILE,
    WEIGHTS_FILE,
    ModelFacts,
    facts_of_config,
    inspect_weights,
    model_without_weights,
    shard_names,
)
from colossal_llama2.terminal_text import show
from colossal_llama2.train import checks
from colossal_llama2.train.checks import PROFILED_STEPS, WARMUP_STEPS
from colossal_llama2.train.dry_run import Ranks, memory_lines
from colossal_llama2.train.settings import flags


def plan_benchmark(args: argparse.Namespace) -> None:
    """Check, and print memory and model FLOPs of the flags.

    Raises:
        UserError: with what is wrong.
    """
    plan = checks.check_inputs(args)
    args = with_defaults(args)
    ranks = Ranks(flags.engine_settings(args, trained_rows=flags.rows_to_train(args, plan)), flags.world_size_of(args))
    facts = _facts(args.pretrained)
    checks.check_model_fits(args, facts)
    if not logs.is_first_rank():
        return
    order: SampleOrder = flags.sample_order(args, args.num_samples, ranks)
    logs.get_logger().info(
        "%.1f M parameters, vocabulary %d; plugin %s, %s; %d processes, data parallel over %d",
        facts.parameters / 1e6,
        facts.vocab_size,
        args.plugin,
        args.mixed_precision,
        ranks.world_size,
        ranks.data_size,
    )
    config = model_without_weights(args.pretrained).config
    show(memory_lines(args, config, ranks, has_documents=False))
    show(flops_lines(args, flops_per_token(config, facts.parameters, args.max_length), order, ranks))
    show("dry run: nothing was measured, nothing was written")


def _facts(path: str) -> ModelFacts:
    """Sizes of the model, compared with the weights where all of them are there."""
    if _has_weights(path):
        return inspect_weights(path)
    logs.get_logger().info("%s has no weights, or not all: planned from its config.json alone", path)
    return facts_of_config(path)


def _has_weights(path: str) -> bool:
    if not any(Path(path, name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return False
    try:
        return all(Path(path, name).is_file() for name in shard_names(path))
    except UserError:
        return False


def flops_lines(args: argparse.Namespace, flops: float, order: SampleOrder, ranks: Ranks) -> str:
    """What is measured, and what it computes.

    Args:
        flops: of one token, forward and backward.
    """
    samples = order.samples_per_micro_step * order.accumulation_steps
    of_step = flops * args.max_length * samples
    lines = [
        f"benchmark: {args.num_samples:,} samples of {args.max_length:,} tokens make {order.steps_after(0):,} steps of "
        f"{samples:,}, of which {WARMUP_STEPS} warm up and {PROFILED_STEPS} are profiled",
        f"model FLOPs, forward and backward, recomputation not counted: {scaled(flops)} a token, {scaled(of_step)} a "
        f"step, {scaled(of_step / ranks.world_size)} of them on each rank",
    ]
    peak: float | None = known_peak(args.peak_tflops)
    if peak is not None:
        least = of_step / ranks.world_size / (peak * 1e12)
        lines.append(f"at {peak:g} TFLOPS of each rank, a step takes at least {least:.3g} s")
    return "\n".join(lines)


def scaled(flops: float) -> str:
    """A number of operations with the prefix of its unit, such as 46.1 GFLOP."""
    for prefix in ("", "k", "M", "G", "T"):
        if flops < 1000:
            return f"{flops:.3g} {prefix}FLOP"
        flops /= 1000
    return f"{flops:,.3g} PFLOP" if flops < 1000 else f"{flops:,.0f} PFLOP"
