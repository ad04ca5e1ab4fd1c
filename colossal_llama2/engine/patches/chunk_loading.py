"""Read a model's weights into Gemini's chunks: each rank its own part, from the files alone.

ColossalAI gathers every chunk on every rank to copy a file's tensors into it, once for each file: memory for a whole
chunk, which is a whole matrix of embeddings, and as many exchanges of the whole model as it has files. Here a rank
reads the numbers that its share of a chunk holds. Values are the same: half precision first, then float32 for the
master weights.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.engine.patches import patching
from colossal_llama2.errors import UserError
from colossal_llama2.model.model_folder import WEIGHTS_FILE, weight_map

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

# Read at a time, in whole rows.
PIECE_NUMBERS = 2**22
CHECKPOINT_IO = "colossalai.booster.plugin.gemini_plugin:GeminiCheckpointIO"
TARGETS = (f"{CHECKPOINT_IO}.load_sharded_model", f"{CHECKPOINT_IO}.load_unsharded_model")


class OwnPart(NamedTuple):
    """A tensor's name and shape, and where its numbers go: from its number `begin` on, as many as `place` has."""

    name: str
    shape: tuple[int, ...]
    begin: int
    place: "torch.Tensor"


def install() -> None:
    """Replace how Gemini loads a model. May be called again. Raises UserError for another version of ColossalAI."""
    for target in TARGETS:
        patching.install(target, lambda _: _load)


def _load(_: Any, gemini: Any, path: str | Path, *args: Any, **keywords: Any) -> None:
    """Called by ColossalAI with a safetensors file, or the index of several."""
    folder = Path(path).parent
    read_own_parts(gemini, folder, None if Path(path).name == WEIGHTS_FILE else weight_map(folder))


def read_own_parts(gemini: Any, folder: Path, file_of: Mapping[str, str] | None) -> None:
    """Fill this rank's shares of all chunks, and the parameters that have no chunk.

    Args:
        gemini: a GeminiDDP whose tensors are not split by tensor parallelism.
        folder: with the files.
        file_of: the file of each tensor; None for one file.
    """
    import torch
    from colossalai.utils import is_ddp_ignored
    from safetensors import safe_open

    manager = gemini.chunk_manager
    if manager.reuse_fp16_chunk:
        names = {
            master: gemini.param2name[own] for own, master in zip(gemini.fp16_params, gemini.fp32_params, strict=True)
        }
    else:
        names = {own: gemini.param2name[own] for own in gemini.fp16_params}
    parts: list[OwnPart] = []
    for name, parameter in gemini.named_parameters():
        if is_ddp_ignored(parameter):
            parts.append(OwnPart(name, tuple(parameter.shape), 0, parameter.data.view(-1)))
    chunks = manager.get_chunks(names)
    for chunk in chunks:
        parts += own_parts(chunk, names)
    by_file: dict[str, list[OwnPart]] = {}
    for part in parts:
        by_file.setdefault(WEIGHTS_FILE if file_of is None else file_of[part.name], []).append(part)
    with torch.no_grad():
        for file_name, inside in by_file.items():
            with safe_open(str(folder / file_name), framework="pt", device="cpu") as file:
                for part in inside:
                    _read(file, part, gemini.mixed_precision)
        if gemini.master_weights:
            for chunk in chunks:
                chunk.paired_chunk.payload.copy_(chunk.payload)


def own_parts(chunk: Any, names: Mapping["torch.Tensor", str]) -> Iterator[OwnPart]:
    """What this rank holds of each tensor of a chunk."""
    held = chunk.payload
    first = 0 if chunk.is_gathered else chunk.shard_begin
    for tensor, place in chunk.tensors_info.items():
        begin, end = max(place.offset, first), min(place.end, first + held.numel())
        if begin < end:
            yield OwnPart(names[tensor], tuple(tensor.shape), begin - place.offset, held[begin - first : end - first])


def _read(file: "safe_open", part: OwnPart, dtype: "torch.dtype") -> None:
    """Copy numbers of a tensor, some of its rows at a time."""
    stored = file.get_slice(part.name)
    if tuple(stored.get_shape()) != part.shape:
        raise UserError(f"{part.name} is stored with shape {tuple(stored.get_shape())}, {part.shape} needed")
    width = math.prod(part.shape[1:])
    rows = max(PIECE_NUMBERS // width, 1)
    end = part.begin + part.place.numel()
    last = math.ceil(end / width)
    for row in range(part.begin // width, last, rows):
        piece = stored[row : min(row + rows, last)].reshape(-1)
        start = row * width
        begin, stop = max(start, part.begin), min(start + piece.numel(), end)
        numbers = piece[begin - start : stop - start].to(dtype)
        part.place[begin - part.begin : stop - part.begin].copy_(numbers)
