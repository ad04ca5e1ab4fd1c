"""Read the headers of safetensors files, and write changed copies of them as a stream of bytes.

A file is the length of its header (8 bytes), the header, and the data, to which the header's offsets point:

    {"__metadata__": {"format": "pt"},
     "lm_head.weight": {"dtype": "BF16", "shape": [32000, 4096], "data_offsets": [0, 262144000]}}

Tensors are copied from file to file, inside the kernel where it can, and converted in chunks of 16 MiB. At most one
matrix is in memory at a time, to average its rows.
"""

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model.loading import COMPUTED_SUFFIX
from colossal_llama2.model.model_folder import INDEX_FILE, WEIGHTS_FILE, has_weights, shard_names, weight_map
from colossal_llama2.storage.input_files import ANY_SIZE, check_regular

if TYPE_CHECKING:
    import torch

METADATA = "__metadata__"
# The dtypes that can be averaged and converted, by the format's names: PyTorch's name and bytes.
FLOATS = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
CHUNK_BYTES = 16 * 2**20
# The amount that stays in a processor's cache while it is summed, converted and written.
ROWS_AT_A_TIME = 256
# Errors of copy_file_range where two files cannot be copied inside the kernel.
NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)

Advance = Callable[[int], None]
# Given the number of the first row and a tensor of rows, returns the rows that take their place.
Rewrite = Callable[[int, "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header (tensor name to dtype, shape, data_offsets) and where the data begins."""

    path: Path
    header: dict
    data_start: int

    @cached_property
    def tensors(self) -> dict[str, dict]:
        """The header without its free-text metadata, in the order of the data."""
        names = (name for name in self.header if name != METADATA)
        return {name: self.header[name] for name in sorted(names, key=lambda name: self.header[name]["data_offsets"])}


@dataclass(frozen=True)
class Change:
    """How the tensors change.

    In each matrix of `matrices` the first `kept` rows are unchanged, row `kept + i` is the mean of the rows `bags[i]`,
    and each of the last `padding` rows is the mean of the kept ones. All floating-point tensors are converted to
    `dtype`, a key of FLOATS; None converts nothing.
    """

    matrices: tuple[str, ...]
    kept: int
    bags: list[list[int]]
    dtype: str | None = None
    padding: int = 0


# Reading.


def read_shards(source: Path) -> list[Shard]:
    """The headers of all weight files of a checkpoint. Raises UserError if any is missing, foreign or damaged."""
    if not has_weights(source):
        raise UserError(_no_weights(source))
    shards = [read_shard(source / name) for name in shard_names(str(source))]
    if shards[0].path.name == WEIGHTS_FILE:
        return shards
    named = {(file, name) for name, file in weight_map(source).items()}
    held = {(shard.path.name, name) for shard in shards for name in shard.tensors}
    if held != named:
        file, name = sorted(held ^ named)[0]
        raise UserError(
            f"{source / INDEX_FILE} and its files disagree about {name} in {file}; download the model again"
        )
    return shards


def _no_weights(source: Path) -> str:
    if not any(source.glob("pytorch_model*.bin")):
        return f"{source} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a LLaMA model in Hugging Face format"
    convert = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained('{source}', torch_dtype='auto').save_pretrained('{source}')"
    )
    return f'{source} holds pytorch_model.bin weights, which are never unpickled here; convert: python -c "{convert}"'


def read_shard(path: Path) -> Shard:
    """The header of one file. Raises UserError if it is missing or not a whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    if not os.path.lexists(path):
        raise UserError(f"{path} is missing, though {INDEX_FILE} names it; download it again")
    check_regular(path, max_bytes=ANY_SIZE)
    try:
        with safe_open(path, framework="np"):
            pass  # checks the whole header: it must parse, and the tensors must fill the file
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return Shard(path=path, header=json.loads(file.read(length)), data_start=8 + length)


# Planning.


def target_tensors(shard: Shard, change: Change) -> dict[str, dict]:
    """The header entries of the changed shard, in the order of its data.

    Tensors with larger numbers come first, as the format's own writer orders them, so that every one is aligned.
    """
    entries = {name: _target_entry(name, entry, change) for name, entry in shard.tensors.items()}
    offset, ordered = 0, {}
    for name in sorted(entries, key=lambda name: _number_bytes(entries[name]), reverse=True):
        length = _data_bytes(entries[name])
        ordered[name] = {**entries[name], "data_offsets": [offset, offset + length]}
        offset += length
    return ordered


def _target_entry(name: str, entry: dict, change: Change) -> dict:
    """One entry with its new dtype and shape; the offsets begin at 0."""
    dtype, shape, length = entry["dtype"], entry["shape"], _data_bytes(entry)
    if name in change.matrices:
        shape = [change.kept + len(change.bags) + change.padding, shape[1]]
        length = length // entry["shape"][0] * shape[0]
    # Old checkpoints store a constant in float32, whatever their weights are in.
    if change.dtype is not None and dtype in FLOATS and not name.endswith(COMPUTED_SUFFIX):
        length = length // FLOATS[dtype][1] * FLOATS[change.dtype][1]
        dtype = change.dtype
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, length]}


def _number_bytes(entry: dict) -> float:
    """Bytes of one number. An empty tensor counts as the largest: at offset 0 it is aligned for every dtype."""
    count = math.prod(entry["shape"])
    return _data_bytes(entry) / count if count else math.inf


def _data_bytes(entry: dict) -> int:
    begin, end = entry["data_offsets"]
    return end - begin


def target_header(shard: Shard, change: Change) -> bytes:
    """The beginning of the changed file, up to its data."""
    header = {METADATA: shard.header[METADATA]} if METADATA in shard.header else {}
    text = json.dumps({**header, **target_tensors(shard, change)}, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces at the end align the data to 8 bytes, as the format's own writer does.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def target_size(shard: Shard, change: Change) -> int:
    """Bytes of the changed file."""
    return len(target_header(shard, change)) + sum(map(_data_bytes, target_tensors(shard, change).values()))


def target_index(index: dict, shards: list[Shard], change: Change) -> dict:
    """The content of the index file with the sizes of the changed shards."""
    old = [entry for shard in shards for entry in shard.tensors.values()]
    new = [entry for shard in shards for entry in target_tensors(shard, change).values()]
    metadata = {**(index.get("metadata") or {}), "total_size": sum(map(_data_bytes, new))}
    if "total_parameters" in metadata:
        # Keep how the model counts (tied weights, constants), and add only the difference.
        metadata["total_parameters"] += sum(math.prod(entry["shape"]) for entry in new)
        metadata["total_parameters"] -= sum(math.prod(entry["shape"]) for entry in old)
    return {**index, "metadata": metadata}


# Writing.


def write_shard(shard: Shard, path: Path, change: Change, advance: Advance) -> None:
    """Write the changed shard to `path`, a new file; `advance` is called with numbers of bytes as they are written.

    Raises UserError if a value does not fit into the dtype, RunError if the source became shorter meanwhile.
    """
    with open(shard.path, "rb", buffering=0) as source, open(path, "xb", buffering=0) as target:
        try:
            _write(target, target_header(shard, change), advance)
            for name, entry in target_tensors(shard, change).items():
                _write_tensor(shard, name, entry, source=source, target=target, change=change, advance=advance)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise


def rewrite_shard(shard: Shard, path: Path, rewrites: Mapping[str, Rewrite], advance: Advance) -> None:
    """Write a copy of the shard to `path`, a new file, in which the matrices named in `rewrites` have other numbers.

    Shapes and dtypes stay. `advance` is as in `write_shard`.

    Raises:
        UserError: a value does not fit into the dtype.
        RunError: the source became shorter meanwhile.
    """
    unchanged = Change((), kept=0, bags=[])
    with open(shard.path, "rb", buffering=0) as source, open(path, "xb", buffering=0) as target:
        try:
            _write(target, target_header(shard, unchanged), advance)
            for name in target_tensors(shard, unchanged):
                entry = shard.tensors[name]
                begin = shard.data_start + entry["data_offsets"][0]
                if name not in rewrites:
                    _copy(source, target, begin=begin, length=_data_bytes(entry), advance=advance)
                    continue
                for first, rows in _blocks_of_rows(source, begin=begin, entry=entry):
                    values = rewrites[name](first, rows)
                    too_large = _too_large(values, entry["dtype"])
                    if too_large:
                        raise UserError(
                            f"{name}: {too_large:,} of its new numbers are too large for {FLOATS[entry['dtype']][0]}; "
                            f"nothing was kept. Convert {shard.path.parent} to bfloat16 or float32 and train again"
                        )
                    _write_values(target, values, entry["dtype"], advance)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise


def _blocks_of_rows(source: FileIO, *, begin: int, entry: dict) -> Iterator[tuple[int, "torch.Tensor"]]:
    """The rows of a matrix in blocks of about CHUNK_BYTES, each with the number of its first row."""
    height = entry["shape"][0]
    step = max(CHUNK_BYTES // max(_data_bytes(entry) // height, 1), 1)
    for first in range(0, height, step):
        yield first, _rows(source, begin=begin, entry=entry, numbers=range(first, min(first + step, height)))


def _write_tensor(
    shard: Shard, name: str, entry: dict, *, source: FileIO, target: FileIO, change: Change, advance: Advance
) -> None:
    old, too_large = shard.tensors[name], 0
    begin, length = shard.data_start + old["data_offsets"][0], _data_bytes(old)
    if name in change.matrices:
        length = length // old["shape"][0] * change.kept
    if entry["dtype"] == old["dtype"]:
        _copy(source, target, begin=begin, length=length, advance=advance)
    else:
        for values in _chunks(source, begin=begin, length=length, dtype=old["dtype"]):
            too_large += _too_large(values, entry["dtype"])
            _write_values(target, values, entry["dtype"], advance)
    if name in change.matrices:
        with _one_thread():
            means = _mean_rows(source, begin=begin, entry=old, bags=change.bags)
            for rows in chain(means, _padding_rows(source, begin=begin, entry=old, change=change)):
                too_large += _too_large(rows, entry["dtype"])
                _write_values(target, rows, entry["dtype"], advance)
    if too_large:
        dtype = FLOATS[entry["dtype"]][0]
        raise UserError(
            f"{name}: {too_large:,} of its numbers would be too large for --dtype {dtype}; nothing was kept. "
            "Use bfloat16 or float32"
        )


def _copy(source: FileIO, target: FileIO, *, begin: int, length: int, advance: Advance) -> None:
    """Append a range of the source's bytes to the target, inside the kernel where possible."""
    end, in_kernel = begin + length, hasattr(os, "copy_file_range")
    while begin < end:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), min(CHUNK_BYTES, end - begin), begin)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
            # 0 bytes: the end of the file, or a file system that does not report why it cannot.
            in_kernel = count > 0
            advance(count)
        else:
            chunk = bytearray(min(CHUNK_BYTES, end - begin))
            _read(source, begin, chunk)
            _write(target, chunk, advance)
            count = len(chunk)
        begin += count


