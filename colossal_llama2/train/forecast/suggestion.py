"""Which layout to train a model with on a number of GPUs: each layout at its fastest batch that fits, by forecasts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.gpus import Gpu
from colossal_llama2.model.loading import ModelFacts, facts_of_fields
from colossal_llama2.plugin_names import HYBRID_3D, PLUGIN_NAMES
from colossal_llama2.train.checkpointing.checkpoint_writer import checkpoint_bytes
from colossal_llama2.train.forecast.activations import ModelShape
from colossal_llama2.train.forecast.layouts import layouts
from colossal_llama2.train.forecast.memory import Plan, RankMemory, loss_memory, rank_memory
from colossal_llama2.train.forecast.memory_report import GIB, GPU_MARGIN
from colossal_llama2.train.forecast.speed import StepForecast, step_forecast

# Memory that a GPU needs besides the forecast, for CUDA, NCCL and what the allocator leaves unused.
CUDA_GIB = 2
MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Job:
    """What is to be trained, on what.

    Attributes:
        name: of the model, for people.
        fields: of its config.json, as `read_fields` returns them.
        base: the settings of a step besides the layout and its batches.
        ranks: number of GPUs.
        max_length: tokens of a sample.
        step_tokens: of an optimizer step, as far as whole samples on every rank allow.
        always_recomputes: only layouts with recomputed activations.
    """

    name: str
    fields: dict[str, Any]
    base: EngineSettings
    ranks: int
    gpu: Gpu
    max_length: int
    step_tokens: int
    always_recomputes: bool = False

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model that decide memory and speed."""
        return ModelShape.of_fields(self.fields)

    @cached_property
    def facts(self) -> ModelFacts:
        """The sizes of the model that its checks and its checkpoints need."""
        return facts_of_fields(self.fields)


@dataclass(frozen=True)
class Suggestion:
    """A layout with its batches, and what it needs.

    Attributes:
        step_tokens: of an optimizer step.
        fits: whether the forecast and its margin are within a GPU's memory.
    """

    plan: Plan
    memory: RankMemory
    step: StepForecast
    step_tokens: int
    fits: bool

    def hours(self, tokens: float) -> float:
        """Of training on that many tokens, without saves and failures."""
        return tokens / self.step_tokens * self.step.seconds / 3600

    @property
    def needed_gib(self) -> float:
        """GiB of a GPU that has room for the forecast and its margin."""
        return needed_gib(self.memory.peak)


def needed_gib(peak: int) -> float:
    """GiB of a GPU that has room for a forecast of `peak` bytes, with its margin."""
    return peak / GIB * (1 + GPU_MARGIN / 100) + CUDA_GIB


def checkpoint_size(job: Job) -> int:
    """Bytes of a checkpoint."""
    return checkpoint_bytes(job.facts, job.base)


@dataclass(frozen=True)
class _Option:
    """A layout with one size of its batches, whose memory is not known yet."""

    layout: int
    plan: Plan
    step: StepForecast
    step_tokens: int

    @property
    def samples(self) -> int:
        """That pass through the model at a time."""
        return self.plan.micro_batch().samples

    @property
    def order(self) -> tuple[float, int]:
        """The fastest first. A larger batch is not worth its memory for less than a thousandth of the peak."""
        return -round(self.step.mfu, 3), self.samples

    def with_memory(self, job: Job) -> Suggestion:
        """The option with its memory."""
        memory = rank_memory(job.shape, self.plan)
        return Suggestion(self.plan, memory, self.step, self.step_tokens, fits=_fits(memory.peak, job))


def suggest(job: Job, *, most_hybrid: int) -> tuple[list[Suggestion], int]:
    """The fastest layouts, each with its fastest batch that fits; those that do not fit come last.

    Args:
        most_hybrid: how many layouts of 3d; there is one of every other plugin.

    Returns:
        The suggestions, and the number of layouts that were compared.
    """
    all_layouts = list(layouts(job.base, ranks=job.ranks, model=job.facts, max_length=job.max_length))
    found: list[Suggestion] = []
    for plugin in PLUGIN_NAMES:
        options = [
            option
            for number, settings in enumerate(all_layouts)
            if settings.plugin == plugin
            for option in _options(number, settings, job)
        ]
        found += _fastest(options, job, most=most_hybrid if plugin == HYBRID_3D else 1)
    return sorted(found, key=lambda one: (not one.fits, one.step.seconds / one.step_tokens)), len(all_layouts)


def _options(layout: int, settings: EngineSettings, job: Job) -> Iterator[_Option]:
    for plan, tokens in plans(settings, job):
        yield _Option(layout, plan, step_forecast(job.shape, plan, job.gpu, step_tokens=tokens), tokens)


def _fastest(options: Sequence[_Option], job: Job, *, most: int) -> list[Suggestion]:
    """The fastest option that fits of each of the `most` fastest layouts; the smallest of all if none fits.

    The memory of an option is computed only if no faster one of its layout fits.
    """
    found: dict[int, Suggestion] = {}
    # Micro batches from which on nothing fits, of each layout with and without recomputation.
    limits: dict[tuple[int, bool], int] = {}
    for option in sorted(options, key=lambda option: option.order):
        kind = (option.layout, option.plan.checkpointing)
        if option.layout in found or option.samples >= limits.get(kind, option.samples + 1):
            continue
        if _fits(loss_memory(job.shape, option.plan), job) and (suggestion := option.with_memory(job)).fits:
            found[option.layout] = suggestion
        else:
            limits[kind] = option.samples
        if len(found) == most:
            break
    if found or not options:
        return list(found.values())
    smallest = [option for option in options if option.plan.checkpointing and option.samples == 1]
    return [min(smallest, key=lambda option: loss_memory(job.shape, option.plan)).with_memory(job)]


def _fits(peak: int, job: Job) -> bool:
    return needed_gib(peak) <= job.gpu.memory


def plans(settings: EngineSettings, job: Job) -> Iterator[tuple[Plan, int]]:
    """The layout with each size of its batches, with and without recomputation, and the tokens of a step."""
    data_ranks = job.ranks // settings.model_ranks
    stages, wanted = settings.pp_size, job.step_tokens / job.max_length / data_ranks
    for size in MICRO_BATCHES:
        at_once = size * stages
        if size > 1 and at_once > wanted:
            continue
        samples = at_once * max(round(wanted / at_once), 1)
        batches = replace(settings, micro_batch_size=at_once, accumulation_steps=samples // at_once)
        if stages > 1:
            batches = replace(batches, microbatch_size=size)
        for checkpointing in (False, True):
            if checkpointing or not job.always_recomputes:
                yield _plan(batches, job, checkpointing=checkpointing), samples * data_ranks * job.max_length


def _plan(settings: EngineSettings, job: Job, *, checkpointing: bool) -> Plan:
    return Plan(
        settings=settings,
        ranks=job.ranks,
        max_length=job.max_length,
        attention="flash" if settings.use_flash_attn else "sdpa",
        chunked_loss=settings.chunked_loss != "off",
        checkpointing=checkpointing,
        has_documents=True,
        on_cpu=False,
    )
