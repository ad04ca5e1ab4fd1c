"""One rank of a test job: gloo_collectives.py against sums and concatenations computed by hand.

torchrun --standalone --nproc_per_node 3 tests/collectives_worker.py
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2.engine.patches import gloo_collectives

SIZE = 1000


def values_of(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The input of a rank; every rank can compute the inputs of the others."""
    return torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(dtype)


def check(group, members, dtype: torch.dtype, *, async_op: bool) -> None:
    """A reduce-scatter and an all-gather, into new tensors and into a part of the input."""
    own = members.index(dist.get_rank())
    count = SIZE * len(members)
    given = [values_of(rank, count, dtype) for rank in members]
    total = given[0].clone()
    for values in given[1:]:
        total += values
    for inside in (False, True):
        source = given[own].clone()
        target = source.view(len(members), -1)[own] if inside else torch.empty(SIZE, dtype=dtype)
        end(dist.reduce_scatter_tensor(target, source, group=group, async_op=async_op), async_op)
        assert torch.equal(target, total.view(len(members), -1)[own])
        whole = torch.zeros(count, dtype=dtype)
        part = whole.view(len(members), -1)[own] if inside else torch.empty(SIZE, dtype=dtype)
        part.copy_(target)
        end(dist.all_gather_into_tensor(whole, part, group=group, async_op=async_op), async_op)
        assert torch.equal(whole, total)


def end(work, async_op: bool) -> None:
    """Wait for a handle, which must exist."""
    assert (work is not None) == async_op
    if async_op:
        assert work.wait() and work.is_completed()
        # It may be called any number of times.
        assert work.wait()


def main() -> None:
    """Check all ranks together, and then only the last two."""
    dist.init_process_group("gloo")
    gloo_collectives.install()
    everybody, pair = list(range(dist.get_world_size())), [1, 2]
    pair_group = dist.new_group(pair)
    for dtype in (torch.float32, torch.bfloat16):
        for async_op in (False, True):
            check(None, everybody, dtype, async_op=async_op)
            if dist.get_rank() in pair:
                check(pair_group, pair, dtype, async_op=async_op)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