def _chunks(source: FileIO, *, begin: int, length: int, dtype: str) -> Iterator:
    """A range of the source's bytes as flat tensors of at most CHUNK_BYTES."""
    import torch

    for offset in range(0, length, CHUNK_BYTES):
        chunk = bytearray(min(CHUNK_BYTES, length - offset))
        _read(source, begin + offset, chunk)
        yield torch.frombuffer(chunk, dtype=getattr(torch, FLOATS[dtype][0]))


def _mean_rows(source: FileIO, *, begin: int, entry: dict, bags: list[list[int]]) -> Iterator:
    """The mean of each bag's rows, summed in float32, as float32 tensors of several rows each."""
    import torch

    # Many new tokens share few old ones: only those rows are read, and become float32.
    ids = torch.tensor([index for bag in bags for index in bag], dtype=torch.long)
    used, ids = torch.unique(ids, return_inverse=True)
    matrix = _rows(source, begin=begin, entry=entry, numbers=used.tolist()).float()
    ends = torch.tensor([0, *map(len, bags)]).cumsum(0)
    for start in range(0, len(bags), ROWS_AT_A_TIME):
        bounds = ends[start : start + ROWS_AT_A_TIME + 1]
        block = ids[bounds[0] : bounds[-1]]
        yield torch.nn.functional.embedding_bag(block, matrix, bounds[:-1] - bounds[0], mode="mean")


