"""Steps whose loss or gradient norm is no number: told of, skipped up to a limit, and then the end of the run."""

from typing import TYPE_CHECKING

from colossal_llama2 import logs
from colossal_llama2.errors import RunError

if TYPE_CHECKING:
    from colossal_llama2.dataset.loader import SampleOrder
    from colossal_llama2.train.loop import StepResult, TrainState

SHOWN_ROWS = 8


class BadSteps:
    """Counts them; `allowed` are skipped."""

    def __init__(self, allowed: int):
        self._allowed, self._count = allowed, 0

    def check(self, result: "StepResult", state: "TrainState", order: "SampleOrder", taken: int) -> None:
        """Count the step if it is bad and tell of it.

        Args:
            state: before the step.
            taken: samples of the step, over all ranks.

        Raises:
            RunError: there were more bad steps than allowed.
        """
        problem = result.problem
        if problem is None:
            return
        self._count += 1
        begin, end = state.sample_start_index, state.sample_start_index + taken
        rows = ", ".join(map(str, order.rows(state.epoch, begin, min(end, begin + SHOWN_ROWS))))
        where = f"step {state.step + 1}, samples {begin:,} to {end - 1:,} of epoch {state.epoch}"
        where += f" (rows {rows}{', ...' if taken > SHOWN_ROWS else ''} of the data)"
        text = f"the {problem} at {where}; no update was made"
        if self._count > self._allowed:
            raise RunError(
                f"{text}; {self._count} such steps, --max_bad_steps {self._allowed} allowed; earlier checkpoints are "
                f"whole: look at these rows, or lower --lr"
            )
        logs.get_logger().warning("%s (%d of %d allowed)", text, self._count, self._allowed)
