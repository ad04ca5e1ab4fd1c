"""The loss of a run as PNG, from its train_log.jsonl: each step, smoothed, bucket borders and evaluations.

Below it, on an axis of their own, are the accuracies on tasks, if there are any.

A run that was resumed has one log, and so one curve.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colossal_llama2.charts import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[int, float]

NEEDED_FOR = "loss.png"
RAW, SMOOTHED, BORDER = style.PALE_BLUE, style.COLOURS[0], style.GREY
EVALUATION_COLOURS = style.COLOURS[1:]
EVALUATION_LINES = ("-", "--", ":")
# The smoothed line is a mean over this share of a run's steps to each side, but over at least `MIN_REACH` of them where
# that is no more than `MAX_SHARE` of the run.
SMOOTHED_SHARE, MIN_REACH, MAX_SHARE = 1 / 50, 10, 1 / 8
# Near the first step it reaches over this share of the steps before.
BEGINNING_SHARE = 1 / 4
# Up to this number of steps, each has a dot.
MAX_DOTS = 60
# Borders that are closer than this share of the picture's width cannot be distinguished, so the later one is left out.
MIN_BORDER_DISTANCE = 0.04
# Up to this number of borders are labelled "bucket 3", more only with the number.
MAX_LONG_LABELS = 6
MAX_LEGEND_EVALUATIONS = 18
# Where accuracies have a third of the height.
MAX_LEGEND_EVALUATIONS_ABOVE = 10
HEIGHTS = (2, 1)
MAX_EVALUATION_WIDTH = 20


@dataclass
class Curves:
    """What is drawn. A border is where a bucket (without buckets, an epoch) begins: (step, its name).

    An accuracy has its step, its value and its standard error, both as shares.
    """

    losses: list[Point] = field(default_factory=list)
    borders: list[tuple[int, str]] = field(default_factory=list)
    evaluations: dict[str, list[Point]] = field(default_factory=dict)
    accuracies: dict[str, list[tuple[int, float, float]]] = field(default_factory=dict)


def curves_of(records: Iterable[dict[str, Any]]) -> Curves:
    """The curves in the records of a log; steps whose loss is null (NaN or Inf) are left out."""
    curves = Curves()
    place = None
    for record in records:
        if record.get("loss") is not None:
            curves.losses.append((record["step"], record["loss"]))
            kind = "bucket" if "bucket" in record else "epoch"
            now = (record.get("epoch"), record.get(kind))
            if place is not None and now != place:
                curves.borders.append((record["step"], f"{kind} {record.get(kind)}"))
            place = now
        for name, figures in record.get("evaluation", {}).items():
            if figures.get("loss") is not None:
                curves.evaluations.setdefault(name, []).append((record["step"], figures["loss"]))
            if figures.get("accuracy") is not None:
                point = record["step"], figures["accuracy"], figures.get("standard_error") or 0.0
                curves.accuracies.setdefault(name, []).append(point)
    return curves


def smoothed(points: list[Point]) -> list[Point]:
    """The mean of each loss and its neighbours. The first is the first loss itself.

    Near the first step, where the loss falls steeply, a mean reaches over few steps. Near the last step it reaches
    back as far as elsewhere.
    """
    import numpy

    values = numpy.array([value for _, value in points], dtype=float)
    number = numpy.arange(len(values))
    reach = max(int(len(values) * SMOOTHED_SHARE), min(MIN_REACH, int(len(values) * MAX_SHARE)))
    before = numpy.minimum((number * BEGINNING_SHARE).astype(int), reach)
    after = numpy.minimum(before, len(values) - 1 - number)
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    means = (sums[number + after + 1] - sums[number - before]) / (before + after + 1)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def draw(curves: Curves, *, title: str) -> bytes:
    """A PNG of `style.SIZE` pixels. There must be at least one loss.

    Raises:
        UserError: matplotlib is not installed.
    """

    def draw_on(figure: "Figure") -> None:
        if not curves.accuracies:
            _draw_losses(figure.add_subplot(), curves, most=MAX_LEGEND_EVALUATIONS)
            return
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=HEIGHTS)
        _draw_losses(above, curves, most=MAX_LEGEND_EVALUATIONS_ABOVE)
        above.set(xlabel="")
        _draw_accuracies(below, curves)

    return style.render(draw_on, title=title, needed_for=NEEDED_FOR)


def _draw_losses(axes: "Axes", curves: Curves, *, most: int) -> None:
    """`most` evaluations have a line in the legend."""
    marker = "o" if len(curves.losses) <= MAX_DOTS else None
    (raw,) = axes.plot(*_columns(curves.losses), color=RAW, linewidth=1, marker=marker, markersize=3)
    # A line needs more than one point.
    marker = "o" if len(curves.losses) == 1 else None
    (mean,) = axes.plot(*_columns(smoothed(curves.losses)), color=SMOOTHED, linewidth=2, marker=marker)
    entries = [(raw, "loss of a step"), (mean, "smoothed")]
    evaluations = _draw_evaluations(axes, curves.evaluations, most=most)
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    style.count_axis(axes.xaxis)
    _set_step_limits(axes, curves)
    style.add_legend(axes, entries + _draw_borders(axes, curves.borders) + evaluations)


def _draw_accuracies(axes: "Axes", curves: Curves) -> None:
    """A line with a dot and its standard error at each evaluation."""
    from matplotlib.ticker import PercentFormatter

    entries = []
    for (name, points), (line, colour) in zip(curves.accuracies.items(), _styles(), strict=False):
        steps, values, errors = zip(*points, strict=True)
        size = 5 if len(points) <= MAX_DOTS else 2
        drawn = axes.errorbar(
            steps, values, yerr=errors, color=colour, linestyle=line, marker="o", markersize=size, linewidth=1
        )
        entries.append((drawn.lines[0], style.label(name, MAX_EVALUATION_WIDTH)))
    axes.set(xlabel="optimizer step", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    style.add_legend(axes, entries)


def _styles() -> Iterator[tuple[str, str]]:
    """Kinds of lines and colours that can be distinguished, again and again."""
    return itertools.cycle((line, colour) for line in EVALUATION_LINES for colour in EVALUATION_COLOURS)


def _columns(points: list[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _set_step_limits(axes: "Axes", curves: Curves) -> None:
    lines: tuple[Sequence[Sequence[float]], ...] = (
        curves.losses,
        *curves.evaluations.values(),
        *curves.accuracies.values(),
    )
    steps = [point[0] for points in lines for point in points]
    margin = max((max(steps) - min(steps)) / 100, 0.5)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)


def _draw_evaluations(axes: "Axes", evaluations: dict[str, list[Point]], *, most: int) -> list[tuple[Any, str]]:
    """A line with a dot at each evaluation; returns what goes into the legend, for at most that many."""
    entries = []
    for (name, points), (line, colour) in zip(evaluations.items(), _styles(), strict=False):
        size = 5 if len(points) <= MAX_DOTS else 2
        (drawn,) = axes.plot(*_columns(points), color=colour, linestyle=line, marker="o", markersize=size, linewidth=1)
        entries.append((drawn, f"evaluation {style.label(name, MAX_EVALUATION_WIDTH)}"))
    if len(entries) > most:
        (blank,) = axes.plot([], [], alpha=0)
        entries = [*entries[:most], (blank, f"and {len(entries) - most:,} more")]
    return entries


def _draw_borders(axes: "Axes", borders: list[tuple[int, str]]) -> list[tuple[Any, str]]:
    """Dashed lines with a label above each, unless they lie too close together; returns the legend's entry."""
    first, last = axes.get_xlim()
    shown, drawn = -math.inf, None
    for step, name in borders:
        # Between the last step of one bucket and the first of the next.
        x = step - 0.5
        if x - shown < (last - first) * MIN_BORDER_DISTANCE:
            continue
        shown = x
        drawn = axes.axvline(x, color=BORDER, linestyle="--", linewidth=1, zorder=1.5)
        label = name if len(borders) <= MAX_LONG_LABELS else name.split()[-1]
        axes.text(x, 1.01, label, transform=axes.get_xaxis_transform(), color=BORDER, ha="center", va="bottom")
    return [] if drawn is None else [(drawn, f"a new {borders[0][1].split()[0]} begins")]
