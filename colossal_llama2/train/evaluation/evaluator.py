"""How well a model predicts held-out text while it trains: loss per token, perplexity and bits per byte.

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
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory, Figures
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


@dataclass(frozen=True)
class Alarm:
    """By which share of its first value each set's figure may rise, and whether the run ends if it rises further."""

    limits: Mapping[str, float]
    stops: bool = False


class SilentEvaluator:
    """No-op evaluator, used without --eval_dataset."""

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
            RunError: on all ranks, if a figure has risen beyond its limit and the alarm ends the run, which is saved.
        """


class Evaluator(SilentEvaluator):
    """Evaluates all sets when that is due. All ranks call its methods together."""

    def __init__(
        self,
        engine: "Engine",
        sets: Sequence[LoadedSet],
        collator: Collator,
        *,
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
            answerer: answers --eval_prompts when the sets are evaluated; None without any.
            interval: in optimizer steps; None evaluates only at the ends of epochs, which is done in any case.
            history: the evaluations so far; each one is added to it.
            eval_pending: evaluate again at the step at which the run begins, since a signal interrupted that.
        """
        self._engine, self._sets, self._collator, self._interval = engine, sets, collator, interval
        self._alarm, self._reporter, self._history = alarm, reporter, history
        self._answerer, self._stop, self._eval_pending = answerer, stop, eval_pending
        self._alarmed: list[str] = []

    def before_training(self, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]) -> None:
        names = self._history.names()
        if self._eval_pending:
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)
        elif any(eval_set.name not in names for eval_set in self._sets):
            self._measure(state.step)

    def after_step(
        self, state: TrainState, *, epoch_ends: bool, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        if epoch_ends or (self._interval is not None and state.step % self._interval == 0):
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)

    def _judge(
        self, figures: Figures | None, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        """Raise the alarm if a figure has risen too far."""
        if figures is None:
            return
        risen = self._risen(figures)
        # After the last step there is nothing to stop.
        stops = self._alarm.stops and not run_ends
        for name, sentence in risen.items():
            if not stops and name not in self._alarmed:
                logs.get_logger().warning("%s", sentence)
        self._alarmed = list(risen)
        if risen and stops:
            folder = save_now(state)
            raise RunError(
                f"{'; '.join(risen.values())}; the run ends, step {state.step} is saved: continue with "
                f"--load_checkpoint {folder} and another --forgetting_alarm, or mix in more of {', '.join(risen)}"
            )

    def _measure(self, step: int) -> Figures | None:
        """The figures of all sets; None if a signal came, after which the run saves and ends."""
        figures: Figures = {}
        for eval_set in self._sets:
            start, name = time.monotonic(), eval_set.name
            sums = summed_loss(self._engine, eval_set.samples, self._collator, stop=self._stop)
            if sums is None:
                self._interrupt(step)
                return None
            nats, predicted = sums
            if predicted == 0:
                raise UserError(f"--eval_dataset {name}: none of its tokens is predicted; give other data")
            figures[name] = figures_of(nats, predicted, eval_set.target_bytes)
            self._log(step, name, figures[name], time.monotonic() - start)
        start = time.monotonic()
        answers = [] if self._answerer is None else self._answerer.answer()
        if answers is None:
            self._interrupt(step)
            return None
        self._history.add(step, figures)
        named = {f"Evaluation/{name}/{key}": v for name, values in figures.items() for key, v in values.items()}
        self._reporter.write(step, named)
        if answers:
            self._log_answers(step, answers, time.monotonic() - start)
            self._reporter.answers(step, as_record(answers))
        return figures

    def _interrupt(self, step: int) -> None:
        """Record for the checkpoint that the evaluation is pending; step 0 has no checkpoint."""
        self._history.add(step, {})
        later = "; a resumed run will repeat it" if step else ""
        logs.get_logger().info("step %d: a signal interrupted the evaluation%s", step, later)

    def _log(self, step: int, name: str, figures: dict[str, float], seconds: float) -> None:
        key, first = self._history.first(name, figures)
        since = f", {figures[key] / first - 1:+.2%} since the first" if first else ""
        bits = f", {figures['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in figures else ""
        logs.get_logger().info(
            "step %d: %s: loss %.4f, perplexity %.2f%s%s (%.1f s)",
            step,
            name,
            figures["loss"],
            figures["perplexity"],
            bits,
            since,
            seconds,
        )

    def _log_answers(self, step: int, answers: Sequence[Answer], seconds: float) -> None:
        for answer in answers:
            prompt, text = (_shortened(value) for value in (answer.prompt, answer.text))
            logs.get_logger().info("step %d: prompt %r, answer %r", step, prompt, text)
        logs.get_logger().info("step %d: %s answered (%.1f s)", step, counted(len(answers), "prompt"), seconds)

    def _risen(self, figures: Figures) -> dict[str, str]:
        """The sets whose figure has risen beyond its limit, each with a sentence for the user."""
        risen = {}
        for name, limit in self._alarm.limits.items():
            key, first = self._history.first(name, figures[name])
            now = figures[name][key]
            # Not "now > ...", which is False for NaN.
            if first is not None and not now <= first * (1 + limit):
                risen[name] = (
                    f"--forgetting_alarm {name}={limit:g}: {key.replace('_', ' ')} of {name} went from {first:.4f} "
                    f"to {now:.4f}, by {now / first - 1 if first else math.inf:+.1%}"
                )
        return risen


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
