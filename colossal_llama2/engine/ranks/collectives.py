"""Exchange values other than tensors between ranks, as JSON, and make all ranks fail if one does.

torch.distributed's own functions for objects pickle them; these do not.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

from colossal_llama2.errors import RunError, UserError, reason


def place() -> tuple[int, int]:
    """This rank and the number of ranks."""
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def place_on_host() -> tuple[int, int]:
    """This rank's number among the ranks on its host, and their number. Called on all ranks."""
    hosts, rank = gather_values(socket.gethostname()), place()[0]
    return hosts[:rank].count(hosts[rank]), hosts.count(hosts[rank])


def gather_values(value: Any, *, device: str | None = None) -> list[Any]:
    """The JSON values of all ranks, in the order of the ranks. Called on all ranks.

    Args:
        device: that the process group exchanges tensors on; by default that of ColossalAI.
    """
    import torch
    import torch.distributed as dist

    if device is None:
        from colossalai.accelerator import get_accelerator

        device = get_accelerator().get_current_device()
    content = torch.frombuffer(bytearray(json.dumps(value).encode() or b" "), dtype=torch.uint8).to(device)
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(content), dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(content)] = content
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [json.loads(bytes(text[: int(size)].cpu().tolist())) for text, size in zip(gathered, sizes, strict=True)]


def max_over_ranks(value: int) -> int:
    """The largest of all ranks' numbers. Called on all ranks."""
    import torch
    import torch.distributed as dist
    from colossalai.accelerator import get_accelerator

    largest = torch.tensor(value, dtype=torch.int64, device=get_accelerator().get_current_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def any_rank(is_so: bool) -> bool:
    """Whether the condition holds on at least one rank. Called on all ranks."""
    return bool(max_over_ranks(int(is_so)))


def first_rank_value(value: Any) -> Any:
    """Rank 0's JSON value. Called on all ranks."""
    return gather_values(value)[0]


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A context that fails on every rank if it fails on one. Called on all ranks.

    Code inside must not wait for other ranks after a point where it can fail.

    Raises:
        UserError, RunError: with the rank that failed, its host and its reason. Any other exception is re-raised
            unchanged on the rank where it happened.
    """
    from safetensors import SafetensorError

    error = None
    try:
        yield
    except Exception as caught:  # a bug of ours must not leave the other ranks waiting either
        error = caught
    kind = "user" if isinstance(error, UserError) else "run"
    reports = gather_values(None if error is None else [kind, socket.gethostname(), reason(error)])
    failed = [(rank, *report) for rank, report in enumerate(reports) if report]
    if error is not None and not isinstance(error, (UserError, RunError, OSError, SafetensorError)):
        raise error
    if failed:
        rank, kind, host, text = failed[0]
        where = f" (rank {rank} on {host})" if len(reports) > 1 and kind == "run" else ""
        raise {"user": UserError, "run": RunError}[kind](f"{text}{where}")
