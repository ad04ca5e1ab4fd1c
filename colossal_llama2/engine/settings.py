"""The settings of a training step, and the interface that an engine and a dry run share.

Imports neither torch nor ColossalAI.
"""

from dataclasses import dataclass
from typing import Protocol

from colossal_llama2.model.trainable import Trainable


@dataclass(frozen=True)
class EngineSettings:
    """The settings that decide how a step is computed.

    Attributes:
        plugin: one of PLUGIN_NAMES.
        precision: fp32, bf16 or fp16.
        tp_size, pp_size, sp_size: numbers of ranks that share a layer, the layers, and a sample.
        zero_stage: 0 to 2; used only by plugin 3d.
        max_norm: gradients are clipped to this norm; 0 disables clipping.
        accumulation_steps: micro batches of a step.
        use_flash_attn: use fused attention.
        chunked_loss: auto, on or off.
        micro_batch_size: samples that a data-parallel rank passes through the model at once.
        microbatch_size: samples that a pipeline stage passes on at once.
        sp_mode: all_to_all, split_gather or ring; None without sequence parallelism.
        trainable: which parameters are trained.
    """

    plugin: str
    precision: str
    tp_size: int
    zero_stage: int
    max_norm: float
    accumulation_steps: int
    use_flash_attn: bool
    chunked_loss: str
    learning_rate: float
    weight_decay: float
    micro_batch_size: int = 1
    pp_size: int = 1
    microbatch_size: int = 1
    sp_size: int = 1
    sp_mode: str | None = None
    trainable: Trainable = Trainable()

    @property
    def model_ranks(self) -> int:
        """Number of ranks that together hold one copy of the model and see the same samples."""
        return self.tp_size * self.pp_size * self.sp_size

    @property
    def sequence_shards(self) -> int:
        """Number of parts of equal length into which a sample is split."""
        return {None: 1, "all_to_all": self.sp_size}.get(self.sp_mode, self.tp_size)


class Ranks(Protocol):
    """The ranks of a job and this rank's number: an Engine, or the ranks that a dry run assumes."""

    @property
    def rank(self) -> int:
        """Number of this rank, from 0."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks: ranks that see different samples."""

    @property
    def settings(self) -> EngineSettings:
        """The settings of a step."""
