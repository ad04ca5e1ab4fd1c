"""The command that compares training with a plain loop, on one configuration; test_training.py runs a sample."""

import math

import pytest

from tests import equality
from tests.equality import Gap


@pytest.mark.slow
def test_a_row_of_the_matrix(tmp_path, capsys):
    page = tmp_path / "docs" / "page.md"
    words = ["fp32", "tp2", "ring", "documents"]
    assert equality.main(["--steps", "3", "--only", *words, "--output", str(page)]) == 0
    assert "1 of 1 equal" in capsys.readouterr().out
    assert "| fp32 3d tp2 ring documents | " in page.read_text() and "3 optimizer steps" in page.read_text()


def test_every_axis_and_option_of_the_matrix():
    names = [case.name for case in equality.all_cases()]
    assert len(names) == len(set(names))
    for plugin in ("zero2", "zero2_cpu", "gemini", "gemini offloaded", "gemini_auto"):
        assert f"bf16 {plugin} accumulating 4" in names
    for option, settings in equality.OPTIONS.items():
        if settings.lora_rank is not None:
            # An adapter is not split.
            assert {f"fp32 {plugin} {option}" for plugin in ("ddp", "zero2", "zero2_cpu", "3d")} <= set(names)
            assert {f"bf16 {plugin} {option}" for plugin in ("gemini", "zero2", "3d zero1")} <= set(names)
            continue
        if not option:
            continue
        for start in (
            "fp32 ddp",
            "fp32 zero2",
            "fp32 3d tp2",
            "fp32 3d pp2",
            "fp32 3d pp2 tp2",
            "fp32 3d sp2 all_to_all",
        ):
            assert f"{start} {option}" in names


@pytest.mark.parametrize("values", [(2e-5, 0.0, 0.0), (0.0, math.nan, 0.0), (0.0, 0.0, 1.0)])
def test_what_is_not_equal_is_reported(values):
    case = equality.all_cases()[0]
    allowed = Gap(1e-5, 1e-5, 1e-4)
    assert equality.Row(case, Gap(0.0, 0.0, 0.0), allowed, 1.0).passed
    assert not equality.Row(case, Gap(*values), allowed, 1.0).passed
    # The bound from halves alone is reported, but decides nothing.
    narrow = equality.Row(case, Gap(2e-6, 0.0, 0.0), allowed, 1.0, Gap(1e-6, 1.0, 1.0))
    table = " ".join(equality.summary_of_halves([narrow]).split())
    assert narrow.passed and "let 0 of the 1 bf16 rows pass" in table and "loss 2.0" in table
    assert not equality.summary_of_halves([])
    # Twice the largest value that clipping allows.
    assert not equality.Row(case, Gap(0.0, 0.0, 0.0), allowed, 2.0).passed
