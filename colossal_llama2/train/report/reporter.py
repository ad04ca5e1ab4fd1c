"""Reports each step of a run, on rank 0: to the trackers, train_log.jsonl, and a progress bar or lines.

Nothing here waits for a GPU. Loss and gradient norm are known when a step ends, since the loop itself needs them. The
times of a GPU are read one step later, when it has reached the events that mark them.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.corpus.category_names import category_name
from colossal_llama2.dataset.read.loss_groups import MAX_GROUPS, Amount, Groups, by_name
from colossal_llama2.engine.device import flops_per_token, known_peak, peak_memory
from colossal_llama2.markdown import plain
from colossal_llama2.model.config_fields import llama_config
from colossal_llama2.tracker_names import TENSORBOARD
from colossal_llama2.train.report import train_log
from colossal_llama2.train.report.metric_writers import SeveralWriters, TensorBoardWriter
from colossal_llama2.train.report.run_report import RunReport
from colossal_llama2.train.report.trackers import TrackerIds, open_trackers
from colossal_llama2.train.report.train_log import TrainLog, evaluation_record
from colossal_llama2.train.run_folder import run_outputs
from colossal_llama2.train.settings.config import ReportConfig
from colossal_llama2.train.settings.model_source import ModelSource
from colossal_llama2.train.stepping.silent_reporter import SilentReporter, SilentWriter
from colossal_llama2.train.stepping.state import StepResult, StepTotals, TrainState
from colossal_llama2.train.stepping.step_timer import Mark, StepTimer, seconds_of

if TYPE_CHECKING:
    from colossal_llama2.dataset.read.order import SampleOrder
    from colossal_llama2.engine.engine import Engine
    from colossal_llama2.engine.loss_tally import LossTally

# Key in train_log.jsonl -> tag in TensorBoard.
SCALARS = {
    "loss": "Loss",
    "lr": "Learning Rate",
    "grad_norm": "Gradient Norm",
    "loss_scale": "Loss Scale",
    "tokens_per_second": "Tokens per Second",
    "padding_share": "Padding Share",
    "mfu": "MFU",
    "memory_bytes": "Memory in Bytes",
    "epoch": "Epoch",
    "bucket": "Bucket",
}
# In tqdm's form: the bar fills the remaining width.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
FAMILIES = {"seconds": "Seconds", "loss_by_source": "Loss by Source", "loss_by_category": "Loss by Category"}


class Reporter(SilentReporter):
    """Reports everything. For rank 0."""

    timer: StepTimer

    def __init__(
        self,
        *,
        writer: SilentWriter,
        log: TrainLog,
        progress: logs.SilentProgress,
        groups: Sequence[tuple[str, str]] = (),
        bucket_of: Callable[[int], int] | None = None,
        flops_per_token: Callable[[int], float],
        peak_flops: float | None,
    ):
        """
        Args:
            groups: (source, category) of each group in StepResult.by_group, in its order.
            bucket_of: position of a sample in any epoch -> its bucket, both counted from 0.
            flops_per_token: tokens of a sample -> model FLOPs of each of them.
            peak_flops: peak of all ranks together in FLOPs per second; None if unknown.
        """
        self._writer, self._log, self._progress, self._groups = writer, log, progress, groups
        self._bucket_of, self._flops_per_token, self._peak_flops = bucket_of, flops_per_token, peak_flops
        self.timer = StepTimer()
        self._late: list[tuple[dict[str, Any], list[Mark]]] = []

    def step(
        self,
        state: TrainState,
        totals: StepTotals,
        result: StepResult,
        *,
        learning_rate: float,
        taken: int,
        seconds: float,
    ) -> None:
        record: dict[str, Any] = {"step": state.step, "epoch": state.epoch}
        if self._bucket_of is not None:
            record["bucket"] = self._bucket_of(state.sample_start_index - taken)
        record.update(loss=result.loss, lr=learning_rate, grad_norm=result.grad_norm, tokens=result.tokens)
        if result.loss_scale is not None:
            record["loss_scale"] = result.loss_scale
        if totals.untrained_micro_batches:
            record["untrained_micro_batches"] = totals.untrained_micro_batches
        record["tokens_per_second"] = round(result.tokens / seconds, 1)
        record["padding_share"] = round(1 - totals.tokens / totals.places, 6)
        if self._peak_flops is not None:
            flops = self._flops_per_token(result.tokens // taken) * result.tokens
            record["mfu"] = round(flops / seconds / self._peak_flops, 6)
        record["memory_bytes"] = peak_memory()
        if result.by_group:
            record.update(self._by_name(result.by_group))
        self._settle()
        self._late.append((record, self.timer.take()))
        if not self.timer.is_late:
            self._settle()
        self._progress.update(**shown(record))

    def _by_name(self, by_group: Sequence[float]) -> dict[str, dict[str, float]]:
        """The mean loss over the tokens of each source and of each category in the step."""
        sums, counts = by_group[: len(self._groups)], by_group[len(self._groups) :]
        means = {}
        for column, name in enumerate(("loss_by_source", "loss_by_category")):
            losses, tokens = (by_name(self._groups, values, column=column) for values in (sums, counts))
            means[name] = {key: losses[key] / tokens[key] for key in losses if tokens[key]}
        return means

    def _settle(self) -> None:
        """Write the records of the steps whose times can be read."""
        for record, marks in self._late:
            record["seconds"] = {part: round(value, 6) for part, value in seconds_of(marks).items()}
            self._log.write(record)
            self._writer.write(record["step"], scalars(record))
        self._late.clear()

    def _settle_all(self) -> None:
        if self._late:
            import torch

            torch.cuda.synchronize()
            self._settle()

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._settle_all()
        self._log.write(evaluation_record(step, figures))
        self._writer.write(step, figures)

    def answers(self, step: int, answers: Sequence[Mapping[str, Any]]) -> None:
        self._settle_all()
        self._log.write({"step": step, "answers": answers})
        self._writer.write_texts(step, {f"Answers/{n:02}": answer_text(a) for n, a in enumerate(answers, start=1)})

    def before_save(self) -> None:
        self._settle_all()
        self._log.sync()

    def saved(self, step: int, name: str, seconds: float) -> None:
        self._log.write({"step": step, "checkpoint": name, "seconds": {"save": round(seconds, 6)}})
        self._writer.write(step, {"Seconds/save": seconds})

    def close(self) -> None:
        # The failure of the GPU has already been reported.
        with contextlib.suppress(RuntimeError):
            self._settle_all()
        self._log.close()
        self._writer.begin_close()


def answer_text(answer: Mapping[str, Any]) -> str:
    """An answer to one of --eval_prompts in Markdown, with its prompt."""
    cut = " ..." if answer["is_cut"] else ""
    return f"**{plain(answer['prompt'])}**\n\n{plain(answer['answer'])}{cut}"


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a step's record under their tags in TensorBoard."""
    figures = {SCALARS[key]: record[key] for key in SCALARS if record.get(key) is not None}
    for key, family in FAMILIES.items():
        shown_as = category_name if key == "loss_by_category" else str
        figures.update({f"{family}/{shown_as(name)}": value for name, value in record.get(key, {}).items()})
    return figures


