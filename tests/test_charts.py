"""The charts: what they show, names without a glyph, and that drawing leaves the console and the home folder alone."""

import os
import subprocess
import sys

import numpy
import pytest
from matplotlib import font_manager, image

from colossal_llama2.charts import plots, style, vocabulary_curve
from colossal_llama2.errors import UserError
from colossal_llama2.train.report import loss_plot
from tests.conftest import ROOT

BLUE, ORANGE = style.COLOURS[:2]


def pixels(path):
    """The RGB values of a picture, as whole numbers: height x width x 3."""
    content = image.imread(path)
    assert content.shape[:2] == style.SIZE[::-1]
    return numpy.rint(content[:, :, :3] * 255).astype(int)


def count_of(colour: str, path) -> int:
    """Pixels of a colour."""
    return int((pixels(path) == list(bytes.fromhex(colour[1:]))).all(axis=2).sum())


def height_of(colour: str, path) -> int:
    """Pixels from the lowest to the highest of a colour in the left two thirds, where no legend is."""
    rows = (pixels(path)[:, :800] == list(bytes.fromhex(colour[1:]))).all(axis=2).any(axis=1).nonzero()[0]
    return int(rows.max() - rows.min())


@pytest.fixture
def write_loss(tmp_path):
    """Draw the records of a log; returns the picture's path."""

    def write(records, title="x"):
        path = tmp_path / "loss.png"
        path.write_bytes(loss_plot.draw(loss_plot.curves_of(records), title=title))
        return path

    return write


# Prepared data.


def test_the_bars_have_the_heights_of_the_figures(tmp_path):
    plots.draw_categories({"part-0": {"a": 10}, "part-1": {"b": 5}}, tmp_path / "c.png", title="t")
    assert height_of(BLUE, tmp_path / "c.png") == pytest.approx(2 * height_of(ORANGE, tmp_path / "c.png"), abs=3)


def test_layers_are_stacked(tmp_path):
    plots.draw_categories({"part-0": {"a": 30, "b": 10}}, tmp_path / "c.png", title="t")
    assert height_of(BLUE, tmp_path / "c.png") == pytest.approx(3 * height_of(ORANGE, tmp_path / "c.png"), abs=3)


@pytest.mark.slow
def test_the_smallest_of_many_categories_are_one_layer(tmp_path):
    bins = {f"part-{number:05d}": {f"c{kind}": 300 - kind for kind in range(300)} for number in range(200)}
    plots.draw_categories(bins, tmp_path / "c.png", title="t")
    assert count_of(plots.OTHER_COLOUR, tmp_path / "c.png") > count_of(BLUE, tmp_path / "c.png") > 0


@pytest.mark.parametrize("lengths", [[1], [1, 4096, 100_000], [7] * 1000])
def test_lengths_are_drawn(lengths, tmp_path):
    plots.draw_lengths(lengths, tmp_path / "l.png", title="t")
    plots.draw_spliced(lengths, [1, 2, 9], tmp_path / "s.png", title="t")
    assert count_of(BLUE, tmp_path / "l.png") > 0 and count_of(BLUE, tmp_path / "s.png") > 0


def test_the_vocabulary_curve_is_drawn(tmp_path):
    vocabulary_curve.draw_curve([(0, 1.5), (1000, 1.1), (2000, 0.9)], tmp_path / "v.png", title="t")
    assert count_of(BLUE, tmp_path / "v.png") > 0


# The loss.


