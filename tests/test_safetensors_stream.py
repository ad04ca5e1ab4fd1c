"""Changed copies of safetensors files: their headers for any tensors, their bytes, and ways of copying."""

import errno
import json
import math
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from colossal_llama2.errors import RunError
from colossal_llama2.model import safetensors_stream
from colossal_llama2.model.safetensors_stream import (
    FLOATS,
    Change,
    read_shard,
    target_header,
    target_index,
    target_size,
    target_tensors,
    write_shard,
)

OTHERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "BOOL": torch.bool}
DTYPES = OTHERS | {name: getattr(torch, torch_name) for name, (torch_name, _) in FLOATS.items()}
NAMES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name not in ("__metadata__", "matrix")
)
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=6
)


def nothing(count):
    """No progress display."""


def file_of(path, tensors, metadata):
    """A safetensors file with the tensors in the given order, which may differ from that of the format's own writer."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, tensor in tensors.items():
        content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = next(key for key, value in DTYPES.items() if value == tensor.dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=TENSORS,
    dtype=st.sampled_from([None, *FLOATS]),
    matrix_dtype=st.sampled_from(sorted(FLOATS)),
    rows=st.integers(1, 6),
    kept=st.integers(1, 6),
    bags=st.lists(st.lists(st.integers(0, 0), min_size=1, max_size=3), max_size=4),
    metadata=st.dictionaries(st.text(st.characters(blacklist_categories=("Cs",))), st.just("x"), max_size=2),
    place=st.integers(0, 6),
)
def test_any_header_is_rewritten_right(tmp_path, tensors, dtype, matrix_dtype, rows, kept, bags, metadata, place):
    kept = min(kept, rows)
    made = {name: torch.ones(shape).to(DTYPES[kind]) for name, (kind, shape) in tensors.items()}
    items = list(made.items())
    items.insert(place, ("matrix", torch.randn(rows, 3).to(DTYPES[matrix_dtype])))
    file_of(tmp_path / "source", dict(items), metadata)
    shard, change = read_shard(tmp_path / "source"), Change(("matrix",), kept=kept, bags=bags, dtype=dtype)
    (tmp_path / "target").unlink(missing_ok=True)
    written = []
    write_shard(shard, tmp_path / "target", change, written.append)

    size = (tmp_path / "target").stat().st_size
    assert size == sum(written) == target_size(shard, change)
    header = target_header(shard, change)
    assert len(header) % 8 == 0 and (tmp_path / "target").read_bytes().startswith(header)
    end = 0
    for entry in target_tensors(shard, change).values():
        begin, length = entry["data_offsets"][0], math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        assert begin == end and begin % DTYPES[entry["dtype"]].itemsize == 0  # no gap, and aligned
        end = begin + length
        assert end == entry["data_offsets"][1]
    assert len(header) + end == size
    with safe_open(tmp_path / "target", framework="pt") as file:
        assert (file.metadata() or {}) == metadata
    after = load_file(tmp_path / "target")
    assert after.keys() == dict(items).keys()
    for name, tensor in items:
        floats = dtype is not None and tensor.is_floating_point()
        expected = tensor.to(DTYPES[dtype]) if floats else tensor
        if name == "matrix":
            assert after[name].shape == (kept + len(bags), 3)
            assert torch.equal(after[name][:kept], expected[:kept])
            continue
        assert after[name].dtype == expected.dtype and torch.equal(after[name], expected)


def test_means_are_summed_in_float32(tmp_path):
    """In bfloat16, 256 + 1 is 256: only a wider sum gives the right means."""
    column = torch.tensor([[256.0], [1.0], [3.0], [-256.0]], dtype=torch.bfloat16).repeat(1, 8)
    save_file({"matrix": column}, tmp_path / "source")
    bags = [[0, 1, 2, 3], [1], [1, 2, 2], [0, 1, 1, 3]] * 200
    write_shard(read_shard(tmp_path / "source"), tmp_path / "target", Change(("matrix",), kept=2, bags=bags), nothing)
    rows = load_file(tmp_path / "target")["matrix"]
    expected = torch.tensor([1.0, 1.0, 7 / 3, 0.5] * 200).to(torch.bfloat16)
    assert (
        torch.equal(rows[:2], column[:2]) and torch.equal(rows[2:, 0], expected) and torch.equal(rows[2:, 7], expected)
    )


@pytest.mark.parametrize("answer", [errno.EXDEV, errno.ENOSYS, 0, None])
def test_where_the_kernel_cannot_copy_we_do(tmp_path, monkeypatch, answer):
    """Another file system, an old kernel, one that returns 0, a system without the call: the bytes are the same."""
    real, calls = os.copy_file_range, []

    def copy_file_range(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            return real(*arguments)
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(safetensors_stream, "CHUNK_BYTES", 999)
    if answer is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", copy_file_range)
    save_file({"a": torch.randn(50, 31), "b": torch.arange(77)}, tmp_path / "source")
    written = []
    write_shard(read_shard(tmp_path / "source"), tmp_path / "target", Change((), kept=0, bags=[]), written.append)
    before, after = load_file(tmp_path / "source"), load_file(tmp_path / "target")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(written) == (tmp_path / "target").stat().st_size


def test_other_errors_of_the_copy_name_the_file(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    save_file({"a": torch.zeros(9)}, tmp_path / "source")
    with pytest.raises(OSError, match="No space .*target"):
        write_shard(read_shard(tmp_path / "source"), tmp_path / "target", Change((), kept=0, bags=[]), nothing)


def test_a_source_that_shrinks_is_reported(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "source")
    shard = read_shard(tmp_path / "source")
    os.truncate(tmp_path / "source", 600)
    for number, dtype in enumerate((None, "F16")):
        with pytest.raises(RunError, match="became shorter"):
            change = Change((), kept=0, bags=[], dtype=dtype)
            write_shard(shard, tmp_path / f"target{number}", change, nothing)


def test_the_number_of_threads_is_left_as_it_was(tmp_path):
    threads = torch.get_num_threads()
    save_file({"matrix": torch.zeros(4, 4)}, tmp_path / "source")
    change = Change(("matrix",), kept=4, bags=[[1, 2]])
    torch.set_num_threads(2)
    try:
        write_shard(read_shard(tmp_path / "source"), tmp_path / "target", change, nothing)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_index_counts_what_was_added(tmp_path):
    save_file({"matrix": torch.zeros(4, 4), "other": torch.zeros(2, dtype=torch.int64)}, tmp_path / "source")
    change = Change(("matrix",), kept=3, bags=[[1, 2], [0]], dtype="BF16")
    index = {"metadata": {"total_size": 1, "total_parameters": 100, "x": "y"}, "weight_map": {"matrix": "source"}}
    new = target_index(index, [read_shard(tmp_path / "source")], change)
    assert new == {**index, "metadata": {"total_size": 5 * 4 * 2 + 16, "total_parameters": 104, "x": "y"}}
    assert target_index({}, [read_shard(tmp_path / "source")], change) == {"metadata": {"total_size": 56}}
