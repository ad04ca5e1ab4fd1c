"""The pictures of prepared data: how long the samples are, and which categories each bin holds."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.charts import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED_FOR = "--plots"
MAX_BUCKETS = 40
MAX_BARS = 300
# Up to this number of bars, there are gaps between them.
MAX_SEPARATE_BARS = 100
MAX_BAR_LABELS = 10
MAX_LABEL_WIDTH = 16
OTHER, OTHER_COLOUR = "other", "#999999"


def draw_lengths(lengths: Sequence[int], path: Path, *, title: str) -> None:
    """Write a histogram of sample lengths (in tokens, at least one) to `path`."""

    def draw(figure: "Figure") -> None:
        _draw_histogram(figure.add_subplot(), lengths, first=0, names=("tokens per sample", "samples"))

    style.write_picture(path, draw, title=title, needed_for=NEEDED_FOR)


def draw_spliced(documents: Sequence[int], per_sample: Sequence[int], path: Path, *, title: str) -> None:
    """The same for samples that hold several documents, and so are nearly all full: two histograms.

    Args:
        documents: tokens of each document, at least one.
        per_sample: documents of each sample.
    """

    def draw(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        _draw_histogram(left, documents, first=0, names=("tokens per document", "documents"))
        _draw_histogram(right, per_sample, first=1, names=("documents per sample", "samples"))

    style.write_picture(path, draw, title=title, needed_for=NEEDED_FOR)


def _draw_histogram(axes: "Axes", values: Sequence[int], *, first: int, names: tuple[str, str]) -> None:
    """Bars of equal width, from the whole number `first` on; `names` are those of the axes, across and up."""
    width = _round_up((max(values) - first + 1) / MAX_BUCKETS)
    buckets = (max(values) - first) // width + 1
    # A whole number lies in the middle of its bar.
    edges = [first + bucket * width - 0.5 for bucket in range(buckets + 1)]
    axes.hist(values, bins=edges, color=style.COLOURS[0], edgecolor="white", linewidth=0.5)
    axes.set(xlabel=names[0], ylabel=names[1], xlim=(edges[0], max(edges[-1], edges[0] + 5)))
    style.only_horizontal_grid(axes)
    style.count_axis(axes.xaxis)
    style.count_axis(axes.yaxis)


def draw_categories(bins: Mapping[str, Mapping[str, int]], path: Path, *, title: str) -> None:
    """Write a bar per bin to `path`, layered by category: `bins` maps a bin's name to its documents per category.

    The largest categories get a colour each, the others share one. More than `MAX_BARS` bins share bars.
    """
    ordered = list(total_categories(bins))
    named = ordered if len(ordered) <= len(style.COLOURS) else ordered[: len(style.COLOURS) - 1]
    names = list(bins)
    per_bar = math.ceil(len(names) / MAX_BARS)
    bars = [names[start : start + per_bar] for start in range(0, len(names), per_bar)]
    layers = {name: [sum(bins[member].get(name, 0) for member in members) for members in bars] for name in named}
    if len(named) < len(ordered):
        totals = [sum(sum(bins[member].values()) for member in members) for members in bars]
        in_layers = [sum(heights) for heights in zip(*layers.values(), strict=True)]
        layers[OTHER] = [total - part for total, part in zip(totals, in_layers, strict=True)]
    labels = [members[0].removeprefix("part-") for members in bars]

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        _draw_bars(axes, layers, labels, has_other=len(named) < len(ordered))
        axes.set(xlabel="bins" if per_bar == 1 else f"bins, {per_bar} in each bar", ylabel="documents")

    style.write_picture(path, draw, title=title, needed_for=NEEDED_FOR)


def _draw_bars(axes: "Axes", layers: Mapping[str, Sequence[int]], labels: Sequence[str], *, has_other: bool) -> None:
    """Bars of `layers`, the first at the bottom; if `has_other`, the last is of all categories without a name."""
    colours = [*style.COLOURS[: len(layers) - has_other], *[OTHER_COLOUR] * has_other]
    places, width = range(len(labels)), 0.85 if len(labels) <= MAX_SEPARATE_BARS else 1.0
    bottom = [0] * len(labels)
    entries = []
    for (name, heights), colour in zip(layers.items(), colours, strict=True):
        drawn = axes.bar(places, heights, bottom=bottom, width=width, color=colour)
        entries.append((drawn, style.label(name)))
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    # In the order of the layers, the uppermost first.
    style.add_legend(axes, entries[::-1])
    margin = 0.6 if len(labels) > 2 else 1.5 - len(labels) / 2
    axes.set_xlim(-margin, len(labels) - 1 + margin)
    shown = list(itertools.islice(places, 0, None, math.ceil(len(labels) / MAX_BAR_LABELS)))
    axes.set_xticks(shown, [style.label(labels[place], MAX_LABEL_WIDTH) for place in shown])
    style.only_horizontal_grid(axes)
    style.count_axis(axes.yaxis)


def total_categories(bins: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Documents per category over all bins, the largest category first: the order of the layers, bottom up."""
    totals: dict[str, int] = {}
    for counts in bins.values():
        for category, count in counts.items():
            totals[category] = totals.get(category, 0) + count
    return dict(sorted(totals.items(), key=lambda entry: (-entry[1], entry[0])))


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not below `value`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= value:
                return digit * power
        power *= 10
