"""How ranks can share the work of training: the one table of plugins, precisions and parallel sizes of all tests.

tests/equality.py compares each layout, with each option, with a plain loop; the tests of training, of resuming, of
evaluation and of saved files use the layouts in this table by name.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """How ranks share the work.

    Attributes:
        flags: of train.py.
        ranks: processes of the job.
        data_size: how many of them see different data.
        plugin_arguments: of ColossalAI's plugin, for what no flag offers.
    """

    flags: tuple[str, ...]
    ranks: int = 2
    data_size: int = 2
    plugin_arguments: tuple[tuple[str, Any], ...] = ()

    def batch_flags(self, batch: int, accumulation_steps: int = 1) -> list[str]:
        """The flags with which an optimizer step has `batch` samples."""
        micro_batch = batch // self.data_size // accumulation_steps
        return ["--micro_batch_size", str(micro_batch), "--accumulation_steps", str(accumulation_steps)]


HYBRID = ("--plugin", "3d", "--zero")
TP2, PP2 = ("--tp", "2"), ("--pp", "2")
SEQUENCE = ("--enable_sequence_parallelism", "--sp_mode")
ALL_TO_ALL = (*SEQUENCE, "all_to_all", "--sp", "2")
SPLIT_GATHER = (*TP2, *SEQUENCE, "split_gather")
RING = (*SEQUENCE, "ring")
FLASH = ("--use_flash_attn",)
OFFLOADED = (("offload_optim_frac", 1.0), ("offload_param_frac", 1.0))
FLOAT32_LAYOUTS = {
    "ddp": Layout(("--plugin", "ddp")),
    "zero2": Layout(("--plugin", "zero2")),
    "zero2_cpu": Layout(("--plugin", "zero2_cpu")),
    "3d": Layout((*HYBRID, "0")),
    "3d tp2": Layout((*HYBRID, "0", *TP2), data_size=1),
    "3d tp2 flash": Layout((*HYBRID, "0", *TP2, *FLASH), data_size=1),
    "3d tp2 dp2": Layout((*HYBRID, "0", *TP2), ranks=4),
    "3d pp2": Layout((*HYBRID, "0", *PP2), data_size=1),
    "3d pp2 dp2": Layout((*HYBRID, "0", *PP2), ranks=4),
    "3d pp2 tp2": Layout((*HYBRID, "0", *PP2, *TP2), ranks=4, data_size=1),
    "3d pp2 sp2 all_to_all": Layout((*HYBRID, "0", *PP2, *ALL_TO_ALL), ranks=4, data_size=1),
    "3d pp2 sp2 all_to_all flash": Layout((*HYBRID, "0", *PP2, *ALL_TO_ALL, *FLASH), ranks=4, data_size=1),
    "3d pp2 tp2 split_gather": Layout((*HYBRID, "0", *PP2, *SPLIT_GATHER), ranks=4, data_size=1),
    "3d sp2 all_to_all": Layout((*HYBRID, "0", *ALL_TO_ALL), data_size=1),
    "3d sp2 all_to_all dp2": Layout((*HYBRID, "0", *ALL_TO_ALL), ranks=4),
    "3d sp2 all_to_all tp2": Layout((*HYBRID, "0", *ALL_TO_ALL, *TP2), ranks=4, data_size=1),
    "3d tp2 split_gather": Layout((*HYBRID, "0", *SPLIT_GATHER), data_size=1),
    "3d tp2 split_gather dp2": Layout((*HYBRID, "0", *SPLIT_GATHER), ranks=4),
    "3d tp2 ring": Layout((*HYBRID, "0", *TP2, *RING), data_size=1),
    "3d tp4 ring": Layout((*HYBRID, "0", "--tp", "4", *RING), ranks=4, data_size=1),
}
BFLOAT16_LAYOUTS = {
    "ddp": Layout(("--plugin", "ddp")),
    "gemini": Layout(("--plugin", "gemini")),
    "gemini offloaded": Layout(("--plugin", "gemini"), plugin_arguments=OFFLOADED),
    "gemini_auto": Layout(("--plugin", "gemini_auto")),
    "zero2": Layout(("--plugin", "zero2")),
    "zero2_cpu": Layout(("--plugin", "zero2_cpu")),
    "3d zero0": Layout((*HYBRID, "0")),
    "3d zero1": Layout((*HYBRID, "1")),
    "3d zero2": Layout((*HYBRID, "2")),
    "3d tp2 zero0": Layout((*HYBRID, "0", *TP2), data_size=1),
    "3d tp2 zero1": Layout((*HYBRID, "1", *TP2), data_size=1),
    "3d tp2 zero2": Layout((*HYBRID, "2", *TP2), data_size=1),
    "3d tp2 flash zero1": Layout((*HYBRID, "1", *TP2, *FLASH), data_size=1),
    "3d tp2 dp2 zero1": Layout((*HYBRID, "1", *TP2), ranks=4),
    "3d tp2 dp2 zero2": Layout((*HYBRID, "2", *TP2), ranks=4),
    "3d pp2 zero0": Layout((*HYBRID, "0", *PP2), data_size=1),
    "3d pp2 zero1": Layout((*HYBRID, "1", *PP2), data_size=1),
    "3d pp2 dp2 zero1": Layout((*HYBRID, "1", *PP2), ranks=4),
    "3d pp2 tp2 zero1": Layout((*HYBRID, "1", *PP2, *TP2), ranks=4, data_size=1),
    "3d sp2 all_to_all zero1": Layout((*HYBRID, "1", *ALL_TO_ALL), data_size=1),
    "3d sp2 all_to_all zero2": Layout((*HYBRID, "2", *ALL_TO_ALL), data_size=1),
    "3d tp2 split_gather zero1": Layout((*HYBRID, "1", *SPLIT_GATHER), data_size=1),
    "3d tp2 split_gather dp2 zero1": Layout((*HYBRID, "1", *SPLIT_GATHER), ranks=4),
    "3d tp2 ring zero1": Layout((*HYBRID, "1", *TP2, *RING), data_size=1),
}
LAYOUTS = {"fp32": FLOAT32_LAYOUTS, "bf16": BFLOAT16_LAYOUTS, "fp16": BFLOAT16_LAYOUTS}


def flags(name: str, *more: Any, batch: int | None = None, accumulation_steps: int = 1) -> list[str]:
    """The flags of a layout.

    Args:
        name: precision and layout, such as "fp32 3d tp2".
        more: further flags and values, which come last.
        batch: samples of an optimizer step; None leaves the flags of the batch out.
    """
    precision, _, layout = name.partition(" ")
    chosen = LAYOUTS[precision][layout]
    of_batch = [] if batch is None else chosen.batch_flags(batch, accumulation_steps)
    return ["--mixed_precision", precision, *chosen.flags, *of_batch, *map(str, more)]
