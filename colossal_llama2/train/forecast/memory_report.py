"""The memory forecast of a run as lines of text."""

import os
from typing import TYPE_CHECKING

from colossal_llama2.engine.device import resident_memory
from colossal_llama2.plurals import counted
from colossal_llama2.tables import table_lines
from colossal_llama2.train.forecast.activations import ModelShape
from colossal_llama2.train.forecast.memory import MOMENTS, PARTS, Plan, RankMemory, rank_memory
from colossal_llama2.train.settings.config import TrainConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig

GIB = 2**30
# Error of the forecast in percent: a little more than was measured on a CPU (benchmarks/bench_memory.py), and a larger
# one on GPUs, where nothing was measured.
CPU_MARGIN, PROCESS_MARGIN, GPU_MARGIN = 10, 15, 20
# Resident memory of a rehearsal's process over what its tensors need, since it keeps freed memory (cpu_device.py):
# 1.23 to 1.41 for five models and plugins (benchmarks/bench_memory.py --kept_memory).
KEPT = 1.32


def memory_plan(config: TrainConfig, ranks: int, *, has_documents: bool, on_cpu: bool) -> Plan:
    """The settings that decide the memory of a run besides the model. On GPUs flash-attn is assumed to be installed.

    Args:
        ranks: number of ranks.
        has_documents: the data has the lengths of its documents.
    """
    settings = config.engine
    uses_flash_attn = settings.use_flash_attn and not on_cpu and settings.precision != "fp32"
    return Plan(
        settings=settings,
        ranks=ranks,
        max_length=config.data.max_length,
        attention="flash" if uses_flash_attn else "sdpa",
        chunked_loss=settings.chunked_loss != "off",
        checkpointing=config.recipe.gradient_checkpointing,
        has_documents=has_documents and config.data.document_mask != "off",
        on_cpu=on_cpu,
    )


def memory_lines(config: TrainConfig, llama_config: "LlamaConfig", *, has_documents: bool) -> str:
    """The memory that a run of this transformers LlamaConfig needs, on the devices that it is planned for."""
    ranks, on_cpu = config.world_size, not _plans_for_gpus(config)
    plan = memory_plan(config, ranks, has_documents=has_documents, on_cpu=on_cpu)
    memory = rank_memory(ModelShape.of(llama_config), plan)
    lines = [memory_table(memory, ranks=ranks, on_cpu=on_cpu)]
    if on_cpu:
        lines += process_lines(memory.peak, resident_memory())
    return "\n".join([*lines, *_rehearsal_lines(config, llama_config, has_documents=has_documents)])


def process_lines(peak: int, libraries: int) -> list[str]:
    """The resident memory of a rehearsal's process, from its tensors' peak and the memory of Python and libraries."""
    whole = (KEPT * peak + libraries) / GIB
    return [
        f"a process takes about {whole:.2f} GiB: {KEPT} times the peak, since it keeps freed memory,",
        f"and {libraries / GIB:.2f} GiB for Python and libraries; expect +-{PROCESS_MARGIN} %",
    ]


def _plans_for_gpus(config: TrainConfig) -> bool:
    """Ranks that are only planned are GPUs; others are what this machine has."""
    import torch

    return config.planned_ranks is not None or torch.cuda.is_available()


def _rehearsal_lines(config: TrainConfig, llama_config: "LlamaConfig", *, has_documents: bool) -> list[str]:
    """With --num_ranks on a machine without GPUs: the memory of a rehearsal on this machine."""
    import torch

    if config.planned_ranks is None or torch.cuda.is_available():
        return []
    ranks = config.world_size
    plan = memory_plan(config, ranks, has_documents=has_documents, on_cpu=True)
    each = KEPT * rank_memory(ModelShape.of(llama_config), plan).peak + resident_memory()
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        "there is no GPU here, so this forecast is for another machine;",
        f"a rehearsal with {counted(ranks, 'process')} on this CPU needs {each / GIB:.2f} GiB in each,",
        f"{ranks * each / GIB:,.1f} GiB in total, of {here / GIB:,.1f} GiB here",
    ]


def memory_table(memory: RankMemory, *, ranks: int, on_cpu: bool) -> str:
    """The parts at each moment as aligned lines, and the expected error of the figures."""
    device = "CPU" if on_cpu else "GPU"
    rows = [[f"memory per rank, GiB ({ranks} x {device})", *MOMENTS]]
    for part in PARTS:
        sizes = [memory.device[moment].get(part, 0) for moment in MOMENTS]
        if any(sizes):
            rows.append([f"  {part}", *(f"{size / GIB:.2f}" for size in sizes)])
    rows.append(["  total", *(f"{sum(memory.device[moment].values()) / GIB:.2f}" for moment in MOMENTS)])
    lines = table_lines(rows)
    for part, size in memory.host.items():
        lines.append(f"  in the host's memory: {part} {size / GIB:.2f}")
    peak = f"peak: {memory.peak / GIB:.2f} GiB, at {memory.peak_moment}; computed, not measured;"
    if on_cpu:
        lines.append(f"{peak} expect +-{CPU_MARGIN} %")
    else:
        lines.append(f"{peak} expect +-{GPU_MARGIN} %, since no GPU was ever measured,")
        lines.append("and 1 to 2 GiB more for CUDA, NCCL and what the allocator leaves unused")
    return "\n".join(lines)