def _padding_rows(source: FileIO, *, begin: int, entry: dict, change: Change) -> Iterator:
    """The last rows, each the mean of the kept rows, as float32 tensors of several rows each."""
    import torch

    if not change.padding:
        return
    total = torch.zeros(entry["shape"][1], dtype=torch.float64)
    for start in range(0, change.kept, ROWS_AT_A_TIME):
        numbers = range(start, min(start + ROWS_AT_A_TIME, change.kept))
        total += _rows(source, begin=begin, entry=entry, numbers=numbers).double().sum(0)
    for start in range(0, change.padding, ROWS_AT_A_TIME):
        yield (total / change.kept).float().repeat(min(ROWS_AT_A_TIME, change.padding - start), 1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: over a few rows many only wait for each other, five times as long on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rows(source: FileIO, *, begin: int, entry: dict, numbers: Sequence[int]) -> "torch.Tensor":
    """Some rows of a matrix, as a tensor of its dtype."""
    import torch

    height, width = entry["shape"]
    row_bytes = _data_bytes(entry) // height
    data = torch.empty((len(numbers), row_bytes), dtype=torch.uint8)
    for number, row in zip(numbers, data.numpy(), strict=True):
        _read(source, begin + number * row_bytes, row)
    return data.view(getattr(torch, FLOATS[entry["dtype"]][0])).view(len(numbers), width)


def _write_values(target: FileIO, values: "torch.Tensor", dtype: str, advance: Advance) -> None:
    """Append a tensor in another dtype."""
    import torch

    converted = values.to(getattr(torch, FLOATS[dtype][0]))
    _write(target, converted.view(-1).view(torch.uint8).numpy(), advance)


def _too_large(values: "torch.Tensor", dtype: str) -> int:
    """The number of finite values that become infinite in `dtype`."""
    import torch

    largest = torch.finfo(getattr(torch, FLOATS[dtype][0])).max
    # One quick pass; only large, infinite or NaN values need a second.
    if all(abs(bound) <= largest for bound in map(float, values.aminmax())):
        return 0
    return int((values.to(getattr(torch, FLOATS[dtype][0])).isinf() & ~values.isinf()).sum())


def _read(source: FileIO, begin: int, buffer: Any) -> None:
    """Fill a buffer from an offset of the file. Raises RunError if the file ends before."""
    view = memoryview(buffer)
    source.seek(begin)
    while view:
        count = source.readinto(view[:CHUNK_BYTES])
        if not count:
            raise RunError(f"{source.name} became shorter while it was read; nothing was kept")
        view = view[count:]


def _write(target: FileIO, data: Any, advance: Advance) -> None:
    view = memoryview(data)
    while view:
        count = target.write(view[:CHUNK_BYTES])
        advance(count)
        view = view[count:]
