"""How often a run on many GPUs will fail, and how often it should save.

The rate is that of the pre-training of Llama 3 405B ("The Llama 3 herd of models", arXiv 2407.21783, section 3.3.4):
419 unexpected interruptions in 54 days on 16,384 GPUs, one in 2,112 days of a GPU. A cluster that is less well tended
fails more often: OPT-175B had at least 105 restarts in about 60 days on 992 GPUs (arXiv 2205.01068, section 2.5), one
in 567 days of a GPU.
"""

import math
from dataclasses import dataclass

DAY = 86_400.0
GPU_DAYS_BETWEEN_FAILURES = 54 * 16_384 / 419
# From a failure to the first step after it: detection within --dist_timeout, a new start, loading.
RESTART_SECONDS = 900.0


@dataclass(frozen=True)
class Failures:
    """What failures cost a run.

    Attributes:
        per_day: expected number.
        interval: seconds between two saves at which the least time is lost.
        lost: share of the time that is lost to saves, repeated steps and restarts at that interval.
    """

    per_day: float
    interval: float
    lost: float


def failures(gpus: int, save_seconds: float) -> Failures:
    """The failures of a run on that many GPUs, of which all stop if one fails."""
    between = GPU_DAYS_BETWEEN_FAILURES * DAY / gpus
    interval = best_interval(save_seconds, between)
    lost = save_seconds / (interval + save_seconds) + (interval / 2 + RESTART_SECONDS) / between
    return Failures(DAY / between, interval, min(lost, 1.0))


def best_interval(save_seconds: float, between: float) -> float:
    """Seconds of training between two saves, for failures that are `between` seconds apart on average.

    Young's first-order optimum with Daly's higher-order terms ("A higher order estimate of the optimum checkpoint
    interval for restart dumps", 2006, equation 37).
    """
    if save_seconds >= 2 * between:
        return between
    ratio = save_seconds / (2 * between)
    return math.sqrt(2 * save_seconds * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds
