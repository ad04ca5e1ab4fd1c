"""Suggested layouts as lines of text, at most 80 columns wide."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from colossal_llama2.gpus import GPUS_PER_HOST
from colossal_llama2.plurals import counted
from colossal_llama2.tables import table_lines
from colossal_llama2.train.forecast.failures import Failures, failures
from colossal_llama2.train.forecast.layouts import flags, label
from colossal_llama2.train.forecast.memory_report import GIB, GPU_MARGIN, memory_table
from colossal_llama2.train.forecast.speed import EFFICIENCY
from colossal_llama2.train.forecast.suggestion import (
    CUDA_GIB,
    Job,
    Suggestion,
    checkpoint_size,
)

WIDTH = 80
# Rows of plugin 3d, which has dozens of layouts.
MOST_HYBRID = 10


@dataclass(frozen=True)
class Budget:
    """What a run is counted in.

    Attributes:
        tokens: that it trains on.
        gpu_hour_price: of one GPU; None if it is not known.
        storage: bytes a second that one rank writes to the folder of checkpoints.
    """

    tokens: float
    gpu_hour_price: float | None
    storage: float

    def cost(self, gpu_hours: float) -> str:
        """GPU hours, and their price if it is known."""
        price = self.gpu_hour_price
        return f"{gpu_hours:,.0f} GPU hours" + ("" if price is None else f" x {price:g} = {gpu_hours * price:,.0f}")


def suggestion_lines(job: Job, suggestions: Sequence[Suggestion], budget: Budget, *, compared: int) -> list[str]:
    """All about one model: the table of layouts, and the cheapest one in detail.

    Args:
        compared: number of layouts among which the suggestions were found.
    """
    lines = [
        f"{job.name}: {job.facts.parameters / 1e6:,.1f} M parameters, vocabulary {job.facts.vocab_size:,}",
        f"{job.ranks:,} x {job.gpu.name}, samples of {job.max_length:,} tokens, {job.base.precision}, "
        f"{_step_sizes([one.step_tokens for one in suggestions[:1]] or [job.step_tokens])}",
        f"the best of {counted(compared, 'layout')} with their fastest batch; hours for "
        f"{budget.tokens / 1e9:,.4g} B tokens:",
        *layout_table(suggestions, budget),
        *notes(),
        *host_notes(job, suggestions),
    ]
    if any(suggestion.fits for suggestion in suggestions):
        return [*lines, "", *_details(job, suggestions[0], budget)]
    least = min(suggestion.needed_gib for suggestion in suggestions) if suggestions else 0
    return [*lines, f"no layout fits: the smallest needs {least:.0f} GiB of a GPU, {job.gpu.name} has {job.gpu.memory}"]


def layout_table(suggestions: Sequence[Suggestion], budget: Budget) -> list[str]:
    """A row for each layout."""
    rows = [["layout", "batch", "GiB", "sent GB", "step s", "MFU", "hours"]]
    for one in suggestions:
        row = [label(one.plan.settings), batch(one), f"{one.needed_gib:,.1f}"]
        if one.fits:
            sent = sum(one.step.sent.values()) / 1e9
            row += [f"{sent:,.1f}", f"{one.step.seconds:,.1f}", f"{one.step.mfu:.0%}"]
            row.append(f"{one.hours(budget.tokens):,.1f}")
        else:
            row.append("too large")
        rows.append(row)
    return table_lines(rows, align="llr", indent="  ")


def batch(suggestion: Suggestion) -> str:
    """Samples at a time x passes of a step, and r for recomputation."""
    plan, samples = suggestion.plan, suggestion.plan.micro_batch().samples
    return f"{samples} x {plan.passes}" + " r" * plan.checkpointing


def notes() -> list[str]:
    """What the columns mean."""
    text = (
        f"batch: samples at a time x passes of a step; r: --use_grad_checkpoint. GiB: forecast + {GPU_MARGIN} % + "
        f"{CUDA_GIB}. sent GB: by a rank in a step. step: computed at {EFFICIENCY * 100:.0f} % of an A100's peak, as "
        f"in the original's run, and nothing overlaps."
    )
    return textwrap.wrap(text, WIDTH)


def host_notes(job: Job, suggestions: Sequence[Suggestion], *, name: str = "") -> list[str]:
    """What offloading layouts need of a host's memory, which decides nothing here; empty if none offloads."""
    needs = [
        f"{label(one.plan.settings)} {_host_bytes(job, one) / GIB:,.0f}"
        for one in suggestions
        if one.memory.host and any(one.memory.host.values())
    ]
    of_model = f" for {name}" if name else ""
    text = f"GiB of a host's memory{of_model}, which is not compared with any host: {', '.join(needs)}"
    return textwrap.wrap(text, WIDTH) if needs else []


