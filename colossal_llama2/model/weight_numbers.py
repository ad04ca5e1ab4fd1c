"""Check that all numbers of stored weights are finite, in the dtype in which the model will hold them.

A NaN in one weight shows much later, as a NaN loss or an empty answer, and then looks like a fault of the data. The
files are checked, since every plugin reads the weights from them, even with lazy loading. The ranks of a job share the
work. Nothing is copied: 64 MiB of a file at a time are mapped, and stay in the host's page cache for the load.
"""

import math
import mmap
from collections import Counter
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import COMPUTED_SUFFIX
from colossal_llama2.model.model_folder import shard_names
from colossal_llama2.model.safetensors_stream import FLOATS, Shard, read_shard

if TYPE_CHECKING:
    import torch

WINDOW_BYTES = 64 * 2**20
# The dtypes of weights in training, under the format's names.
PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def check_numbers(path: str, dtype: str | None, *, cure: str = "", share: int = 0, shares: int = 1) -> None:
    """Read the weights of a model folder and check that each number is finite, also when it is rounded to `dtype`.

    Args:
        dtype: a key of safetensors_stream.FLOATS, or of PRECISIONS; None: as they are stored.
        cure: the fix for numbers that are too large for `dtype`.
        share, shares: the part of the numbers to check, of that many parts.

    Raises:
        UserError: with the weight's name and file, and how many of its numbers are NaN, infinite or too large.
    """
    target = None if dtype is None else PRECISIONS.get(dtype, dtype)
    for name in shard_names(path):
        shard = read_shard(Path(path, name))
        with open(shard.path, "rb", buffering=0) as file:
            for tensor, begin, length in _ranges(shard, share, shares):
                found = _bad_numbers(file, shard, tensor, begin, length, target)
                if found:
                    raise UserError(_message(shard, tensor, found, target, whole=shares == 1, cure=cure))


def _ranges(shard: Shard, share: int, shares: int) -> Iterator[tuple[str, int, int]]:
    """For each tensor of floats: its name, and the first byte and the bytes of this share of it."""
    for name, entry in shard.tensors.items():
        if entry["dtype"] in FLOATS and not name.endswith(COMPUTED_SUFFIX):
            width, count = FLOATS[entry["dtype"]][1], math.prod(entry["shape"])
            first, end = count * share // shares, count * (share + 1) // shares
            yield name, shard.data_start + entry["data_offsets"][0] + first * width, (end - first) * width


def _bad_numbers(file: FileIO, shard: Shard, name: str, begin: int, length: int, target: str | None) -> dict[str, int]:
    """The numbers of NaN, infinite and too large (for `target`) values in a range of bytes; empty if there are none."""
    import torch

    dtype = getattr(torch, FLOATS[shard.tensors[name]["dtype"]][0])
    held = dtype if target is None else getattr(torch, FLOATS[target][0])
    found: Counter[str] = Counter()
    for offset in range(0, length, WINDOW_BYTES):
        size = min(WINDOW_BYTES, length - offset)
        # A map begins at a page.
        ahead = (begin + offset) % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(file.fileno(), ahead + size, access=mmap.ACCESS_COPY, offset=begin + offset - ahead)
        try:
            if hasattr(mmap, "MADV_WILLNEED"):
                window.madvise(mmap.MADV_WILLNEED)
            found.update(_count(torch.frombuffer(window, dtype=dtype, offset=ahead), held))
        finally:
            window.close()
    return +found


def _count(values: "torch.Tensor", held: "torch.dtype") -> dict[str, int]:
    """The numbers of a tensor's values that are NaN or infinite, or become infinite in the dtype `held`."""
    import torch

    # Values above it may be rounded to infinity.
    largest = min(torch.finfo(values.dtype).max, torch.finfo(held).max)
    # One pass, in which NaN propagates; most weights need no other.
    if all(abs(bound) <= largest for bound in map(float, values.aminmax())):
        return {}
    is_nan, is_infinite = values.isnan(), values.isinf()
    too_large = values.to(held).isinf() & ~is_infinite
    return {"NaN": int(is_nan.sum()), "infinite": int(is_infinite.sum()), "too large": int(too_large.sum())}


def _message(shard: Shard, name: str, found: dict[str, int], target: str | None, *, whole: bool, cure: str) -> str:
    kinds = [f"{count:,} {kind}" for kind, count in found.items() if count]
    if target and found["too large"]:
        kinds[-1] += f" for {FLOATS[target][0]}"
    numbers = math.prod(shard.tensors[name]["shape"])
    of_all = f"of its {numbers:,} numbers" if whole else f"of its {numbers:,} numbers, at least"
    only_large = not found["NaN"] and not found["infinite"]
    what = cure if only_large else "copy the model again from its source, or take an earlier checkpoint"
    return f"{shard.path}: {name} has {', '.join(kinds)} {of_all}; {what}"
