"""When a model has forgotten too much: a loss that has risen, or an accuracy that has fallen, beyond its limit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from colossal_llama2.train.checkpointing.evaluation_history import ACCURACY, EvaluationHistory, Figures

# A share that falls from 0.4 to 0.3 falls by a little more than 0.1 in float64.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Alarm:
    """The alarm of --forgetting_alarm.

    Attributes:
        limits: name of a set -> by which share of its first value its figure may rise; name of a task -> by how much
            its accuracy may fall below the first.
        stops: whether the run ends if a limit is passed.
    """

    limits: Mapping[str, float]
    stops: bool = False

    def unreachable(self, figures: Figures) -> list[str]:
        """For the first figures: a sentence for each task whose accuracy cannot fall by more than its limit."""
        return [
            f"--forgetting_alarm {name}={limit:g}: accuracy on {name} is {figures[name][ACCURACY]:.1%} at first, so it "
            f"cannot fall by more than {100 * limit:g} points; give a lower limit, or leave it out if that is chance"
            for name, limit in self.limits.items()
            if figures.get(name, {}).get(ACCURACY, math.inf) <= limit
        ]

    def sentences(self, figures: Figures, history: EvaluationHistory) -> dict[str, str]:
        """The sets and tasks beyond their limit, each with a sentence for the user."""
        found = {}
        for name, limit in self.limits.items():
            key, first = history.first(name, figures[name])
            if first is None:
                continue
            now, given = figures[name][key], f"--forgetting_alarm {name}={limit:g}"
            # Not "now > ..." and "now < ...", which are False for NaN.
            if key == ACCURACY and not now >= first - limit - ROUNDING:
                points = f"by {100 * (first - now):.1f} points"
                found[name] = f"{given}: accuracy on {name} fell from {first:.1%} to {now:.1%}, {points}"
            elif key != ACCURACY and not now <= first * (1 + limit):
                change = f"by {now / first - 1 if first else math.inf:+.1%}"
                what = f"{key.replace('_', ' ')} of {name}"
                found[name] = f"{given}: {what} went from {first:.4f} to {now:.4f}, {change}"
        return found
