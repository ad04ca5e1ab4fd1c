"""The ranks of a launched evaluation: they compute batches by turns, and rank 0 gets the records of all."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from colossal_llama2 import launcher
from colossal_llama2.engine.ranks.collectives import gather_values
from colossal_llama2.engine.ranks.meeting import settled_place

# A rank may load a model from a slow disk, or compute a long batch, while the others wait.
TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Within it, the ranks of the launcher are connected, through gloo; a single process needs no connection.

    Raises:
        LaunchError: the launcher's variables contradict each other.
    """
    here = settled_place()
    if here.world_size == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=here.rank, world_size=here.world_size, timeout=TIMEOUT)
    yield
    dist.barrier()
    dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """The JSON values of all ranks. Called on all ranks."""
    return [value] if launcher.place().world_size == 1 else gather_values(value, device="cpu")


def own_device(device: str | None) -> str | None:
    """The device of this rank: with several ranks on GPUs, each its own, unless --device names one."""
    here = launcher.place()
    if device is not None or here.world_size == 1:
        return device
    import torch

    return f"cuda:{here.local_rank}" if torch.cuda.is_available() else "cpu"
