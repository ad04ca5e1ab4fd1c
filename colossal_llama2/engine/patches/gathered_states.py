"""Optimizer states, gathered from the ranks for one file of a checkpoint after the other.

ColossalAI gathers each state on every rank, beside copies of it, and Gemini gathers pickled objects. A rank that writes
also keeps a file's states while it gathers those of the next one. Here states travel in pieces, only the rank that
writes keeps them, and besides its own part it holds the states of one file. Files and values are the same.

zero2     the ranks' parts of a flattened parameter are equally long
3d        the same, and besides, tensor-parallel ranks have other rows or columns of a matrix
gemini    a rank has what its share of a chunk holds of a parameter, which may be nothing

With ddp, every rank has all states, and nothing is gathered.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.engine.patches import patching
from colossal_llama2.engine.ranks import collectives

if TYPE_CHECKING:
    import torch

# Of all ranks together, and the least of one rank. A GPU and the network need no larger ones to be busy.
PIECE_BYTES, LEAST_PART_BYTES = 8 * 2**20, 2**18
MIB = 2**20
OF_ZERO2 = "colossalai.zero.low_level.low_level_optim:LowLevelZeroOptimizer.state_dict_shard"
OF_3D = "colossalai.checkpoint_io.hybrid_parallel_checkpoint_io:HybridParallelCheckpointIO._optimizer_sharder"
OF_GEMINI = "colossalai.zero:GeminiOptimizer.state_shard"
TARGETS = (OF_ZERO2, OF_3D, OF_GEMINI)


class ParameterStates(NamedTuple):
    """The states of one parameter: its number, the size in a file, and a function that all ranks call to gather them.

    It returns the states by name on the rank that writes, and nothing on the others.
    """

    number: int
    mib: float
    gather: Callable[[], dict[str, Any]]


def install_for_zero2() -> None:
    """Replace how zero2 gathers states. May be called again. Raises UserError for another version of ColossalAI."""
    patching.install(OF_ZERO2, lambda _: _files_of_zero2)


def install_for_3d() -> None:
    """The same for 3d."""
    patching.install(OF_3D, lambda _: _files_of_3d)


def install_for_gemini() -> None:
    """The same for Gemini."""
    patching.install(OF_GEMINI, lambda _: _files_of_gemini)


def _in_files(parameters: Iterator[ParameterStates], max_mib: float) -> Iterator[tuple[dict[int, Any], float]]:
    """The content of each file and its size in MiB. The caller must have written it when it asks for the next one."""
    content: dict[int, Any] = {}
    size = 0.0
    for number, mib, gather in parameters:
        if size + mib > max_mib and size > 0:
            yield content, size
            # The caller may still hold it.
            content.clear()
            content, size = {}, 0.0
        content[number] = gather()
        size += mib
    yield content, size


def _files_of_zero2(
    optimizer: Any, max_shard_size: float = 1024, pinned_state_dicts: None = None, only_on_master: bool = True
) -> Iterator[tuple[dict[int, Any], float]]:
    """LowLevelZeroOptimizer.state_dict_shard, as the checkpoint code calls it."""
    masters = [master for group in optimizer.optim.param_groups for master in group["params"]]
    states_by_number = optimizer.optim.state_dict()["state"]

    def gather(states: dict[str, Any], working: Any) -> dict[str, Any]:
        group = optimizer.param_to_pg[working]
        found = {}
        for name, value in states.items():
            found[name] = _from_ranks(value, group, working.shape) if _is_split(name, value) else value
        return found if _is_first(group) else {}

    def parameters() -> Iterator[ParameterStates]:
        for number, master in enumerate(masters):
            states, working = states_by_number[number], optimizer.master_to_working_param[id(master)]
            split = [value for name, value in states.items() if _is_split(name, value)]
            size = sum(_mib(working.numel(), value) for value in split)
            yield ParameterStates(number, size, partial(gather, states, working))

    return _in_files(parameters(), max_shard_size)


def _files_of_3d(
    optimizer: Any,
    use_zero: bool,
    dp_group: Any,
    tp_group: Any,
    size_per_shard: float = 1024,
    pinned_state_dicts: None = None,
) -> Iterator[tuple[dict[int, Any], float]]:
    """HybridParallelCheckpointIO._optimizer_sharder: the states of this stage's parameters."""
    info, working_of = optimizer.param_info, optimizer.get_master_to_working_map()

    def gather(states: dict[str, Any], working: Any, shape: Sequence[int]) -> dict[str, Any]:
        found = {}
        for name, value in states.items():
            if not _is_split(name, value):
                found[name] = value
                continue
            part = _from_ranks(value, dp_group, working.shape) if use_zero else value
            # The partners of a tensor-parallel group have the same place in their data-parallel groups.
            if part is not None:
                found[name] = _from_partners(part, tp_group, shape)
        return found if _is_first(dp_group) and _is_first(tp_group) else {}

    def parameters() -> Iterator[ParameterStates]:
        for param, states in optimizer.optim.state.items():
            working = param if working_of is None else working_of[id(param)]
            shape = info["param2shape"][id(working)]
            size = 0.0
            for name, value in states.items():
                if hasattr(value, "element_size"):
                    size += _mib(math.prod(shape) if _is_split(name, value) else value.numel(), value)
            yield ParameterStates(info["param2id"][id(working)], size, partial(gather, states, working, shape))

    return _in_files(parameters(), size_per_shard)


