"""The plan of a run before its first step: what it will read and do, as JSON (plan.json) and as a table.

    {"version": 1, "epochs": 1, "steps": 600, "samples_a_step": 4, "bucketed": true,
     "epoch": {"samples": 2402, "tokens": 301000, "steps": 600, "left_over_samples": 2, "left_over_tokens": 250},
     "buckets": [{"bucket": 0, "samples": 1200, "tokens": 150000, "first_step": 1, "last_step": 300, "absent": [],
         "sources": {"zh": {"parts": ["zh/part-00000"], "samples_there": 960, "tokens_there": 120000, "samples": 960,
             "tokens": 120000, "again": 0, "left_out": 0, "left_out_tokens": 0, "share": 0.8, "asked": 0.8,
             "categories": {"news": 120000}}, "en": ...}}, ...],
     "sources": {"zh": {"samples": 1920, "tokens": 240000, "share": 0.8}, ...},
     "categories": {"news": {"tokens": 240000, "share": 0.8}, ...}, "mixture": {"zh": 0.8, "en": 0.2},
     "mixture_end": "repeat", "warmup_steps": 15,
     "begins": {"epoch": 0, "sample": 0, "step": 0}, "ends": {"epoch": 0, "sample": 2400, "step": 600},
     "learning_rate": [[1, 2e-05], ..., [600, 3e-05]], "notes": ["en has no part left in buckets 3 to 9"]}

Samples and tokens are those of the first epoch, including left-over ones; every epoch has the same number of samples of
each source. "again" counts the repeats in "samples", "left_out" the samples that the epoch does not read. A part
without samples is in no bucket. Steps are counted from 1; those of a bucket belong to the epoch in which the run
begins, from there on, and are null if the run reads nothing of the bucket there. "begins" and "ends" are positions:
complete epochs, samples of the next epoch, and steps of the run. Nothing here needs torch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.corpus.category_names import category_name
from colossal_llama2.dataset.read.buckets import Buckets, MeasuredPart, make_buckets
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import category_tokens
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.tables import table_lines
from colossal_llama2.terminal_text import visible_line
from colossal_llama2.train.run_folder.file_names import PLAN_NAME
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.stepping.schedule import CosineSchedule

if TYPE_CHECKING:
    from colossal_llama2.train.stepping.state import TrainState

VERSION = 1
CURVE_POINTS = 33
MAX_ROWS = 24
TOLERANCE = 0.01


def make_order(
    num_samples: int,
    *,
    micro_batch_size: int,
    data_size: int,
    accumulation_steps: int,
    seed: int,
    buckets: Buckets | None = None,
    lengths: np.ndarray | None = None,
) -> SampleOrder:
    """The order of samples. Raises UserError if there are not enough for one micro batch on every rank.

    Args:
        num_samples: of the data; with buckets, these determine the samples of an epoch.
        data_size: number of data-parallel ranks.
        lengths: of all samples, to group them by length.
    """
    num_samples = buckets.num_samples if buckets else num_samples
    order = SampleOrder(num_samples, micro_batch_size, data_size, accumulation_steps, seed, buckets, lengths)
    if order.steps_after(0) == 0:
        raise UserError(
            f"--dataset has {counted(num_samples, 'sample')}, one micro batch needs {order.samples_per_micro_step} "
            f"(--micro_batch_size {micro_batch_size} on {data_size} data-parallel ranks); "
            f"give more data, or smaller micro batches"
        )
    return order


def buckets_of(data: Data, measured: Sequence[MeasuredPart]) -> Buckets | None:
    """The buckets that the order follows; None for one shuffle of everything."""
    return make_buckets(measured, bucketed=data.bucketed, mixture=data.mixture) if data.is_ordered else None


class _Place(NamedTuple):
    """A position: complete epochs, samples read of the next one, and steps."""

    epoch: int
    sample: int
    step: int


def build_plan(
    data: Data,
    measured: Sequence[MeasuredPart],
    order: SampleOrder,
    *,
    num_epochs: int,
    schedule: CosineSchedule,
    state: "TrainState",
) -> dict[str, Any]:
    """The plan as in this module's docstring, counted in the order that the run follows.

    Args:
        state: where the run begins; at least one step is left.
    """
    rows = order.epoch_rows(0)
    lengths = np.concatenate([part_lengths for _, part_lengths in measured])
    times = np.bincount(rows, minlength=len(lengths))
    left_over = order.dropped_after(0)
    begins = _Place(state.epoch, state.sample_start_index, state.step)
    if order.steps_after(begins.sample) == 0:
        # A checkpoint at the end of an epoch; the next one follows.
        begins = _Place(state.epoch + 1, 0, state.step)
    ends = _end_of_run(order, begins, schedule.total_steps)
    buckets = _buckets(data, measured, times, order, begins, total_steps=schedule.total_steps)
    tokens = sum(bucket["tokens"] for bucket in buckets)
    content = {
        "version": VERSION,
        "epochs": num_epochs,
        "steps": schedule.total_steps,
        "samples_a_step": _samples_a_step(order),
        "bucketed": data.bucketed,
        "mixture": dict(data.mixture.shares) if data.mixture else None,
        "mixture_end": data.mixture.end if data.mixture else None,
        "groups_by_length": data.groups_by_length,
        "epoch": {
            "samples": order.num_samples,
            "tokens": tokens,
            "steps": order.steps_after(0),
            "left_over_samples": left_over,
            "left_over_tokens": int(lengths[rows[len(rows) - left_over :]].sum()),
        },
        "buckets": buckets,
        "sources": _source_totals(buckets, tokens),
        "categories": _category_totals(buckets, tokens),
        "warmup_steps": schedule.warmup_steps,
        "begins": begins._asdict(),
        "ends": ends._asdict(),
        "learning_rate": _curve(schedule, begins.step, skipped=state.step - state.updates),
    }
    return {**content, "notes": [*_notes(content, data), *_place_notes(begins, ends, order, content)]}


def _samples_a_step(order: SampleOrder) -> int:
    return order.samples_per_micro_step * order.accumulation_steps


def _end_of_run(order: SampleOrder, begins: _Place, total_steps: int) -> _Place:
    epoch, sample, steps = begins.epoch, begins.sample, total_steps - begins.step
    while steps > order.steps_after(sample):
        epoch, sample, steps = epoch + 1, 0, steps - order.steps_after(sample)
    end = min(sample + steps * _samples_a_step(order), order.num_samples - order.dropped_after(sample))
    return _Place(epoch, end, total_steps)


def _steps_of(
    first: int, end: int, order: SampleOrder, begins: _Place, *, total_steps: int
) -> tuple[int | None, int | None]:
    """First and last step that read samples `first` to `end` - 1 of the epoch in which the run begins."""
    first, end = max(first, begins.sample), min(end, order.num_samples - order.dropped_after(begins.sample))
    first_step = begins.step + (first - begins.sample) // _samples_a_step(order) + 1
    last_step = begins.step - (begins.sample - end) // _samples_a_step(order)
    return (first_step, min(last_step, total_steps)) if first < end and first_step <= total_steps else (None, None)


def _buckets(
    data: Data,
    measured: Sequence[MeasuredPart],
    times: np.ndarray,
    order: SampleOrder,
    begins: _Place,
    *,
    total_steps: int,
) -> list[dict[str, Any]]:
    """The samples that are read from each bucket.

    Args:
        times: (rows,) how often an epoch reads each row.
    """
    starts = np.cumsum([0, *(len(lengths) for _, lengths in measured)])
    names = list(dict.fromkeys(part.source for part in data.parts))
    groups: dict[int, dict[str, list[int]]] = {}
    for index, (part, lengths) in enumerate(measured):
        # As in make_buckets.
        if len(lengths):
            groups.setdefault(part.bucket if data.bucketed else 0, {}).setdefault(part.source, []).append(index)
    buckets, done = [], 0
    for number, indices_by_source in sorted(groups.items()):
        sources = {}
        for name, indices in indices_by_source.items():
            shares = [times[starts[index] : starts[index + 1]] for index in indices]
            sources[name] = _source([measured[index] for index in indices], shares)
        samples, tokens = (sum(source[kind] for source in sources.values()) for kind in ("samples", "tokens"))
        total = sum(data.mixture.shares[name] for name in sources) if data.mixture else 0
        for name, source in sources.items():
            source["share"] = round(source["tokens"] / max(tokens, 1), 6)
            source["asked"] = round(data.mixture.shares[name] / total, 6) if data.mixture else None
        first_step, last_step = _steps_of(done, done + samples, order, begins, total_steps=total_steps)
        buckets.append(
            {
                "bucket": number,
                "samples": samples,
                "tokens": tokens,
                "first_step": first_step,
                "last_step": last_step,
                "absent": [name for name in names if name not in sources],
                "sources": sources,
            }
        )
        done += samples
    return buckets


def _source(parts: Sequence[MeasuredPart], times: Sequence[np.ndarray]) -> dict[str, Any]:
    """The samples of a source that are read from a bucket."""
    lengths, read = np.concatenate([lengths for _, lengths in parts]), np.concatenate(times)
    categories: Counter = Counter()
    for (part, _), part_times in zip(parts, times, strict=True):
        categories.update(category_tokens(part.path, part_times))
    return {
        "parts": [part.path for part, _ in parts],
        "samples_there": len(lengths),
        "tokens_there": int(lengths.sum()),
        "samples": int(read.sum()),
        "tokens": int((lengths * read).sum()),
        "again": int(np.maximum(read - 1, 0).sum()),
        "left_out": int((read == 0).sum()),
        "left_out_tokens": int(lengths[read == 0].sum()),
        "categories": {name: count for name, count in sorted(categories.items()) if count},
    }


def _source_totals(buckets: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    totals: dict[str, dict[str, Any]] = {}
    for bucket in buckets:
        for name, source in bucket["sources"].items():
            total = totals.setdefault(name, {"samples": 0, "tokens": 0})
            total["samples"] += source["samples"]
            total["tokens"] += source["tokens"]
    return {name: {**total, "share": round(total["tokens"] / tokens, 6)} for name, total in totals.items()}


def _category_totals(buckets: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    totals: Counter = Counter()
    for bucket in buckets:
        for source in bucket["sources"].values():
            totals.update(source["categories"])
    return {name: {"tokens": count, "share": round(count / tokens, 6)} for name, count in totals.most_common()}


def _curve(schedule: CosineSchedule, begin: int, *, skipped: int) -> list[tuple[int, float]]:
    """Points (step, learning rate), with the first and last step and the end of the warm-up.

    Args:
        begin: number of steps so far.
        skipped: how many of these made no update. The schedule counts updates, so from here on it is that many steps
            behind. Earlier points are those of a run without such steps.
    """
    steps = set(np.linspace(0, schedule.total_steps - 1, CURVE_POINTS).round().astype(int).tolist())
    warmed_up = max(schedule.warmup_steps - 1, 0)
    warmed_up += skipped if warmed_up + skipped >= begin else 0
    steps.update(min(step, schedule.total_steps - 1) for step in (warmed_up, begin))
    updates = {step: step - (skipped if step >= begin else 0) for step in sorted(steps)}
    return [(step + 1, float(f"{schedule.learning_rate(done):.6g}")) for step, done in updates.items()]


def _notes(content: dict[str, Any], data: Data) -> Iterator[str]:
    """Notes for the user: what is missing, repeated, or not read at all."""
    for path, count in Counter(data.paths).items():
        if count > 1:
            yield f"{path} is given {count} times, so it is read {count} times"
    buckets = content["buckets"]
    for name in dict.fromkeys(part.source for part in data.parts):
        if name not in content["sources"]:
            yield f"{name} holds no samples"
            continue
        absent = [bucket["bucket"] for bucket in buckets if name in bucket["absent"]]
        if absent:
            yield f"{name} has no part left in {_bucket_list(absent)}"
        held = {bucket["bucket"]: bucket["sources"][name] for bucket in buckets if name in bucket["sources"]}
        again = [number for number, source in held.items() if source["again"]]
        if again:
            most = max(source["samples"] / source["samples_there"] for source in held.values())
            samples = sum(source["again"] for source in held.values())
            where = f" in {_bucket_list(again)}" if data.bucketed else ""
            yield f"{name} runs out{where}: it repeats {counted(samples, 'sample')} and is read up to {most:.2f} times"
        left_out = [number for number, source in held.items() if source["left_out"]]
        if left_out:
            samples, tokens = (sum(held[n][kind] for n in left_out) for kind in ("left_out", "left_out_tokens"))
            where = f" in {_bucket_list(left_out)}" if data.bucketed else ""
            yield f"{name}: {counted(samples, 'sample')} ({counted(tokens, 'token')}) left out{where}"
    missed = [bucket["bucket"] for bucket in buckets if _misses_shares(bucket)]
    if missed:
        yield f"{_bucket_list(missed)}: too few samples to reach the requested shares within {TOLERANCE:.0%}"
    epoch = content["epoch"]
    if epoch["left_over_samples"]:
        yield (
            f"left over at the end of each epoch: {counted(epoch['left_over_samples'], 'sample')} "
            f"({counted(epoch['left_over_tokens'], 'token')} in the first), too few for a micro batch on every rank"
        )


def _place_notes(begins: _Place, ends: _Place, order: SampleOrder, content: dict[str, Any]) -> Iterator[str]:
    """Where a run begins, if not at the first sample, and where it ends, if not at the last."""

    def where(place: _Place, sample: int) -> str:
        return f"epoch {place.epoch}" + (f", bucket {order.bucket_of(sample)}" if content["bucketed"] else "")

    if begins.epoch or begins.sample:
        here = where(begins, begins.sample)
        yield f"it begins with sample {begins.sample:,} of {here}; steps are those of that epoch"
    unread = (content["epochs"] - ends.epoch) * order.num_samples - ends.sample
    if ends.epoch < content["epochs"] - 1 or order.steps_after(ends.sample):
        yield f"it ends after step {ends.step:,} in {where(ends, ends.sample - 1)}; unread samples: {unread:,}"


def _misses_shares(bucket: dict[str, Any]) -> bool:
    sources = bucket["sources"].values()
    return any(source["asked"] is not None and abs(source["share"] - source["asked"]) > TOLERANCE for source in sources)


def _bucket_list(numbers: Sequence[int]) -> str:
    """Such as "bucket 0" or "buckets 0, 2 to 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    return f"bucket{'s' if len(numbers) > 1 else ''} {', '.join(texts)}"


