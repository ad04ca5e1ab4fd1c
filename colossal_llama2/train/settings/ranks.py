"""The ranks of a planned job that is not started."""

from dataclasses import dataclass

from colossal_llama2.engine.settings import EngineSettings


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks that a dry run plans for; see `engine.settings.Ranks`."""

    settings: EngineSettings
    world_size: int
    rank: int = 0

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks, which see different samples."""
        return self.world_size // self.settings.model_ranks
