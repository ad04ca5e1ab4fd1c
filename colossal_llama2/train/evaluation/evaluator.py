"""How well a model predicts held-out text while it trains: loss per token, perplexity and bits per byte.

Bits per byte do not depend on how a tokenizer cuts the text, so they can be compared across vocabularies:

    sum of -log2 p over the predicted tokens / UTF-8 bytes of the text that these tokens stand for

Predicted are all tokens that carry a loss (labels other than -100) but the first of a piece of a document, with or
without a document mask: that is `<s>`, which is no text, or the first token of a later piece of a cut document. `</s>`
is predicted and has no bytes: what it costs to say where a text ends is a part of the text's cost. The bytes are those
of the text as it was given (see `tokenizer.text_bytes`), and are counted when the data is prepared.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.read.batch import Batch, Collator
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.neftune import NoNoise
from colossal_llama2.train.stepping.pipeline import pipeline_loss
from colossal_llama2.train.stepping.silent_reporter import SilentWriter
from colossal_llama2.train.stepping.state import TrainState
from colossal_llama2.train.stepping.step import weighted_loss
from colossal_llama2.train.stepping.stopping import NoSignals, agreed_signal

if TYPE_CHECKING:
    import datasets

    from colossal_llama2.engine.engine import Engine

# What is measured of each set: name -> {"loss": nats per token, "perplexity": ..., "bits_per_byte": ...}.
Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class LoadedSet:
    """A set of held-out samples.

    Attributes:
        samples: as `load_tokenized_dataset` gives them.
        target_bytes: of the text that they predict; None if unknown.
    """

    name: str
    samples: "datasets.Dataset"
    target_bytes: int | None


@dataclass(frozen=True)
class Alarm:
    """By which share of its first value a set's figure may rise, and whether the run ends if it rises by more."""

    limits: dict[str, float]
    stops: bool = False


def history_of(saved: dict[str, Any], fingerprints: dict[str, str]) -> list[dict[str, Any]]:
    """The evaluations that a resumed checkpoint tells, but for those of a name that stands for other samples now.

    Args:
        saved: its running_states.json.
        fingerprints: of the samples of each name now.
    """
    before = saved.get("eval_fingerprints") or {}
    others = {name for name, value in fingerprints.items() if before.get(name, value) != value}
    for name in sorted(others):
        logs.get_logger().warning("--eval_dataset %s: other samples than before, so it is compared from here on", name)
    history = []
    for entry in saved.get("evaluations") or ():
        # One that was cut short has no figures, and goes.
        figures = {name: values for name, values in entry["figures"].items() if name not in others}
        if figures:
            history.append({"step": entry["step"], "figures": figures})
    return history


def is_cut_short(saved: dict[str, Any]) -> bool:
    """Whether a signal cut short the evaluation of the step that a checkpoint was written after."""
    history = saved.get("evaluations")
    return bool(history) and not history[-1]["figures"]


