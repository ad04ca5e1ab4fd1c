"""The ways in which ranks can share a model: every plugin and parallel size that the training commands accept."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.engine.settings_problems import length_problems, settings_problems, split_problems
from colossal_llama2.gpus import GPUS_PER_HOST
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.plugin_names import HYBRID_3D, PLUGIN_NAMES

TENSOR_SIZES = SEQUENCE_SIZES = (1, 2, 4, 8)
STAGES = (1, 2, 4, 8, 16)
ZERO_STAGES = (0, 1, 2)


def layouts(base: EngineSettings, *, ranks: int, model: ModelFacts, max_length: int) -> Iterator[EngineSettings]:
    """The settings of each layout, with what `base` has besides it. A pipeline has one sample at a time.

    Refused combinations are left out, by the rules of the training commands. So are tensors and samples that are split
    over several hosts, since every layer would wait for the network, and --sp_mode ring, which needs the same memory
    and sends as much as split_gather.
    """
    for plugin in PLUGIN_NAMES:
        for settings in _hybrid(base) if plugin == HYBRID_3D else [_with(base, plugin=plugin)]:
            if settings.tp_size * settings.sp_size > GPUS_PER_HOST:
                continue
            problems = settings_problems(settings, ranks) + split_problems(settings, model)
            if not problems + length_problems(settings, max_length):
                yield settings


def _hybrid(base: EngineSettings) -> Iterator[EngineSettings]:
    for tp_size, pp_size, zero_stage in product(TENSOR_SIZES, STAGES, ZERO_STAGES):
        sizes = {"tp_size": tp_size, "pp_size": pp_size, "zero_stage": zero_stage}
        yield _with(base, plugin=HYBRID_3D, **sizes)
        if tp_size > 1:
            yield _with(base, plugin=HYBRID_3D, sp_mode="split_gather", **sizes)
        for sp_size in SEQUENCE_SIZES[1:]:
            yield _with(base, plugin=HYBRID_3D, sp_mode="all_to_all", sp_size=sp_size, **sizes)


def _with(base: EngineSettings, *, plugin: str, pp_size: int = 1, **sizes: int | str) -> EngineSettings:
    whole = replace(base, plugin=plugin, tp_size=1, sp_size=1, sp_mode=None, zero_stage=1)
    whole = replace(whole, pp_size=pp_size, micro_batch_size=pp_size, microbatch_size=1, accumulation_steps=1)
    return replace(whole, **sizes)  # type: ignore[arg-type]


def label(settings: EngineSettings) -> str:
    """A layout in a table, such as "3d tp2 pp4 zero1"."""
    if settings.plugin != HYBRID_3D:
        return settings.plugin
    sizes = {"tp": settings.tp_size, "pp": settings.pp_size, "sp": settings.sp_size}
    words = [settings.plugin, *(f"{name}{size}" for name, size in sizes.items() if size > 1)]
    if settings.sp_mode == "split_gather":
        words.append(settings.sp_mode)
    return " ".join([*words, f"zero{settings.zero_stage}"])


def flags(settings: EngineSettings, *, checkpointing: bool) -> list[str]:
    """The flags of the training commands for a layout and its batches, in groups that belong on one line."""
    layout = f"--plugin {settings.plugin}"
    if settings.plugin == HYBRID_3D:
        sizes = {"tp": settings.tp_size, "pp": settings.pp_size}
        layout += "".join(f" --{name} {size}" for name, size in sizes.items() if size > 1)
        layout += f" --zero {settings.zero_stage}"
    groups = [layout]
    if settings.sp_mode is not None:
        size = f" --sp {settings.sp_size}" if settings.sp_size > 1 else ""
        groups.append(f"--enable_sequence_parallelism --sp_mode {settings.sp_mode}{size}")
    batches = f"--micro_batch_size {settings.micro_batch_size} --accumulation_steps {settings.accumulation_steps}"
    if settings.pp_size > 1:
        batches += f" --microbatch_size {settings.microbatch_size}"
    precision = f"--mixed_precision {settings.precision}" + " --use_flash_attn" * settings.use_flash_attn
    return [*groups, precision + " --use_grad_checkpoint" * checkpointing, batches]
