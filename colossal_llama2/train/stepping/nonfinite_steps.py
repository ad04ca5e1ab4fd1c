"""Steps without an update (no trained token, or a NaN/Inf loss or gradient norm), and repeated fp16 passes."""

from typing import TYPE_CHECKING

from colossal_llama2 import logs
from colossal_llama2.errors import RunError
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    from colossal_llama2.dataset.read.order import SampleOrder
    from colossal_llama2.train.stepping.state import StepResult, TrainState

SHOWN_ROWS = 8


class NonfiniteSteps:
    """Logs steps without an update, and ends a run with too many NaN/Inf losses or gradient norms."""

    def __init__(self, allowed: int):
        """
        Args:
            allowed: steps of the run that may have a NaN/Inf loss or gradient norm.
        """
        self._allowed = allowed

    def check(self, result: "StepResult", state: "TrainState", order: "SampleOrder", taken: int) -> None:
        """Log the step if it made no update.

        Args:
            state: before the step; its counts include the steps before a resume.
            taken: samples of the step, over all ranks.

        Raises:
            RunError: more steps with a NaN/Inf loss or gradient norm than allowed.
        """
        if result.is_untrained:
            where = _where(state, order, taken)
            logs.get_logger().warning(
                "no trained token at %s: all labels are -100; the weights were not updated", where
            )
        if result.problem is None:
            return
        count = state.bad_steps + 1
        text = f"the {result.problem} at {_where(state, order, taken)}; the weights were not updated"
        if count > self._allowed:
            raise RunError(
                f"{text}; {counted(count, 'such step')}, --max_bad_steps {self._allowed} allowed; earlier checkpoints "
                f"are complete: inspect these rows, or lower --lr"
            )
        logs.get_logger().warning("%s (%d of %d allowed)", text, count, self._allowed)


def _where(state: "TrainState", order: "SampleOrder", taken: int) -> str:
    begin, end = state.sample_start_index, state.sample_start_index + taken
    rows = ", ".join(map(str, order.rows(state.epoch, begin, min(end, begin + SHOWN_ROWS))))
    more = ", ..." if taken > SHOWN_ROWS else ""
    samples = f"samples {begin:,} to {end - 1:,} of epoch {state.epoch} (rows {rows}{more} of the data)"
    return f"step {state.step + 1}, {samples}"


def without_update(state: "TrainState") -> str:
    """The number of a run's steps without an update, and why, as the end of a clause; empty if there are none."""
    reasons = [
        f"{state.untrained_steps:,} had no trained token" if state.untrained_steps else "",
        f"{state.bad_steps:,} had a NaN/Inf loss or gradient norm" if state.bad_steps else "",
    ]
    text = ", ".join(filter(None, reasons))
    return f", {state.step - state.updates:,} of them without an update ({text})" if text else ""


def log_overflows(state: "TrainState") -> None:
    """Log how many passes of the run overflowed fp16, if any."""
    if state.overflows:
        logs.get_logger().info(
            "fp16: passes that overflowed and were repeated at half the loss scale: %s; no sample was lost",
            f"{state.overflows:,}",
        )