def test_the_curves_are_those_of_the_log():
    records = [{"step": 0, "evaluation": {"zh": {"loss": 9.0}}}]
    records += [{"step": step, "epoch": 0, "bucket": step // 100, "loss": 8 / step**0.2} for step in range(1, 301)]
    records.append({"step": 300, "evaluation": {"zh": {"loss": 4.0}}})
    records.append({"step": 301, "epoch": 0, "bucket": 3, "loss": None})
    curves = loss_plot.curves_of(records)
    assert curves.borders == [(100, "bucket 1"), (200, "bucket 2"), (300, "bucket 3")]
    assert curves.evaluations == {"zh": [(0, 9.0), (300, 4.0)]} and len(curves.losses) == 300


@pytest.mark.parametrize("count", [1, 2, 12, 80, 1000])
def test_smoothing_starts_where_the_loss_starts_and_follows_a_line(count):
    line = [(100 + step, 10.0 - step / count) for step in range(count)]
    smoothed = loss_plot.smoothed(line)
    assert smoothed[0] == line[0] and [step for step, _ in smoothed] == [step for step, _ in line]
    # Near the end the mean is that of some steps back.
    assert [loss for _, loss in smoothed] == pytest.approx([loss for _, loss in line], abs=0.07)


def test_smoothing_removes_noise():
    noisy = [(step, 2.0 + (-1) ** step) for step in range(1000)]
    assert all(abs(loss - 2.0) < 0.05 for _, loss in loss_plot.smoothed(noisy)[100:])


def test_loss_evaluations_and_borders_have_their_colours(write_loss):
    records = [{"step": step, "epoch": 0, "bucket": step // 100, "loss": 8 / step**0.2} for step in range(1, 301)]
    records.append({"step": 300, "evaluation": {"zh": {"loss": 4.0}}})
    path = write_loss(records)
    for colour in (loss_plot.SMOOTHED, loss_plot.EVALUATION_COLOURS[0], loss_plot.BORDER):
        assert count_of(colour, path) > 0


def test_accuracies_have_an_axis_of_their_own_below(write_loss):
    records = [{"step": step, "epoch": 0, "loss": 8 / step**0.2} for step in range(1, 301)]
    only_losses = height_of(loss_plot.SMOOTHED, write_loss(records))
    for step, right in ((0, 0.9), (300, 0.3)):
        records.append({"step": step, "evaluation": {"icl": {"accuracy": right, "standard_error": 0.03}}})
    curves = loss_plot.curves_of(records)
    assert curves.accuracies == {"icl": [(0, 0.9, 0.03), (300, 0.3, 0.03)]} and curves.evaluations == {}
    path = write_loss(records)
    losses, accuracies = (height_of(colour, path) for colour in (loss_plot.SMOOTHED, loss_plot.EVALUATION_COLOURS[0]))
    assert 0.5 * only_losses < losses < 0.8 * only_losses and accuracies > 80
    # A model that diverged has no accuracy, and a single item no error.
    records.append({"step": 301, "evaluation": {"icl": {"accuracy": None}, "mmlu": {"accuracy": 1.0}}})
    assert loss_plot.curves_of(records).accuracies["mmlu"] == [(301, 1.0, 0.0)]


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 7, "epoch": 0, "loss": 0.0}],
        [{"step": step, "epoch": 0, "loss": 1e17} for step in (1, 2)],
        [{"step": step, "epoch": step // 2, "loss": 1.0} for step in range(1000)],
        [{"step": step, "epoch": 0, "loss": 1.0, "evaluation": {f"e{n}": {"loss": 2.0} for n in range(40)}}
         for step in range(1, 90)],
    ],
    ids=["one step", "huge", "many borders", "many evaluations"],
)  # fmt: skip
def test_odd_runs_are_drawn(records, write_loss):
    assert count_of(loss_plot.SMOOTHED, write_loss(records, title="long " * 100)) > 0


# Names.


def test_a_name_loses_its_middle():
    assert style.label("short") == "short"
    assert style.label("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"


@pytest.mark.parametrize("name", ["_hidden", "$x$", "100%", "\\frac", "a\nb", "\x1b[31m", ""])
def test_a_name_is_drawn_unchanged(name, tmp_path):
    """These characters have a meaning in matplotlib; unescaped, they would raise or drop the entry."""
    seen = []

    def draw(figure):
        axes = figure.add_subplot()
        (line,) = axes.plot([1, 2], [1, 2])
        style.add_legend(axes, [(line, style.label(name))])
        (text,) = axes.get_legend().get_texts()
        seen.append(text.get_text())

    style.write_picture(tmp_path / "p.png", draw, title=name, needed_for="x")
    assert seen == [name.replace("\n", "U+000A ").replace("\x1b", "U+001B ")]


def make_font(path, family: str, characters: str) -> None:
    """A TrueType font whose every character is a square."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    names = [".notdef", *(f"u{ord(character):04X}" for character in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): f"u{ord(character):04X}" for character in characters})
    builder.setupGlyf({name: square for name in names})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in names})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_chinese_is_drawn_where_a_font_has_it_and_named_by_number_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "CJK_FONTS", ("Squares for a Test",))
    assert style.label("猜谜 a") == "U+731C U+8C1C  a" and style.missing_characters("猜谜 a猜") == "猜谜"
    make_font(tmp_path / "squares.ttf", "Squares for a Test", "猜")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    font_manager.fontManager.addfont(tmp_path / "squares.ttf")
    assert style.label("猜谜 a") == "猜U+8C1C  a" and style.missing_characters("猜谜 a猜") == "谜"
    plots.draw_lengths([1], tmp_path / "without.png", title=".")
    plots.draw_lengths([1], tmp_path / "with.png", title="猜")
    assert count_of("#000000", tmp_path / "with.png") - count_of("#000000", tmp_path / "without.png") > 50


# What drawing leaves behind.

DRAW = """
from pathlib import Path
from colossal_llama2.charts import plots
plots.draw_lengths([1], Path('l.png'), title='猜谜 ไทย')
"""


def draw_in_a_process(folder, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always", **environment}
    return subprocess.run(
        [sys.executable, "-c", DRAW], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_nothing_is_printed_and_a_home_that_cannot_be_written_is_left_alone(tmp_path):
    shown = draw_in_a_process(tmp_path, HOME="/proc/self", XDG_CACHE_HOME="", XDG_CONFIG_HOME="", MPLCONFIGDIR="")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["l.png"]


def test_a_user_s_own_style_changes_nothing(tmp_path):
    for name, rc in (("plain", ""), ("own", "figure.dpi: 20\ntext.usetex: True\naxes.grid: False\nbackend: TkAgg\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "matplotlibrc").write_text(rc)
        shown = draw_in_a_process(tmp_path / name, MPLCONFIGDIR=str(tmp_path / name))
        assert (shown.returncode, shown.stderr) == (0, "")
    assert (tmp_path / "plain" / "l.png").read_bytes() == (tmp_path / "own" / "l.png").read_bytes()


def test_without_matplotlib_the_error_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="--plots needs matplotlib, .*; run: pip install matplotlib"):
        plots.draw_lengths([1], tmp_path / "l.png", title="")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_drawing_leaves_the_earlier_picture(tmp_path):
    def fail(figure):
        raise OSError(28, "No space left on device")

    (tmp_path / "p.png").write_bytes(b"earlier")
    with pytest.raises(OSError):
        style.write_picture(tmp_path / "p.png", fail, title="x", needed_for="x")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]
