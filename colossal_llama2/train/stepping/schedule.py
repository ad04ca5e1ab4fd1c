"""The learning rate as a pure function of the step, so that there is no state to save."""

import math
from dataclasses import dataclass

WARMUP_RATIO = 0.025
FLOOR_RATIO = 0.1


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up to `peak`, then half a cosine to a tenth of it, as in Llama 2 (arXiv 2307.09288, section 2.2).

    Attributes:
        peak: highest learning rate.
        total_steps, warmup_steps: in optimizer steps.
    """

    peak: float
    total_steps: int
    warmup_steps: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.peak * (FLOOR_RATIO + (1 - FLOOR_RATIO) * 0.5 * (1 + math.cos(math.pi * progress)))


def warmup_steps(requested: int | None, total_steps: int) -> int:
    """The requested number of warm-up steps; 2.5 % of all steps if it is None."""
    return int(WARMUP_RATIO * total_steps) if requested is None else requested
