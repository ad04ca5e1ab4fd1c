"""The loss of a run as PNG, from its train_log.jsonl: raw and smoothed, with borders of buckets and evaluations."""

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from colossal_llama2.charts.plots import COLOURS, FONT_SIZE, GRID, SIZE, TITLE_HEIGHT, drawable, pillow

Point = tuple[int, float]

# Drawn twice as large and made smaller, which smooths the lines.
SCALE = 2
LEFT, TOP, RIGHT, BOTTOM = 80, 72, 200, 60
RAW, SMOOTHED, BORDER = "#b3cde3", COLOURS[0], "#888888"
EVALUATION_COLOURS = COLOURS[1:]
MAX_TICKS = 8
# The smoothed line looks over about this share of the run, to each side.
SMOOTHED_SHARE = 1 / 50
MIN_SMOOTHED_STEPS = 10
# Borders closer than this many pixels are not to be told apart.
MIN_BORDER_PIXELS = 40


@dataclass
class Curves:
    """What is drawn. A border is where a bucket, or where there are none, an epoch begins: (step, its name)."""

    losses: list[Point] = field(default_factory=list)
    borders: list[tuple[int, str]] = field(default_factory=list)
    evaluations: dict[str, list[Point]] = field(default_factory=dict)


def curves_of(records: Iterable[dict[str, Any]]) -> Curves:
    """The curves in the records of a log; losses that are no number are left out."""
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
    """A mean whose weights fall exponentially to both sides, so that it does not lag behind."""
    span = max(MIN_SMOOTHED_STEPS, len(points) * SMOOTHED_SHARE)
    keep = 1 - 2 / (span + 1)
    values = [value for _, value in points]
    before, after = _running(values, keep), _running(values[::-1], keep)[::-1]
    means = []
    for (step, value), (total, weight), (more, more_weight) in zip(points, before, after, strict=True):
        # Both have the value itself.
        means.append((step, (total + more - value) / (weight + more_weight - 1)))
    return means


def _running(values: list[float], keep: float) -> list[tuple[float, float]]:
    """Of each value and those before it: their sum, and that of their weights, which fall by `keep` a step."""
    sums, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        sums.append((total, weight))
    return sums


def draw(curves: Curves, *, title: str) -> bytes:
    """A PNG of `SIZE` pixels. There must be at least one loss. Raises UserError where Pillow is not installed."""
    image_module, draw_module, font = pillow(FONT_SIZE * SCALE, needed_for="loss.png")
    image = image_module.new("RGB", (SIZE[0] * SCALE, SIZE[1] * SCALE), "white")
    canvas = _Canvas(draw_module.Draw(image), font, curves)
    canvas.text((SIZE[0] / 2, TITLE_HEIGHT), title, anchor="mm")
    canvas.grid()
    canvas.borders(curves.borders)
    canvas.line(curves.losses, RAW, width=1)
    canvas.line(smoothed(curves.losses), SMOOTHED, width=3)
    for colour, points in zip(_colours(), curves.evaluations.values(), strict=False):
        canvas.line(points, colour, width=1)
        canvas.dots(points, colour)
    entries = [("loss of a step", RAW), ("smoothed", SMOOTHED)]
    entries += [(f"{curves.borders[0][1].split()[0]} begins", BORDER)] if curves.borders else []
    canvas.legend(entries + list(zip((f"evaluation {name}" for name in curves.evaluations), _colours(), strict=False)))
    content = io.BytesIO()
    image.resize(SIZE, image_module.LANCZOS).save(content, format="PNG")
    return content.getvalue()


def _colours() -> Iterable[str]:
    while True:
        yield from EVALUATION_COLOURS


