"""The style of every picture: size, colours, grid and fonts, and how a drawing becomes a PNG.

matplotlib is imported when a picture is drawn. It draws on an Agg canvas of its own, so it needs no display, and its
messages stay off the console. Where the user's home cannot be written, it keeps its font cache in a temporary folder.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import replace_file
from colossal_llama2.terminal_text import PICTURES, visible_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Pixels.
SIZE = (1200, 600)
DPI = 100
# Okabe and Ito's colours, which people with any kind of colour vision can distinguish. Their yellow is too pale for a
# line on white; Paul Tol's wine red replaces it.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#000000")
PALE_BLUE, GREY, GRID = "#b3cde3", "#888888", "#e5e5e5"
# Columns of a terminal's font. Longer texts lose their middle.
MAX_TITLE_WIDTH, MAX_NAME_WIDTH = 110, 26
# matplotlib includes this font. It has Latin, Greek, Cyrillic, Arabic and Hebrew letters, but no Chinese ones.
MAIN_FONT = "DejaVu Sans"
# The first installed font whose name begins with one of these draws the characters that the main font lacks.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans",
    "Noto Sans CJK",
    "WenQuanYi",
    "Microsoft YaHei",
    "SimHei",
    "PingFang",
    "Hiragino Sans GB",
    "Heiti",
    "Droid Sans Fallback",
    "Arial Unicode MS",
)
# The pictures that stand for control characters in a visible text, and the numbers of these.
CONTROLS = {chr(picture): 0x7F if picture == 0x2421 else picture - 0x2400 for picture in PICTURES}
STYLE = {
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    # The most points of one path, which Agg can always hold.
    "agg.path.chunksize": 10_000,
    "font.size": 10,
    "grid.color": GRID,
    "legend.frameon": False,
    # A "$" in a name is a "$", not the beginning of a formula.
    "text.parse_math": False,
}


def write_picture(path: Path, draw: Callable[["Figure"], None], *, title: str, needed_for: str) -> None:
    """Write what `draw` draws to the PNG file `path`, completely or not at all. Raises OSError, and as `render`."""
    replace_file(path, render(draw, title=title, needed_for=needed_for))


def render(draw: Callable[["Figure"], None], *, title: str, needed_for: str) -> bytes:
    """A PNG of `SIZE` pixels with a title. Equal drawings have equal bytes.

    Args:
        draw: adds axes to a matplotlib Figure. All names that come from users go through `label` first.
        needed_for: the flag or file that needs the picture, for the error message.

    Raises:
        UserError: matplotlib is not installed, or cannot be imported.
    """
    with _quiet():
        _import_matplotlib(needed_for)
        import matplotlib.style
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        # "default" undoes what a matplotlibrc of the user sets.
        with matplotlib.style.context(["default", {**STYLE, "font.family": _font_names()}]):
            layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
            figure = Figure(figsize=(SIZE[0] / DPI, SIZE[1] / DPI), dpi=DPI, layout=layout)
            FigureCanvasAgg(figure)
            figure.suptitle(label(title, MAX_TITLE_WIDTH), fontsize=12)
            draw(figure)
            content = io.BytesIO()
            figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def check_can_draw(needed_for: str) -> None:
    """Raise the UserError that `render` would raise."""
    with _quiet():
        _import_matplotlib(needed_for)


def label(text: str, width: int = MAX_NAME_WIDTH) -> str:
    """`text` as it can be drawn: on one line of at most `width` columns; the middle of a longer one is left out.

    A character that no font here has is written by its number, such as U+8C1C. Called inside `draw`.
    """
    from rich.cells import cell_len

    fonts = _fonts()
    shown = "".join(
        character if _has_glyph(fonts, character) else f"U+{CONTROLS.get(character, ord(character)):04X} "
        for character in visible_line(text)
    )
    if cell_len(shown) <= width:
        return shown
    # Names often differ only at the end, such as those of folders.
    begin = _fitting(shown, (width - 1) // 2)
    return f"{begin}…{_fitting(shown[::-1], width - 1 - cell_len(begin))[::-1]}"


def missing_characters(text: str) -> str:
    """The characters of `text` that no font here has, each once, without control characters. Needs matplotlib."""
    with _quiet():
        fonts = _fonts()
        shown = dict.fromkeys(visible_line(text))
        return "".join(name for name in shown if name not in CONTROLS and not _has_glyph(fonts, name))


def _fitting(text: str, width: int) -> str:
    """The longest beginning of `text` that takes at most `width` columns."""
    from rich.cells import cell_len

    end = len(text)
    while cell_len(text[:end]) > width:
        end -= 1
    return text[:end]


def add_legend(axes: "Axes", entries: list[tuple[Any, str]]) -> None:
    """A legend at the right of the axes: pairs of a matplotlib artist and what `label` made of its name."""
    handles, names = [handle for handle, _ in entries], [name for _, name in entries]
    numbers = list(map(str, range(len(entries))))
    legend = axes.legend(handles, numbers, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    # Set afterwards, since a legend leaves out names that begin with "_".
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def count_axis(axis: "Axis") -> None:
    """Let the ticks of a matplotlib Axis be whole numbers with commas."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def only_horizontal_grid(axes: "Axes") -> None:
    """Grid lines for heights only, as bars need them."""
    axes.grid(visible=False, axis="x")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what matplotlib logs and warns of, such as that it builds its font cache, off the console."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _import_matplotlib(needed_for: str) -> None:
    try:
        import matplotlib.figure  # noqa: F401 - only whether it can be imported
    except ImportError as error:
        if getattr(error, "name", None) == "matplotlib":
            why = "which is not installed; run: pip install matplotlib"
        else:
            why = f"which cannot be imported ({error}); run: pip install matplotlib"
        raise UserError(f"{needed_for} needs matplotlib, {why}")
    except Exception as error:  # such as a ValueError for what the environment or a matplotlibrc sets
        raise UserError(f"{needed_for} needs matplotlib, which cannot be imported ({error})")


def _font_names() -> list[str]:
    from matplotlib import font_manager

    installed = sorted(font_manager.fontManager.get_font_names())
    return [MAIN_FONT, *[name for begin in CJK_FONTS for name in installed if name.startswith(begin)][:1]]


def _fonts() -> list[Any]:
    from matplotlib import font_manager

    return [font_manager.get_font(font_manager.findfont(name)) for name in _font_names()]


def _has_glyph(fonts: list[Any], character: str) -> bool:
    return any(font.get_char_index(ord(character)) for font in fonts)
