"""Two charts as PNG, drawn with Pillow alone: how long the samples are, and which categories each bin holds."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import replace_file

# All pictures of the suite: so large, with a title in the middle of the top and a light grid.
SIZE = (1200, 600)
TITLE_HEIGHT = 18
GRID = "#e5e5e5"
LEFT, TOP, RIGHT, BOTTOM = 90, 72, 30, 70
# Between two charts in one picture.
GAP = 130
LEGEND_WIDTH = 230
FONT_SIZE = 15
MAX_BUCKETS = 40
MAX_TICKS = 6
MAX_BARS = 300
# Okabe and Ito's colours, which all kinds of colour vision tell apart; the grey is for what remains.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
OTHER, OTHER_COLOUR = "other", "#999999"
# Fonts with Chinese characters first. Pillow looks for them where the system keeps its fonts.
FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc", "DejaVuSans.ttf", "arial.ttf")


class Bar(NamedTuple):
    """One bar: its label, or "" for none, and the heights of its layers from the bottom up."""

    label: str
    layers: tuple[float, ...]


class Chart(NamedTuple):
    """Bars, the names of both axes (across, up), and from where to where the chart goes across its picture."""

    bars: Sequence[Bar]
    axes: tuple[str, str]
    left: float
    right: float


def draw_lengths(lengths: Sequence[int], path: Path, *, title: str) -> None:
    """Write a histogram of sample lengths (in tokens, at least one) to `path`."""
    chart = Chart(_histogram(lengths, first=0), ("tokens per sample", "samples"), LEFT, SIZE[0] - RIGHT)
    _draw([chart], path, title=title, colours=COLOURS[:1], legend=[])


def draw_spliced(documents: Sequence[int], per_sample: Sequence[int], path: Path, *, title: str) -> None:
    """The same for samples that hold several documents and so are nearly all full: two histograms.

    Args:
        documents: tokens of each document, at least one.
        per_sample: documents of each sample.
    """
    middle = SIZE[0] / 2
    charts = [
        Chart(_histogram(documents, first=0), ("tokens per document", "documents"), LEFT, middle - GAP / 2),
        Chart(_histogram(per_sample, first=1), ("documents per sample", "samples"), middle + GAP / 2, SIZE[0] - RIGHT),
    ]
    _draw(charts, path, title=title, colours=COLOURS[:1], legend=[])


def _histogram(values: Sequence[int], *, first: int) -> list[Bar]:
    """Bars of equal width from `first` on; some have a label, the least value that they count."""
    width = _round_up((max(values) - first + 1) / MAX_BUCKETS)
    counts = [0] * ((max(values) - first) // width + 1)
    for value in values:
        counts[(value - first) // width] += 1
    shown = max(1, math.ceil(len(counts) / 10))
    return [
        Bar(f"{first + bucket * width:,}" if bucket % shown == 0 else "", (count,))
        for bucket, count in enumerate(counts)
    ]


def draw_categories(bins: Mapping[str, Mapping[str, int]], path: Path, *, title: str) -> None:
    """Write a bar per bin to `path`, layered by category: `bins` maps a bin's name to its documents per category.

    The largest categories get a colour each, the others one together. More than `MAX_BARS` bins share bars.
    """
    ordered = list(total_categories(bins))
    named = ordered if len(ordered) <= len(COLOURS) else ordered[: len(COLOURS) - 1]
    # One more layer than named categories: it is empty, and not in the legend, where all are named.
    colours = [*COLOURS[: len(named)], OTHER_COLOUR]
    group = math.ceil(len(bins) / MAX_BARS)
    names = list(bins)
    groups = [names[start : start + group] for start in range(0, len(names), group)]
    shown = max(1, math.ceil(len(groups) / 10))
    bars = []
    for number, members in enumerate(groups):
        layers = [sum(bins[member].get(category, 0) for member in members) for category in named]
        rest = sum(sum(bins[member].values()) for member in members) - sum(layers)
        label = members[0].removeprefix("part-") if number % shown == 0 else ""
        bars.append(Bar(label, (*layers, rest)))
    legend = [*named, *([OTHER] if len(named) < len(ordered) else [])]
    axes = ("bins" if group == 1 else f"bins, {group} a bar", "documents")
    right = SIZE[0] - RIGHT - (LEGEND_WIDTH if legend else 0)
    _draw([Chart(bars, axes, LEFT, right)], path, title=title, colours=colours, legend=legend)


def total_categories(bins: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Documents per category over all bins, the largest category first: the order of the layers, bottom up."""
    totals: dict[str, int] = {}
    for counts in bins.values():
        for category, count in counts.items():
            totals[category] = totals.get(category, 0) + count
    return dict(sorted(totals.items(), key=lambda entry: (-entry[1], entry[0])))