def shown(record: dict[str, Any]) -> dict[str, str]:
    """The figures of a step for the bar and lines, the most important first: a narrow terminal cuts the end."""
    figures = {
        "loss": "no trained token" if record["loss"] is None else f"{record['loss']:.4f}",
        "lr": f"{record['lr']:.2e}",
        "norm": "none" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}",
        "tok/s": short_count(record["tokens_per_second"]),
        "epoch": str(record["epoch"]),
    }
    if "bucket" in record:
        figures["bucket"] = str(record["bucket"])
    if "mfu" in record:
        figures["MFU"] = f"{record['mfu']:.1%}"
    figures["padding"] = f"{record['padding_share']:.1%}"
    figures["memory"] = f"{record['memory_bytes'] / 2**30:.1f} GiB"
    return figures


def short_count(value: float) -> str:
    """Three digits or four: 812, 7,758, 18.4k, 1.24M."""
    for least, unit, name, digits in ((1e6, 1e6, "M", 2), (1e4, 1e3, "k", 1)):
        if value >= least:
            return f"{value / unit:.{digits}f}{name}"
    return f"{value:,.0f}"


def loss_groups(amounts: Sequence[Amount] | None, tally: "LossTally") -> Groups | None:
    """The (source, category) pairs whose losses are reported apart; begins the tally. None, with the reason logged."""
    reason = tally.unfed
    if amounts is None:
        reason = "the data does not record where documents come from, or they are not kept apart"
    elif len(amounts) > MAX_GROUPS:
        reason = f"the data has {len(amounts)} pairs of them, more than {MAX_GROUPS}"
    if amounts is None or reason:
        logs.get_logger().info("No loss by source and category: %s", reason)
        return None
    tally.begin(len(amounts))
    return Groups([amount[:2] for amount in amounts])


def _writer(trackers: Sequence[str], report: RunReport, folder: Path, *, last_step: int) -> SilentWriter:
    """What writes the figures of a run, from the step after `last_step` on, to each of the trackers."""
    writers: list[SilentWriter] = []
    if TENSORBOARD in trackers:
        writers.append(TensorBoardWriter(str(folder), last_step=last_step))
    ids = TrackerIds(report.folder.trackers, run_outputs.identify(report.folder))
    others = [name for name in trackers if name != TENSORBOARD]
    name = Path(os.path.realpath(report.folder.path)).name
    return SeveralWriters([*writers, *open_trackers(others, ids, name=name, settings=report.settings, folder=folder)])


@contextlib.contextmanager
def reporting(
    *,
    engine: "Engine",
    state: TrainState,
    report: RunReport,
    source: ModelSource,
    order: "SampleOrder",
    parameters: int,
    settings: ReportConfig,
) -> Iterator[SilentReporter]:
    """A reporter of the run from `state` on. The report's files are written at the end, also after an error.

    Called on all ranks; an error on the first while it opens its files is raised on all.
    """
    with engine.first_rank_only() as first:
        if first:
            config = llama_config(source.weights_folder)
            is_new = source.checkpoint is None
            log = TrainLog(train_log.begin(report.folder, last_step=state.step, resumed_from=source.checkpoint))
            events_dir = run_outputs.claim_events_folder(settings.tensorboard_dir, run_folder=report.folder)
            writer = _writer(settings.trackers, report, events_dir, last_step=-1 if is_new else state.step)
    if not first:
        yield SilentReporter()
        return
    peak = known_peak(settings.peak_tflops)
    with contextlib.ExitStack() as parts:
        # The last to be waited for: a launcher may kill a run that was stopped, and its files are written by then.
        parts.callback(writer.close)
        parts.callback(report.write_files)
        progress = logs.progress(
            total=report.settings["total_steps"],
            initial=state.step,
            description="train",
            unit="step",
            bar_format=BAR_FORMAT,
        )
        reporter = Reporter(
            writer=writer,
            log=log,
            progress=parts.enter_context(progress),
            groups=[amount[:2] for amount in report.amounts or ()],
            bucket_of=None if order.buckets is None else order.bucket_of,
            flops_per_token=functools.partial(
                flops_per_token, config, parameters, trains_weights=engine.settings.trainable.adapter is None
            ),
            peak_flops=None if peak is None else peak * 1e12 * engine.world_size,
        )
        yield parts.enter_context(contextlib.closing(reporter))