def log_and_save(content: dict[str, Any], folder: RunFolder) -> None:
    """Log the plan and write it to the run's folder, replacing an earlier one."""
    for line in plan_lines(content):
        logs.get_logger().info("%s", line)
    replace_file(folder.data_plan, to_json(content).encode())


def plan_lines(content: dict[str, Any]) -> Iterator[str]:
    """The plan as text: totals, a row per bucket and source, the categories, the learning rate, the notes."""
    epoch = content["epoch"]
    kind = "buckets in order, each shuffled by itself" if content["bucketed"] else "one shuffle of everything"
    kind += ", samples of similar length together" if content["groups_by_length"] else ""
    yield (
        f"Plan: {kind}; {counted(epoch['samples'], 'sample')} and {counted(epoch['tokens'], 'token')} an epoch, "
        f"epochs: {content['epochs']}; steps: {content['steps']:,} of {counted(content['samples_a_step'], 'sample')}"
    )
    yield from table_lines(_bucket_rows(content), align="llr")
    yield from table_lines(_category_rows(content))
    points = content["learning_rate"]
    peak = max(points, key=lambda point: point[1])
    shown = dict.fromkeys([tuple(points[0]), tuple(peak), tuple(points[len(points) // 2]), tuple(points[-1])])
    curve = ", ".join(f"{rate:.2e} at step {step:,}" for step, rate in sorted(shown))
    yield f"learning rate: {curve}; warm-up steps: {content['warmup_steps']:,}"
    for note in content["notes"][:MAX_ROWS]:
        yield f"note: {visible_line(note)}"
    if len(content["notes"]) > MAX_ROWS:
        yield f"and {counted(len(content['notes']) - MAX_ROWS, 'more note')} in {PLAN_NAME}"


def _bucket_rows(content: dict[str, Any]) -> list[list[str]]:
    head = ["bucket", "source", "parts", "samples", "tokens", "share", "steps"]
    has_mixture = content["mixture"] is not None
    rows = [[*head, "asked", "read", "left out"] if has_mixture else head]
    for bucket in content["buckets"]:
        steps = "-" if bucket["first_step"] is None else f"{bucket['first_step']:,}-{bucket['last_step']:,}"
        for position, (name, source) in enumerate(bucket["sources"].items()):
            row = ["" if position else str(bucket["bucket"]), visible_line(name), f"{len(source['parts']):,}"]
            row += [f"{source['samples']:,}", f"{source['tokens']:,}", f"{source['share']:.1%}"]
            row.append("" if position else steps)
            if has_mixture:
                read = source["samples"] / max(source["samples_there"], 1)
                row += [f"{source['asked']:.1%}", f"{read:.2f}x", f"{source['left_out']:,}"]
            rows.append(row)
    shown = rows[: MAX_ROWS + 1]
    if len(shown) < len(rows):
        shown.append(["...", f"{len(rows) - len(shown):,} more"])
    if len(content["buckets"]) > 1:
        for name, total in content["sources"].items():
            row = ["all", visible_line(name), "", f"{total['samples']:,}", f"{total['tokens']:,}"]
            shown.append([*row, f"{total['share']:.1%}"])
    return shown


def _category_rows(content: dict[str, Any]) -> list[list[str]]:
    rows = [["category", "tokens", "share"]]
    for name, total in content["categories"].items():
        rows.append([visible_line(category_name(name)), f"{total['tokens']:,}", f"{total['share']:.1%}"])
    if len(rows) > MAX_ROWS + 1:
        more = len(rows) - MAX_ROWS - 1
        rows = [*rows[: MAX_ROWS + 1], [f"... {more:,} more"]]
    return rows
