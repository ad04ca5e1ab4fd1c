"""Where a run is, and what one optimizer step was made of and gave."""

import math
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from colossal_llama2.storage import json_input

if TYPE_CHECKING:
    pass

COUNTED_LATER = ("untrained_steps", "bad_steps", "overflows")


@dataclass
class TrainState:
    """Where a run is. Saved and restored whole; all counts are over all ranks.

    Attributes:
        epoch: passes over the data that are complete.
        step: steps since the first epoch began, those without an update included.
        sample_start_index: samples of the current epoch that are consumed.
        samples_seen: samples consumed since the first epoch began.
        tokens_seen: tokens consumed since the first epoch began, padding not counted.
        untrained_steps: steps without an update, since they had no trained token.
        bad_steps: steps without an update, since loss or gradient norm was not finite.
        overflows: passes over a step's samples that were repeated, since fp16 gradients overflowed.
    """

    epoch: int = 0
    step: int = 0
    sample_start_index: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    untrained_steps: int = 0
    bad_steps: int = 0
    overflows: int = 0

    @property
    def updates(self) -> int:
        """Steps that updated the weights."""
        return self.step - self.untrained_steps - self.bad_steps

    def count(self, result: "StepResult", taken: int) -> None:
        """Add a step that took so many samples, over all ranks."""
        self.step += 1
        self.sample_start_index += taken
        self.samples_seen += taken
        self.tokens_seen += result.tokens
        self.untrained_steps += result.is_untrained
        self.bad_steps += result.problem is not None
        self.overflows += result.overflows

    def to_dict(self) -> dict[str, int]:
        """The fields by name, as running_states.json holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainState":
        """The state of a running_states.json. Raises KeyError or ValueError if a field is missing or impossible."""
        # Checkpoints of earlier versions lack what was not counted then.
        values = {**dict.fromkeys(COUNTED_LATER, 0), **values}
        state = cls(**{field.name: json_input.whole_number(values, field.name) for field in fields(cls)})
        if state.updates < 0:
            without = state.untrained_steps + state.bad_steps
            raise ValueError(f"{without} steps made no update (untrained_steps, bad_steps), but step is {state.step}")
        return state


@dataclass(frozen=True)
class StepTotals:
    """What all ranks know when a step begins, by one reduction.

    Attributes:
        predicted: tokens that count in the step's loss.
        tokens: consumed by the step, padding not counted.
        places: of the step, padding counted.
        untrained_micro_batches: of the step, those without a token that counts in the loss.
        signal: that came to a rank before now, None if none did.
    """

    predicted: int
    tokens: int
    places: int
    untrained_micro_batches: int
    signal: signal.Signals | None


@dataclass(frozen=True)
class StepResult:
    """What one step gave. No update was made if it is untrained or has a problem.

    Attributes:
        loss: mean over the predicted tokens of all ranks and micro batches, in nats; None if there are none.
        grad_norm: before clipping; None if there are no predicted tokens, or if fp16 overflowed at every loss scale.
        tokens: consumed by all ranks, padding not counted.
        by_group: what `LossTally.take` gave, summed over all ranks; empty if there is none.
        overflows: passes before the last one, in which fp16 gradients overflowed.
        loss_scale: of fp16, in the last pass; None in other precisions.
    """

    loss: float | None
    grad_norm: float | None
    tokens: int
    by_group: Sequence[float] = ()
    overflows: int = 0
    loss_scale: float | None = None

    @property
    def is_untrained(self) -> bool:
        """True if the step had no predicted token."""
        return self.loss is None

    @property
    def problem(self) -> str | None:
        """Which of the figures is not finite, None if all that there are are finite."""
        if self.loss is None:
            return None
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        if self.grad_norm is None:
            return f"gradient norm is not finite, even at a loss scale of {self.loss_scale:,.0f},"
        return None if math.isfinite(self.grad_norm) else f"gradient norm is {self.grad_norm}"
