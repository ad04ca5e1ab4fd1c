"""The position of a run, and the inputs and results of one optimizer step."""

import math
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from colossal_llama2.plurals import counted
from colossal_llama2.storage import json_input

COUNTED_LATER = ("untrained_steps", "bad_steps", "overflows")


@dataclass
class TrainState:
    """The position of a run. Saved and restored as a whole; all counts are over all ranks.

    Attributes:
        epoch: complete passes over the data.
        step: steps since the first epoch began, including those without an update.
        sample_start_index: samples of the current epoch that are consumed.
        samples_seen: samples consumed since the first epoch began.
        tokens_seen: tokens consumed since the first epoch began, padding not counted.
        untrained_steps: steps without an update because they had no trained token.
        bad_steps: steps without an update because the loss or the gradient norm was NaN/Inf.
        overflows: passes over a step's samples that were repeated because fp16 gradients overflowed.
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
        """Add a step that consumed `taken` samples, over all ranks."""
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
        # Checkpoints of earlier versions lack newer counts.
        values = {**dict.fromkeys(COUNTED_LATER, 0), **values}
        state = cls(**{field.name: json_input.whole_number(values, field.name) for field in fields(cls)})
        if state.updates < 0:
            without = state.untrained_steps + state.bad_steps
            skipped = f"{counted(without, 'step')} without an update (untrained_steps, bad_steps)"
            raise ValueError(f"{skipped}, but step is {state.step}")
        return state


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks at the start of a step, from one reduction.

    Attributes:
        predicted: tokens that count in the step's loss.
        tokens: consumed tokens, without padding; `places`: with padding.
        untrained_micro_batches: micro batches without a token that counts in the loss.
        signal: the signal that a rank received; None if there is none.
    """

    predicted: int
    tokens: int
    places: int
    untrained_micro_batches: int
    signal: signal.Signals | None


@dataclass(frozen=True)
class StepResult:
    """The result of one step. No update was made if it is untrained or has a problem.

    Attributes:
        loss: mean over the predicted tokens of all ranks and micro batches, in nats; None if there are none.
        grad_norm: before clipping; None if there are no predicted tokens, or if fp16 overflowed at every loss scale.
        tokens: consumed by all ranks, without padding.
        by_group: the tallies of `LossTally.take`, summed over all ranks; empty without loss groups.
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
        """Which of loss and gradient norm is NaN/Inf; None if neither is."""
        if self.loss is None:
            return None
        if not math.isfinite(self.loss):
            return f"loss is {self.loss}"
        if self.grad_norm is None:
            return f"gradient norm is NaN/Inf, even at a loss scale of {self.loss_scale:,.0f},"
        return None if math.isfinite(self.grad_norm) else f"gradient norm is {self.grad_norm}"
