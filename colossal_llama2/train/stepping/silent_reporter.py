"""What a rank that shows and records nothing uses instead of a reporter; also the interface of those that do."""

from typing import TYPE_CHECKING

from colossal_llama2.train.stepping.step_timer import NoTimer

if TYPE_CHECKING:
    from colossal_llama2.train.stepping.state import StepResult, StepTotals, TrainState


class SilentWriter:
    """A metrics writer that keeps nothing: for every rank but the first."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Record figures by name at an optimizer step."""

    def close(self) -> None:
        """Flush what was recorded."""


class SilentReporter(SilentWriter):
    """Shows nothing and measures nothing: for every rank but the first."""

    timer = NoTimer()

    def step(
        self,
        state: "TrainState",
        totals: "StepTotals",
        result: "StepResult",
        *,
        learning_rate: float,
        taken: int,
        seconds: float,
    ) -> None:
        """Show a step.

        Args:
            state: after the step, before its epoch ends.
            taken: samples of the step, over all ranks.
            seconds: from the end of the one before, saves and evaluations not counted.
        """

    def before_save(self) -> None:
        """Called before a checkpoint is written: what was shown till now must not be lost any more."""

    def saved(self, step: int, name: str, seconds: float) -> None:
        """Show that a checkpoint was written, and how long that held up the training."""
