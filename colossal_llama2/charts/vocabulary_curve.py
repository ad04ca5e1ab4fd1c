"""The picture by which the number of new pieces is chosen: tokens per character of held-out text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.charts import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED_FOR = "--plot"


def draw_curve(curve: Sequence[tuple[int, float]], path: Path, *, title: str) -> None:
    """Write points (new pieces, tokens per character) as a curve to the PNG file `path`.

    Raises:
        UserError: matplotlib is not installed.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.plot(
            [pieces for pieces, _ in curve],
            [rate for _, rate in curve],
            color=style.COLOURS[0],
            linewidth=2,
            marker="o",
            markersize=4,
        )
        axes.set(xlabel="new pieces", ylabel="tokens per character of held-out text")
        axes.set_ylim(bottom=0)
        style.count_axis(axes.xaxis)

    style.write_picture(path, draw, title=title, needed_for=NEEDED_FOR)