class SilentEvaluator:
    """Of a run that is not measured."""

    history: Sequence[dict[str, Any]] = ()

    def before_training(self, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]) -> None:
        """Measure the model that the run begins with, unless the run that it resumes has done so.

        Args:
            run_ends: no step is left, the run makes up for an evaluation and ends.

        Raises:
            RunError: as `after_step`, if it makes up for an evaluation.
        """

    def after_step(
        self, state: TrainState, *, epoch_ends: bool, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        """Measure it if that is due.

        Raises:
            RunError: on all ranks, if the old language is forgotten and the run shall end then; it is saved.
        """


class Evaluator(SilentEvaluator):
    """Measures all sets when it is due. All ranks call its methods together.

    Attributes:
        history: what was measured, [{"step": 400, "figures": {"en": {"loss": 2.41, ...}}}, ...]; a resumed run begins
            with that of its checkpoint. An evaluation that a signal cut short has no figures, and is the last.
    """

    def __init__(
        self,
        engine: "Engine",
        sets: Sequence[LoadedSet],
        collator: Collator,
        *,
        interval: int | None,
        alarm: Alarm,
        metrics: SilentWriter,
        history: list[dict[str, Any]],
        stop: NoSignals,
        makes_up: bool = False,
    ):
        """
        Args:
            interval: in optimizer steps; None for the ends of epochs alone, which are measured in any case.
            makes_up: for an evaluation of the step at which the run begins, which was cut short.
        """
        self._engine, self._sets, self._collator, self._interval = engine, sets, collator, interval
        self._alarm, self._metrics, self.history = alarm, metrics, history
        self._stop, self._makes_up = stop, makes_up
        self._alarmed: list[str] = []

    def before_training(self, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]) -> None:
        names = {name for entry in self.history for name in entry["figures"]}
        if self._makes_up:
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)
        elif any(one.name not in names for one in self._sets):
            self._measure(state.step)

    def after_step(
        self, state: TrainState, *, epoch_ends: bool, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        if epoch_ends or (self._interval is not None and state.step % self._interval == 0):
            self._judge(self._measure(state.step), state, run_ends=run_ends, save_now=save_now)

    def _judge(
        self, figures: Figures | None, state: TrainState, *, run_ends: bool, save_now: Callable[[TrainState], Any]
    ) -> None:
        """Raise the alarm where a figure has risen too far."""
        if figures is None:
            return
        risen = self._risen(figures)
        # After the last step there is nothing left to stop.
        stops = self._alarm.stops and not run_ends
        for name, sentence in risen.items():
            if not stops and name not in self._alarmed:
                logs.get_logger().warning("%s", sentence)
        self._alarmed = list(risen)
        if risen and stops:
            folder = save_now(state)
            raise RunError(
                f"{'; '.join(risen.values())}; the run ends, step {state.step} is saved: go on with --load_checkpoint "
                f"{folder} and another --forgetting_alarm, or mix in more of {', '.join(risen)}"
            )

    def _measure(self, step: int) -> Figures | None:
        """The figures of all sets; None if a signal came, which ends the run as soon as what is trained is saved."""
        figures: Figures = {}
        for one in self._sets:
            start = time.monotonic()
            sums = summed_loss(self._engine, one.samples, self._collator, stop=self._stop)
            if sums is None:
                self._leave_unfinished(step)
                return None
            nats, predicted = sums
            if predicted == 0:
                raise UserError(f"--eval_dataset {one.name}: none of its tokens is to be predicted; give other data")
            figures[one.name] = figures_of(nats, predicted, one.target_bytes)
            self._tell(step, one.name, figures[one.name], time.monotonic() - start)
        self.history.append({"step": step, "figures": figures})
        names = {f"Evaluation/{name}/{key}": v for name, values in figures.items() for key, v in values.items()}
        self._metrics.write(step, names)
        return figures

    def _leave_unfinished(self, step: int) -> None:
        """Note it for the checkpoint; there is none of step 0."""
        self.history.append({"step": step, "figures": {}})
        later = ", and made up for when the run is resumed" if step else ""
        logs.get_logger().info("step %d: a signal came, so the evaluation is left unfinished%s", step, later)

    def _tell(self, step: int, name: str, figures: dict[str, float], seconds: float) -> None:
        key, first = self._first(name, figures)
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

    def _first(self, name: str, now: dict[str, float]) -> tuple:
        """Which figure of a set is compared with that of `now`, and its first value, None if there is none yet."""
        for entry in self.history:
            if name in entry["figures"]:
                figures = entry["figures"][name]
                key = "bits_per_byte" if "bits_per_byte" in figures.keys() & now.keys() else "loss"
                return key, figures[key]
        return "loss", None

    def _risen(self, figures: Figures) -> dict[str, str]:
        """The sets whose figure has risen too far, each with a sentence that says so."""
        risen = {}
        for name, limit in self._alarm.limits.items():
            key, first = self._first(name, figures[name])
            now = figures[name][key]
            # Not "now > ...", which a NaN is not.
            if not now <= first * (1 + limit):
                risen[name] = (
                    f"--forgetting_alarm {name}={limit:g}: {key.replace('_', ' ')} of {name} went from {first:.4f} "
                    f"to {now:.4f}, by {now / first - 1 if first else math.inf:+.1%}"
                )
        return risen


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

    The samples are dealt to the data-parallel ranks, all of which make the same number of forward passes, some of
    them on a sample that does not count. Training goes on afterwards as if nothing had been.

    Returns:
        Sum over the predicted tokens, in nats, and their number; over all ranks. None if a signal came to one of them.
    """
    nats, predicted = 0.0, 0
    with engine.evaluating():
        for batch in _share(engine, samples, collator):
            # Hosts ask each other, without their GPUs. One that stopped by itself would be waited for.
            if agreed_signal(engine.sum_over_data(stop.received(), known_to_host=True)) is not None:
                return None
            predicted += batch.predicted
            if engine.is_pipelined:
                nats += pipeline_loss(engine, [batch], noise=NoNoise(), step=0, predicted=engine.data_size)
            else:
                # Added up on the device, so that the host need not wait for each batch; in float64, which adds nothing.
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
    """The same batch, of which only some rows predict anything."""
    from dataclasses import replace

    import torch

    labels = batch.labels.masked_fill(~torch.from_numpy(counts)[:, None], IGNORE_INDEX)
    return replace(batch, labels=labels, predicted=int((labels[:, 1:] != IGNORE_INDEX).sum()))