def _draw(charts: Sequence[Chart], path: Path, *, title: str, colours: Sequence[str], legend: list[str]) -> None:
    image_module, draw_module, font = pillow()
    image = image_module.new("RGB", SIZE, "white")
    draw = draw_module.Draw(image)
    draw.text((SIZE[0] / 2, TITLE_HEIGHT), drawable(title, font), fill="black", font=font, anchor="mm")
    for chart in charts:
        _draw_chart(draw, font, chart, colours)
    _draw_legend(draw, font, list(zip(legend, colours, strict=False)))
    content = io.BytesIO()
    image.save(content, format="PNG")
    replace_file(path, content.getvalue())


def _draw_chart(draw, font, chart: Chart, colours: Sequence[str]) -> None:
    bars, left, right, bottom = chart.bars, chart.left, chart.right, SIZE[1] - BOTTOM
    step = _round_up(max(sum(bar.layers) for bar in bars) / MAX_TICKS)
    top_value = step * math.ceil(max(sum(bar.layers) for bar in bars) / step)
    scale = (bottom - TOP) / top_value
    for tick in range(0, top_value + 1, step):
        height = bottom - tick * scale
        draw.line((left, height, right, height), fill=GRID)
        draw.text((left - 8, height), f"{tick:,}", fill="black", font=font, anchor="rm")
    pitch = (right - left) / len(bars)
    gap = 1 if pitch >= 4 else 0
    for number, bar in enumerate(bars):
        start, end, height = left + number * pitch, left + (number + 1) * pitch - gap, float(bottom)
        for layer, colour in zip(bar.layers, colours, strict=True):
            if layer:
                draw.rectangle((start, height - layer * scale, max(start, end - 1), height), fill=colour)
                height -= layer * scale
        if bar.label:
            draw.text((start, bottom + 6), drawable(bar.label, font), fill="black", font=font)
    draw.line((left, bottom, right, bottom), fill="black")
    draw.text(((left + right) / 2, SIZE[1] - 25), chart.axes[0], fill="black", font=font, anchor="mm")
    draw.text((left - LEFT + 8, TOP - 24), chart.axes[1], fill="black", font=font, anchor="lm")


def _draw_legend(draw, font, entries: Sequence[tuple[str, str]]) -> None:
    left = SIZE[0] - RIGHT - LEGEND_WIDTH + 20
    for number, (name, colour) in enumerate(entries):
        top = TOP + number * (FONT_SIZE + 10)
        draw.rectangle((left, top, left + FONT_SIZE, top + FONT_SIZE), fill=colour)
        text = drawable(name, font)
        while text and draw.textlength(text, font=font) > LEGEND_WIDTH - 50:
            text = text[:-2] + "…" if len(text) > 2 else ""
        draw.text((left + FONT_SIZE + 8, top), text, fill="black", font=font)


def pillow(font_size: int = FONT_SIZE, *, needed_for: str = "--plots") -> tuple:
    """Pillow's Image and ImageDraw modules, and the font to write with. UserError where Pillow is not installed."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise UserError(f"{needed_for} needs Pillow, which is not installed; run: pip install -r requirements.txt")
    for name in FONTS:
        try:
            return Image, ImageDraw, ImageFont.truetype(name, font_size)
        except OSError:
            continue
    return Image, ImageDraw, ImageFont.load_default(font_size)


def drawable(text: str, font) -> str:
    """`text` with characters that the font lacks written by their numbers, such as U+8C1C."""
    missing = bytes(font.getmask("\U0010ffff"))  # no font has it: what is drawn instead
    return "".join(
        character if character == " " or bytes(font.getmask(character)) != missing else f"U+{ord(character):04X} "
        for character in text
    )


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ... that is not below `value`."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power >= value:
                return digit * power
        power *= 10
