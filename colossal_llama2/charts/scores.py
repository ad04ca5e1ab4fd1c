"""The picture of an evaluation: bars with error bars, a group for each task and a colour for each model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama2.charts import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDED_FOR = "the chart beside --output_file"
GROUP_WIDTH = 0.8
NAME_WIDTH = 14


class Bar(NamedTuple):
    """One bar.

    Attributes:
        model, group: its colour, and where it stands.
        value, error: its height and its standard error.
        metric: bars of a metric share axes.
        chance: what guessing reaches, drawn as a line over the group; None for no line.
    """

    model: str
    group: str
    value: float
    error: float
    metric: str
    chance: float | None


def draw_scores(bars: Sequence[Bar], path: Path) -> None:
    """Write the picture of at least one bar to `path`."""
    metrics, models = list(dict.fromkeys(bar.metric for bar in bars)), list(dict.fromkeys(bar.model for bar in bars))
    groups = {metric: list(dict.fromkeys(bar.group for bar in bars if bar.metric == metric)) for metric in metrics}

    def draw(figure: "Figure") -> None:
        # A task is as wide in all axes.
        widths = [len(groups[metric]) + 1 for metric in metrics]
        all_axes = figure.subplots(1, len(metrics), squeeze=False, width_ratios=widths)[0]
        entries: dict[str, object] = {}
        for axes, metric in zip(all_axes, metrics, strict=True):
            entries |= _draw_bars(axes, [bar for bar in bars if bar.metric == metric], groups[metric], models)
            axes.set_ylabel(metric)
            if metric == "accuracy":
                axes.yaxis.set_major_formatter(lambda value, place: f"{value:.0%}")
                axes.set_ylim(0, 1)
        style.add_legend(all_axes[-1], [(entries[model], style.label(model)) for model in models if model in entries])

    style.write_picture(path, draw, title="score and standard error; dashed: chance", needed_for=NEEDED_FOR)


def _draw_bars(axes: "Axes", bars: Sequence[Bar], groups: Sequence[str], models: Sequence[str]) -> dict[str, object]:
    """The bars of a metric. Returns an artist for each model, for the legend."""
    width = GROUP_WIDTH / len(models)
    entries: dict[str, object] = {}
    for number, model in enumerate(models):
        own = [bar for bar in bars if bar.model == model]
        if not own:
            continue
        places = [groups.index(bar.group) + (number - (len(models) - 1) / 2) * width for bar in own]
        entries[model] = axes.bar(
            places,
            [bar.value for bar in own],
            width=width * 0.92,
            color=style.COLOURS[number % len(style.COLOURS)],
            yerr=[bar.error for bar in own],
            error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 3},
        )
    for place, group in enumerate(groups):
        chance = next((bar.chance for bar in bars if bar.group == group and bar.chance is not None), None)
        if chance is not None:
            axes.plot([place - 0.45, place + 0.45], [chance, chance], color=style.GREY, linestyle="--", linewidth=1)
    axes.set_xticks(range(len(groups)), [style.label(group, NAME_WIDTH) for group in groups])
    axes.set_xlim(-0.6, len(groups) - 0.4)
    style.only_horizontal_grid(axes)
    return entries