def _host_bytes(job: Job, suggestion: Suggestion) -> float:
    """What the ranks of a host keep in its memory."""
    return min(job.ranks, GPUS_PER_HOST) * sum(suggestion.memory.host.values())


def _details(job: Job, best: Suggestion, budget: Budget) -> list[str]:
    lines = ["cheapest:"]
    lines += [f"  {group}" for group in flags(best.plan.settings, checkpointing=best.plan.checkpointing)]
    lines += memory_table(best.memory, ranks=job.ranks, on_cpu=False).split("\n")[:-2]
    if best.memory.host:
        lines.append(f"  {_host_bytes(job, best) / GIB:,.1f} GiB for the ranks of a host")
    lines += _step_lines(best)
    return [*lines, *_run_lines(job, best, budget)]


def _step_lines(best: Suggestion) -> list[str]:
    step = best.step
    rows = [["seconds of a step", "", "sent GB"], ["  computing", f"{step.compute:.2f}"]]
    if step.waiting:
        rows.append(["  pipeline waiting", f"{step.waiting:.2f}"])
    for axis, sent in step.sent.items():
        if sent:
            rows.append([f"  sending, {axis}", f"{step.communication[axis]:.2f}", f"{sent / 1e9:,.1f}"])
    if step.offload:
        rows.append(["  update on the host", f"{step.offload:.2f}"])
    rows.append(["  whole", f"{step.seconds:.2f}"])
    return table_lines(rows)


def _run_lines(job: Job, best: Suggestion, budget: Budget) -> list[str]:
    hours, size = best.hours(budget.tokens), checkpoint_size(job)
    save, risk = saving(job, budget)
    steps = max(round(risk.interval / best.step.seconds), 1)
    return [
        f"training: {counted(round(budget.tokens / best.step_tokens), 'step')}, {hours:,.1f} hours, "
        f"{budget.cost(hours * job.ranks)}",
        f"checkpoint: {size / 1e9:,.1f} GB, {save:,.0f} s at {budget.storage / 1e9:g} GB/s",
        f"failures: {risk.per_day:.2g} a day; --save_interval {steps} (every "
        f"{risk.interval / 3600:,.1f} hours) is best,",
        f"  saves, repeated steps and restarts then take {risk.lost:.1%} of the time",
    ]


def saving(job: Job, budget: Budget) -> tuple[float, Failures]:
    """Seconds of a save, and what failures cost a run that saves as often as is best."""
    save = checkpoint_size(job) / budget.storage
    return save, failures(job.ranks, save)


def summary_lines(found: Sequence[tuple[Job, Sequence[Suggestion]]], budget: Budget) -> list[str]:
    """The cheapest layout of each of several models, a row for each."""
    first = found[0][0]
    rows = [["model", "vocabulary", "layout", "batch", "GiB", "MFU", "hours"]]
    for job, suggestions in found:
        row = [job.name, f"{job.facts.vocab_size:,}"]
        best = suggestions[0] if suggestions and suggestions[0].fits else None
        if best is None:
            rows.append([*row, "none fits"])
            continue
        row += [label(best.plan.settings), batch(best), f"{best.needed_gib:,.1f}"]
        rows.append([*row, f"{best.step.mfu:.0%}", f"{best.hours(budget.tokens):,.1f}"])
    return [
        f"{first.ranks:,} x {first.gpu.name}, samples of {first.max_length:,} tokens, {first.base.precision}, "
        f"{_step_sizes([some[0].step_tokens for _, some in found if some] or [first.step_tokens])}",
        f"the cheapest layout of each model, and the hours for {budget.tokens / 1e9:,.4g} B tokens:",
        *table_lines(rows, align="lrllr", indent="  "),
        *notes(),
        *(line for job, suggestions in found for line in host_notes(job, suggestions[:1], name=job.name)),
    ]


def _step_sizes(tokens: Sequence[int]) -> str:
    """For the header: the tokens of a step, which whole samples on every rank may make more than were asked for."""
    sizes = list(dict.fromkeys(f"{size / 1e6:.2f}" for size in (min(tokens), max(tokens))))
    return f"steps of {' to '.join(sizes)} M tokens"
