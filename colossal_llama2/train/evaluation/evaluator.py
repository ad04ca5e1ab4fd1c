"""How well a model predicts held-out text while it trains: loss per token, perplexity and bits per byte.

With these, the accuracy on tasks (accuracies.py) and answers to prompts (answers.py) are measured and reported.

Bits per byte do not depend on the tokenizer, so they can be compared across vocabularies:

    sum of -log2 p over the predicted tokens / UTF-8 bytes of the text behind these tokens

All tokens with a loss (labels other than -100) are predicted, except the first token of each piece of a document, with
or without a document mask: that is `<s>`, which is not text, or the first token of a later piece of a cut document.
`</s>` is predicted and has no bytes, since marking the end of a text is a part of its cost. The bytes are those of the
original text (see `encoding.text_bytes`), and are counted when the data is prepared.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.neftune import NoNoise
from colossal_llama2.plurals import counted
from colossal_llama2.train.checkpointing.evaluation_history import (
    ACCURACY,
    STANDARD_ERROR,
    EvaluationHistory,
    Figures,
)
from colossal_llama2.train.evaluation.accuracies import LoadedTask, accuracy_on
from colossal_llama2.train.evaluation.alarm import Alarm
from colossal_llama2.train.evaluation.answers import Answer, Answerer, as_record
from colossal_llama2.train.stepping.pipeline import pipeline_loss
from colossal_llama2.train.stepping.silent_reporter import SilentReporter
from colossal_llama2.train.stepping.state import TrainState
from colossal_llama2.train.stepping.step import weighted_loss
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    import datasets

    from colossal_llama2.engine.engine import Engine

# Of a prompt and of an answer in the log; train_log.jsonl has all of them.
LOGGED_CHARACTERS = 60


@dataclass(frozen=True)
class LoadedSet:
    """A set of held-out samples.

    Attributes:
        samples: as `load_parts` returns them.
        target_bytes: UTF-8 bytes of the text that they predict; None if unknown.
    """

    name: str
    samples: "datasets.Dataset"
    target_bytes: int | None


class SilentEvaluator:
    """No-op evaluator, used where nothing is measured."""

    def before_training(self, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]) -> None:
        """Evaluate the model that the run begins with, unless the run that it resumes has done so.

        Args:
            run_ends: no step is left; the run only completes a pending evaluation.
            save_now: saves a checkpoint and returns its folder.

        Raises:
            RunError: as `after_step`, after a pending evaluation.
        """

    def after_step(
        self, state: TrainState, *, epoch_ends: bool, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        """Evaluate the model if that is due.

        Raises:
            RunError: on all ranks, if a figure is beyond its limit and the alarm ends the run, which is saved.
        """


class Evaluator(SilentEvaluator):
    """Evaluates all sets and tasks when that is due. All ranks call its methods together."""

    def __init__(
        self,
        engine: "Engine",
        sets: Sequence[LoadedSet],
        collator: Collator,
        *,
        tasks: Sequence[LoadedTask] = (),
        answerer: Answerer | None,
        interval: int | None,
        alarm: Alarm,
        reporter: SilentReporter,
        history: EvaluationHistory,
        stop: NoSignals,
        eval_pending: bool = False,
    ):
        """
        Args:
            tasks: on which the accuracy is measured.
            answerer: answers --eval_prompts at each evaluation; None without any.
            interval: in optimizer steps; None evaluates only at the ends of epochs, which is done in any case.
            history: the evaluations so far; each one is added to it.
            eval_pending: evaluate again at the step at which the run begins, since a signal interrupted that.
        """
        self._engine, self._collator, self._interval = engine, collator, interval
        self._measured: list[LoadedSet | LoadedTask] = [*sets, *tasks]
        self._alarm, self._reporter, self._history = alarm, reporter, history
        self._answerer, self._stop, self._eval_pending = answerer, stop, eval_pending
        self._alarmed: list[str] = []

    def before_training(self, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]) -> None:
        names = self._history.names()
        if self._eval_pending:
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)
        elif any(measured.name not in names for measured in self._measured):
            self._measure(state.step)

    def after_step(
        self, state: TrainState, *, epoch_ends: bool, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        if epoch_ends or (self._interval is not None and state.step % self._interval == 0):
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)

    def _judge(
        self, figures: Figures | None, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        """Raise the alarm if a figure is beyond its limit."""
        if figures is None:
            return
        beyond = self._alarm.sentences(figures, self._history)
        # After the last step there is nothing to stop.
        stops = self._alarm.stops and not run_ends
        for name, sentence in beyond.items():
            if not stops and name not in self._alarmed:
                logs.get_logger().warning("%s", sentence)
        self._alarmed = list(beyond)
        if beyond and stops:
            folder = save_now(state)
            risen = [one.name for one in self._measured if one.name in beyond and isinstance(one, LoadedSet)]
            raise RunError(
                f"{'; '.join(beyond.values())}; the run ends, step {state.step} is saved: continue with "
                f"--load_checkpoint {folder} and another --forgetting_alarm, or mix in more of "
                f"{', '.join(risen) or 'the data that the model had before'}"
            )

    def _measure(self, step: int) -> Figures | None:
        """The figures of all sets and tasks; None if a signal came, after which the run saves and ends."""
        figures: Figures = {}
        for measured in self._measured:
            start = time.monotonic()
            if isinstance(measured, LoadedTask):
                found = accuracy_on(self._engine, measured, self._collator, stop=self._stop)
            else:
                found = self._loss(measured)
            if found is None:
                self._interrupt(step)
                return None
            figures[measured.name] = found
            self._log(step, measured.name, found, time.monotonic() - start)
        start = time.monotonic()
        answers = [] if self._answerer is None else self._answerer.answer()
        if answers is None:
            self._interrupt(step)
            return None
        known = self._history.names()
        self._history.add(step, figures)
        for sentence in self._alarm.unreachable({name: one for name, one in figures.items() if name not in known}):
            logs.get_logger().warning("%s", sentence)
        named = {f"Evaluation/{name}/{key}": v for name, values in figures.items() for key, v in values.items()}
        self._reporter.write(step, named)
        if answers:
            self._log_answers(step, answers, time.monotonic() - start)
            self._reporter.answers(step, as_record(answers))
        return figures

    def _loss(self, eval_set: LoadedSet) -> dict[str, float] | None:
        """The figures of a set; None if a signal came. Raises UserError if nothing of it is predicted."""
        sums = summed_loss(self._engine, eval_set.samples, self._collator, stop=self._stop)
        if sums is None:
            return None
        nats, predicted = sums
        if predicted == 0:
            raise UserError(f"--eval_dataset {eval_set.name}: none of its tokens is predicted; give other data")
        return figures_of(nats, predicted, eval_set.target_bytes)

    def _interrupt(self, step: int) -> None:
        """Record for the checkpoint that the evaluation is pending; step 0 has no checkpoint."""
        self._history.add(step, {})
        later = "; a resumed run will repeat it" if step else ""
        logs.get_logger().info("step %d: a signal interrupted the evaluation%s", step, later)

    def _log(self, step: int, name: str, figures: dict[str, float], seconds: float) -> None:
        key, first = self._history.first(name, figures)
        shown = _accuracy_figures(figures, first) if key == ACCURACY else _loss_figures(figures, key, first)
        logs.get_logger().info("step %d: %s: %s (%.1f s)", step, name, shown, seconds)

    def _log_answers(self, step: int, answers: Sequence[Answer], seconds: float) -> None:
        for answer in answers:
            prompt, text = (_shortened(value) for value in (answer.prompt, answer.text))
            logs.get_logger().info("step %d: prompt %r, answer %r", step, prompt, text)
        logs.get_logger().info("step %d: %s answered (%.1f s)", step, counted(len(answers), "prompt"), seconds)


def _loss_figures(figures: Mapping[str, float], key: str, first: float | None) -> str:
    """For the log, with the change of the figure `key` since its first value."""
    bits = f", {figures['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in figures else ""
    since = f", {figures[key] / first - 1:+.2%} since the first" if first else ""
    return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.2f}{bits}{since}"


def _accuracy_figures(figures: Mapping[str, float], first: float | None) -> str:
    error = f", error {figures[STANDARD_ERROR]:.1%}" if STANDARD_ERROR in figures else ""
    since = "" if first is None else f", {100 * (figures[ACCURACY] - first):+.1f} points"
    return f"accuracy {figures[ACCURACY]:.1%}{error}{since}"


def _shortened(text: str) -> str:
    return text if len(text) <= LOGGED_CHARACTERS else text[: LOGGED_CHARACTERS - 3] + "..."


def figures_of(nats: float, predicted: int, target_bytes: int | None) -> dict[str, float]:
    """The figures of a summed loss, by name. Bits per byte are left out where the bytes are unknown."""
    loss = nats / predicted
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if target_bytes:
        figures["bits_per_byte"] = nats / math.log(2) / target_bytes
    return figures


def summed_loss(
    engine: "Engine", samples: "datasets.Dataset", collator: Collator, *, stop: NoSignals
) -> tuple[float, int] | None:
    """The model's loss on all samples.

    The samples are divided among the data-parallel ranks. All of these run the same number of forward passes, some of
    them on a sample that does not count. Training is unaffected.

    Returns:
        The sum over the predicted tokens of all ranks, in nats, and their number. None if a signal came to a rank.
    """
    nats, predicted = 0.0, 0
    with engine.evaluating():
        for batch in _share(engine, samples, collator):
            # Agreed on by the hosts, without their GPUs: the others would wait for a rank that stopped on its own.
            if agreed_signal(engine.sum_over_data(stop.received(), known_to_host=True)) is not None:
                return None
            predicted += batch.predicted
            if engine.is_pipelined:
                nats += pipeline_loss(engine, [batch], noise=NoNoise(), step=0, predicted=engine.data_size)
            else:
                # Summed on the device, so that the host does not wait for each batch; float64 makes this exact enough.
                nats = nats + weighted_loss(engine, batch, batch.predicted).double()
    total, count = engine.sum_over_data([float(nats), predicted])
    return total, round(count)


def _share(engine: "Engine", samples: "datasets.Dataset", collator: Collator) -> Iterator[Batch]:
    """This rank's micro batches, all of the same size."""
    size = engine.settings.micro_batch_size
    width = size * engine.data_size
    for start in range(0, len(samples), width):
        begin = start + engine.data_rank * size
        rows = np.arange(begin, begin + size)
        counts = rows < len(samples)
        batch = collator(samples[np.where(counts, rows, 0)])
        yield batch if counts.all() else _masked(batch, counts)


def _masked(batch: Batch, counts: np.ndarray) -> Batch:
    """The same batch, with labels only in the rows that count."""
    from dataclasses import replace

    import torch

    labels = batch.labels.masked_fill(~torch.from_numpy(counts)[:, None], IGNORE_INDEX)
    return replace(batch, labels=labels, predicted=int((labels[:, 1:] != IGNORE_INDEX).sum()))
