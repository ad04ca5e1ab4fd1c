"""All evaluations of a run so far, as its checkpoints record them: later figures are compared with the first ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.train.checkpointing.saved_run import SavedRun

# Of each set: name -> {"loss": nats per token, "perplexity": ..., "bits_per_byte": ...}; of each task: name ->
# {"accuracy": share of right items, "standard_error": ..., "items": their number}.
Figures = dict[str, dict[str, float]]
ACCURACY, STANDARD_ERROR, ITEMS = "accuracy", "standard_error", "items"
# Every set has a loss, and every task an accuracy.
COMPARED = ("bits_per_byte", "loss", ACCURACY)


@dataclass
class EvaluationHistory:
    """Grows during the run.

    Attributes:
        evaluations: [{"step": 400, "figures": {"en": {"loss": 2.41, ...}}}, ...]. An evaluation that a signal
            interrupted has no figures, and is the last.
        fingerprints: the samples or items behind each name, those of earlier runs included.
    """

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @classmethod
    def after(cls, saved: SavedRun | None, fingerprints: Mapping[str, str]) -> "EvaluationHistory":
        """The history of a run that evaluates on these samples and items, and resumes `saved` unless that is None.

        A name whose samples have changed starts again, with a warning.
        """
        entries = {} if saved is None else saved.entries
        before = entries.get("eval_fingerprints") or {}
        changed = {name for name, value in fingerprints.items() if before.get(name, value) != value}
        for name in sorted(changed):
            logs.get_logger().warning(
                "evaluation on %s: its samples or items have changed, so figures are compared from here on", name
            )
        evaluations = []
        for entry in entries.get("evaluations") or ():
            # An interrupted one has no figures, and is left out.
            figures = {name: values for name, values in entry["figures"].items() if name not in changed}
            if figures:
                evaluations.append({"step": entry["step"], "figures": figures})
        return cls(evaluations, {**before, **fingerprints})

    def add(self, step: int, figures: Figures) -> None:
        """Append what an evaluation measured; no figures for one that was interrupted."""
        self.evaluations.append({"step": step, "figures": figures})

    def names(self) -> set[str]:
        """The sets that were evaluated at least once."""
        return {name for entry in self.evaluations for name in entry["figures"]}

    def first(self, name: str, now: Mapping[str, float]) -> tuple[str, float | None]:
        """Which figure is compared with that of `now`, and its first finite value; None if there is none yet."""
        for entry in self.evaluations:
            figures = entry["figures"].get(name, {})
            # Nothing can be compared with NaN.
            key = next((key for key in COMPARED if key in now and math.isfinite(figures.get(key, math.nan))), None)
            if key is not None:
                return key, figures[key]
        return next(key for key in COMPARED if key in now), None

    def entries(self) -> dict[str, Any]:
        """By name, as running_states.json holds them."""
        return {"evaluations": self.evaluations, "eval_fingerprints": self.fingerprints}


def was_interrupted(saved: SavedRun | None) -> bool:
    """Whether a signal interrupted the evaluation after the step of a checkpoint."""
    evaluations = [] if saved is None else saved.entries.get("evaluations") or []
    return bool(evaluations) and not evaluations[-1]["figures"]