def _files_of_gemini(
    optimizer: Any,
    prefix: str = "",
    max_shard_size: float = 1024,
    only_rank_0: bool = True,
    pinned_state_dicts: None = None,
) -> Iterator[tuple[dict[int, Any], float]]:
    """GeminiOptimizer.state_shard, as the checkpoint code calls it: all states in float32, each step as a tensor."""
    import torch

    known = _names_and_steps(optimizer)

    def gather(number: int) -> dict[str, Any]:
        names, step = known.get(number, ((), 0.0))
        param = optimizer.id_to_real_params[number]
        if names and optimizer.chunk_manager.get_chunk(param).keep_gathered:
            return optimizer.collect_states(param_id=number, only_rank_0=True)
        found = {}
        for name in names:
            found[name] = torch.tensor(step) if name == "step" else _from_chunk(optimizer, number, name)
        return found if collectives.place()[0] == 0 else {}

    def parameters() -> Iterator[ParameterStates]:
        for number, param in optimizer.id_to_real_params.items():
            names, _ = known.get(number, ((), 0.0))
            size = sum(4 * (1 if name == "step" else param.numel()) / MIB for name in names)
            yield ParameterStates(number, size, partial(gather, number))

    return _in_files(parameters(), max_shard_size)


def _names_and_steps(optimizer: Any) -> dict[int, tuple[list[str], float]]:
    """The names of the states of each parameter that has any, and its step, from the ranks that hold a part of it."""
    own = []
    for number, param in optimizer.id_to_fake_params.items():
        states = optimizer.optim.state.get(param)
        if states:
            own.append([number, list(states), float(states.get("step", 0))])
    return {number: (names, step) for found in collectives.gather_values(own) for number, names, step in found}


