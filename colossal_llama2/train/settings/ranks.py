"""What checks and plans ask of the ranks of a job, which need not run."""

from dataclasses import dataclass
from typing import Protocol

from colossal_llama2.engine.engine import EngineSettings


class Ranks(Protocol):
    """The ranks of a job: an Engine, or PlannedRanks."""

    @property
    def settings(self) -> EngineSettings:
        """How a step is computed."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks, which see different samples."""


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks of a job that is planned and not started."""

    settings: EngineSettings
    world_size: int
    rank: int = 0

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks, which see different samples."""
        return self.world_size // self.settings.model_ranks
