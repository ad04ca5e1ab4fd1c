"""The loss of a run as PNG, from its train_log.jsonl: each step, smoothed, bucket borders and evaluations.

A run that was resumed has one log, and so one curve.
"""

import itertools
import math
from collections.abc import Iterable
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
MAX_EVALUATION_WIDTH = 20


@dataclass
class Curves:
    """What is drawn. A border is where a bucket (without buckets, an epoch) begins: (step, its name)."""

    losses: list[Point] = field(default_factory=list)
    borders: list[tuple[int, str]] = field(default_factory=list)
    evaluations: dict[str, list[Point]] = field(default_factory=dict)


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
        axes = figure.add_subplot()
        marker = "o" if len(curves.losses) <= MAX_DOTS else None
        (raw,) = axes.plot(*_columns(curves.losses), color=RAW, linewidth=1, marker=marker, markersize=3)
        # A line needs more than one point.
        marker = "o" if len(curves.losses) == 1 else None
        (mean,) = axes.plot(*_columns(smoothed(curves.losses)), color=SMOOTHED, linewidth=2, marker=marker)
        entries = [(raw, "loss of a step"), (mean, "smoothed")]
        entries += _draw_evaluations(axes, curves.evaluations)
        axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
        style.count_axis(axes.xaxis)
        _set_step_limits(axes, curves)
        style.add_legend(axes, entries[:2] + _draw_borders(axes, curves.borders) + entries[2:])

    return style.render(draw_on, title=title, needed_for=NEEDED_FOR)


def _columns(points: list[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]


def _set_step_limits(axes: "Axes", curves: Curves) -> None:
    steps = [step for points in (curves.losses, *curves.evaluations.values()) for step, _ in points]
    margin = max((max(steps) - min(steps)) / 100, 0.5)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)


def _draw_evaluations(axes: "Axes", evaluations: dict[str, list[Point]]) -> list[tuple[Any, str]]:
    """A line with a dot at each evaluation; returns what goes into the legend."""
    entries = []
    styles = itertools.cycle((line, colour) for line in EVALUATION_LINES for colour in EVALUATION_COLOURS)
    for (name, points), (line, colour) in zip(evaluations.items(), styles, strict=False):
        size = 5 if len(points) <= MAX_DOTS else 2
        (drawn,) = axes.plot(*_columns(points), color=colour, linestyle=line, marker="o", markersize=size, linewidth=1)
        entries.append((drawn, f"evaluation {style.label(name, MAX_EVALUATION_WIDTH)}"))
    if len(entries) > MAX_LEGEND_EVALUATIONS:
        (blank,) = axes.plot([], [], alpha=0)
        more = len(entries) - MAX_LEGEND_EVALUATIONS
        entries = [*entries[:MAX_LEGEND_EVALUATIONS], (blank, f"and {more:,} more")]
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
