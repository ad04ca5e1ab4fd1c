"""A share of the matrix of writing and reading plugins (tests/plugin_matrix.py): Gemini with tied embeddings."""

import pytest
import torch

from tests import plugin_matrix
from tests.plugin_matrix import Cell


@pytest.mark.slow
def test_gemini_reads_tied_embeddings_of_every_kind_of_writer(tmp_path):
    cells = plugin_matrix.run(tmp_path, ["gemini", "3d pp2"], ["tied"], readers=["gemini"])
    assert {cell.kind: cell.error for cell in cells if cell.error} == {}
    assert [(cell.writer, cell.kind) for cell in cells if cell.figure is not None] == [
        ("gemini", "resumed"),
        ("3d pp2", "resumed"),
    ]
    assert cells[2].figure == 0.0 < cells[5].figure


def test_differences_are_reported():
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    assert plugin_matrix.different(tensors, {**tensors, "b": torch.zeros(2), "c": tensors["a"]}) == ["b", "c"]
    failed = Cell("tied", "zero2", "gemini", "weights", "changes b")
    table = plugin_matrix.table([failed, Cell("tied", "zero2", "zero2", "weights", None)])
    assert "FAILS" in table and "same bits" in table and "zero2 -> gemini weights: changes b" in table
    assert table.endswith("1 of 2 right")