class _Canvas:
    """Draws by step and loss. All lengths are in pixels of the finished picture."""

    def __init__(self, draw, font, curves: Curves):
        self._draw, self._font = draw, font
        points = [*curves.losses, *(point for points in curves.evaluations.values() for point in points)]
        self._first, self._last = min(step for step, _ in points), max(step for step, _ in points)
        low, high = min(loss for _, loss in points), max(loss for _, loss in points)
        # Where all are equal, a tick that is not lost in rounding.
        self._tick = nice_tick((high - low) / MAX_TICKS or max(0.1, abs(high) / 1000))
        self._low = math.floor(low / self._tick) * self._tick
        self._high = max(math.ceil(high / self._tick) * self._tick, self._low + self._tick)
        self._right, self._bottom = SIZE[0] - RIGHT, SIZE[1] - BOTTOM

    def _x(self, step: float) -> float:
        return LEFT + (step - self._first) / max(self._last - self._first, 1) * (self._right - LEFT)

    def _y(self, loss: float) -> float:
        return self._bottom - (loss - self._low) / (self._high - self._low) * (self._bottom - TOP)

    def text(self, place: tuple[float, float], text: str, anchor: str, fill: str = "black") -> None:
        x, y = place
        shown = drawable(text, self._font)
        self._draw.text((x * SCALE, y * SCALE), shown, fill=fill, font=self._font, anchor=anchor)

    def _segment(self, begin: tuple[float, float], end: tuple[float, float], colour: str, width: float = 1) -> None:
        (x, y), (to_x, to_y) = begin, end
        self._draw.line((x * SCALE, y * SCALE, to_x * SCALE, to_y * SCALE), fill=colour, width=round(width * SCALE))

    def grid(self) -> None:
        """Lines and numbers of both axes."""
        for number in range(round((self._high - self._low) / self._tick) + 1):
            loss = self._low + number * self._tick
            self._segment((LEFT, self._y(loss)), (self._right, self._y(loss)), GRID)
            self.text((LEFT - 8, self._y(loss)), f"{loss:.4g}", anchor="rm")
        tick = max(1, round(nice_tick((self._last - self._first) / MAX_TICKS or 1)))
        for step in range(-(-self._first // tick) * tick, self._last + 1, tick):
            self._segment((self._x(step), self._bottom), (self._x(step), self._bottom + 5), "black")
            self.text((self._x(step), self._bottom + 16), f"{step:,}", anchor="mm")
        self._segment((LEFT, self._bottom), (self._right, self._bottom), "black")
        self.text(((LEFT + self._right) / 2, SIZE[1] - 14), "optimizer step", anchor="mm")
        self.text((8, TOP - 24), "loss, nats per token", anchor="lm")

    def borders(self, borders: list[tuple[int, str]]) -> None:
        """Dashed lines with a name each, unless they lie too close together."""
        shown = -math.inf
        for step, name in borders:
            x = self._x(step - 0.5)
            if x - shown < MIN_BORDER_PIXELS:
                continue
            shown = x
            for y in range(TOP, int(self._bottom), 10):
                self._segment((x, y), (x, y + 5), BORDER)
            self.text((x + 4, TOP + 2), name.split()[-1] if len(borders) > 6 else name, anchor="la", fill=BORDER)

    def line(self, points: list[Point], colour: str, *, width: float) -> None:
        """A line through points; of many in one column of pixels, the lowest and the highest. Of one, a dot."""
        if len(points) == 1:
            return self.dots(points, colour)
        columns: dict[int, list[float]] = {}
        for step, loss in points:
            columns.setdefault(round(self._x(step) * SCALE), []).append(self._y(loss))
        path = []
        for x, heights in columns.items():
            ends = (heights[0], min(heights), max(heights), heights[-1]) if len(heights) > 1 else heights
            path += [(x, y * SCALE) for y in ends]
        if len(path) > 1:
            self._draw.line(path, fill=colour, width=round(width * SCALE), joint="curve")

    def dots(self, points: list[Point], colour: str) -> None:
        """A dot on each point."""
        for step, loss in points:
            x, y, radius = self._x(step) * SCALE, self._y(loss) * SCALE, 4 * SCALE
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def legend(self, entries: list[tuple[str, str]]) -> None:
        """Names beside their colours, at the right."""
        for number, (name, colour) in enumerate(entries):
            y = TOP + 10 + number * 24
            self._segment((self._right + 16, y), (self._right + 40, y), colour, width=3)
            self.text((self._right + 48, y), name if len(name) <= 18 else name[:17] + "…", anchor="lm")


def nice_tick(least: float) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... that is not below `least`, which is above 0."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least * (1 - 1e-9))