def _from_chunk(optimizer: Any, number: int, name: str) -> "torch.Tensor | None":
    """A state of a parameter that Gemini splits, on the first rank; None on the others. Called on all ranks."""
    import torch
    import torch.distributed as dist
    from colossalai.utils import get_current_device

    param = optimizer.id_to_real_params[number]
    chunk = optimizer.chunk_manager.get_chunk(param)
    place, group, device = chunk.tensors_info[param], chunk.torch_pg, get_current_device()
    whole = torch.empty(param.numel(), dtype=torch.float32) if _is_first(group) else None
    for owner in range(chunk.pg_size):
        begin = max(place.offset, owner * chunk.shard_size)
        end = min(place.end, (owner + 1) * chunk.shard_size)
        if begin >= end:
            continue
        part = None
        if owner == chunk.pg_rank:
            part = optimizer.optim.state[optimizer.id_to_fake_params[number]][name].detach().view(-1)
        for first in range(0, end - begin, PIECE_BYTES // 4):
            length = min(PIECE_BYTES // 4, end - begin - first)
            if part is not None:
                piece = part[first : first + length].to(device, torch.float32)
            else:
                piece = torch.empty(length if owner > 0 else 0, dtype=torch.float32, device=device)
            # A message to one rank alone would make NCCL connect each pair of ranks anew.
            if owner > 0:
                dist.broadcast(piece, src=dist.get_global_rank(group, owner), group=group)
            if whole is not None:
                start = begin - place.offset + first
                whole[start : start + length].copy_(piece)
    return None if whole is None else whole.view(param.shape)


def _is_split(name: str, value: Any) -> bool:
    """Whether a state has a number for each of the parameter's."""
    import torch

    return isinstance(value, torch.Tensor) and name != "step"


def _mib(numbers: int, like: "torch.Tensor") -> float:
    return numbers * like.element_size() / 1024 / 1024


def _is_first(group: Any) -> bool:
    import torch.distributed as dist

    return dist.get_rank(group) == 0


def _from_ranks(part: "torch.Tensor", group: Any, shape: Sequence[int]) -> "torch.Tensor | None":
    """A state of which each rank of the group has an equal part, flat, with padding at the end.

    Returns:
        It, in the host's memory, on the group's first rank; None on the others.
    """
    whole = _joined(part.detach().view(-1), group, (math.prod(shape),), dimension=0)
    return None if whole is None else whole.view(shape)


def _from_partners(part: "torch.Tensor", group: Any, shape: Sequence[int]) -> "torch.Tensor | None":
    """A state of which each rank of a tensor-parallel group has some rows, some columns, or all. As `_from_ranks`."""
    import torch.distributed as dist
    from colossalai.checkpoint_io import hybrid_parallel_checkpoint_io as hybrid_io

    dimension = hybrid_io.search_tp_partition_dim(part.shape, shape, dist.get_world_size(group))
    if dimension is not None:
        return _joined(part.detach(), group, shape, dimension=dimension)
    # All, and perhaps rows that pad the vocabulary.
    return part.detach()[tuple(slice(length) for length in shape)].cpu() if _is_first(group) else None


def _joined(part: "torch.Tensor", group: Any, shape: Sequence[int], *, dimension: int) -> "torch.Tensor | None":
    """Join equal parts of all ranks of a group along a dimension, and cut them at the end to `shape`.

    Returns:
        The whole, in the host's memory, on the group's first rank; None on the others.
    """
    import torch
    import torch.distributed as dist
    from colossalai.utils import get_current_device

    ranks, is_first = dist.get_world_size(group), _is_first(group)
    if ranks == 1:
        return part[tuple(slice(length) for length in shape)].cpu()
    whole = torch.empty(shape, dtype=part.dtype) if is_first else None
    row_bytes = part[:1].numel() * part.element_size()
    rows = max(max(PIECE_BYTES // ranks, LEAST_PART_BYTES) // max(row_bytes, 1), 1)
    for first in range(0, len(part), rows):
        piece = part[first : first + rows].contiguous().to(get_current_device())
        pieces = [torch.empty_like(piece) for _ in range(ranks)] if is_first else None
        dist.gather(piece, pieces, dst=dist.get_global_rank(group, 0), group=group)
        if whole is None or pieces is None:
            continue
        for rank, found in enumerate(pieces):
            begin = rank * part.shape[dimension] + (first if dimension == 0 else 0)
            length = max(min(found.shape[dimension], shape[dimension] - begin), 0)
            if length > 0:
                rows_of_piece = whole if dimension == 0 else whole[first : first + rows]
                rows_of_piece.narrow(dimension, begin, length).copy_(found.narrow(dimension, 0, length))
    return whole
