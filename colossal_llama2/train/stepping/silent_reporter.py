"""No-op reporter and writer, for ranks that report nothing; the interface of the real ones."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2.train.stepping.step_timer import NoTimer

if TYPE_CHECKING:
    from colossal_llama2.train.stepping.state import StepResult, StepTotals, TrainState


class SilentWriter:
    """A metrics writer that discards everything: for all ranks but the first."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Record figures by name at an optimizer step."""

    def write_texts(self, step: int, texts: dict[str, str]) -> None:
        """Record Markdown by name at an optimizer step. Only TensorBoard does."""

    def begin_close(self) -> None:
        """Accept no more figures, and return without waiting until the last ones are written."""

    def close(self) -> None:
        """Flush the recorded figures, and close."""


class SilentReporter(SilentWriter):
    """A reporter that reports and measures nothing: for all ranks but the first."""

    timer: NoTimer = NoTimer()

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
        """Report a step.

        Args:
            state: after the step, before its epoch ends.
            taken: samples of the step, over all ranks.
            seconds: since the end of the previous step, without saves and evaluations.
        """

    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Report the answers to --eval_prompts, as train_log.jsonl records them."""

    def before_save(self) -> None:
        """Called before a checkpoint is written: all records so far must be on the disk first."""

    def saved(self, step: int, name: str, seconds: float) -> None:
        """Report that a checkpoint was written, and for how long it paused the training."""
