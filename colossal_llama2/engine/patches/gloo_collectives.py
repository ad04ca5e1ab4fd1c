"""Collectives that ColossalAI calls and gloo lacks or does slowly; see engine/patches/cpu_device.py.

Calls on other backends are passed through unchanged.
"""

from colossal_llama2.engine.patches import patching

# Message tags, so that two exchanges under way at a time do not receive each other's messages.
SUM_TAG, GATHER_TAG = 1, 2


def install() -> None:
    """Replace PyTorch's collectives by those below. May be called again.

    Raises:
        UserError: the patches do not support the installed version of PyTorch.
    """
    _supply_list_forms()
    _shorten_tensor_forms()


def _supply_list_forms() -> None:
    """Give gloo the list forms of reduce_scatter and all_to_all, which sequence parallelism calls.

    In PyTorch 2.5 gloo has only the forms for a single tensor. It ends the process if shapes differ, so it is given
    flat tensors.
    """
    import torch
    import torch.distributed as dist

    def flat_reduce_scatter(reduce_scatter):
        def scatter(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False):
            if dist.get_backend(group) != "gloo":
                return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
            flat = torch.empty(output.numel(), dtype=output.dtype)
            dist.reduce_scatter_tensor(flat, torch.cat([part.reshape(-1) for part in input_list]), op=op, group=group)
            output.copy_(flat.view_as(output))
            return _ended(_Works(), async_op)

        return scatter

    def flat_all_to_all(all_to_all):
        def exchange(output_list, input_list, group=None, async_op=False):
            if dist.get_backend(group) != "gloo":
                return all_to_all(output_list, input_list, group=group, async_op=async_op)
            sent, received = ([part.numel() for part in parts] for parts in (input_list, output_list))
            flat = torch.empty(sum(received), dtype=output_list[0].dtype)
            inputs = torch.cat([part.reshape(-1) for part in input_list])
            dist.all_to_all_single(flat, inputs, received, sent, group=group)
            for part, values in zip(output_list, flat.split(received), strict=True):
                part.copy_(values.view_as(part))
            return _ended(_Works(), async_op)

        return exchange

    patching.install("torch.distributed:reduce_scatter", flat_reduce_scatter)
    patching.install("torch.distributed:all_to_all", flat_all_to_all)


def _shorten_tensor_forms() -> None:
    """Let gloo reduce-scatter and all-gather a tensor with one message for each pair of ranks, for ZeRO and Gemini.

    Its own reduce_scatter computes the whole sum on every rank and keeps a part, and its all_gather passes everything
    around a ring (benchmarks/bench_collectives.py).
    """
    import torch
    import torch.distributed as dist

    def summing_scatter(reduce_scatter):
        def summed_scatter(output, input, op=dist.ReduceOp.SUM, group=None, async_op=False):
            if dist.get_backend(group) != "gloo" or op != dist.ReduceOp.SUM:
                return reduce_scatter(output, input, op=op, group=group, async_op=async_op)
            size, own = dist.get_world_size(group), dist.get_rank(group)
            sent = input.contiguous().view(size, -1)
            # In the order of the ranks, so that all ranks add in the same order.
            parts = [sent[rank] if rank == own else torch.empty_like(sent[rank]) for rank in range(size)]
            # Wait for the messages even if the caller does not: the sent tensor may be freed when this returns.
            _Works(_messages(group, sent, parts, tag=SUM_TAG)).wait()
            total = parts[0] + parts[1] if size > 1 else parts[0]
            for part in parts[2:]:
                total += part
            output.copy_(total.view_as(output))
            return _ended(_Works(), async_op)

        return summed_scatter

    def exchanging_gather(all_gather):
        def exchanged_gather(output_tensor, input_tensor, group=None, async_op=False):
            size, own = dist.get_world_size(group), dist.get_rank(group)
            fits = output_tensor.is_contiguous() and output_tensor.numel() == size * input_tensor.numel()
            if dist.get_backend(group) != "gloo" or not fits:
                return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
            sent, parts = input_tensor.contiguous().view(-1), output_tensor.view(size, -1)
            works = _messages(group, [sent] * size, parts, tag=GATHER_TAG)
            if sent.data_ptr() != parts[own].data_ptr():
                parts[own].copy_(sent)
            return _ended(_Works(works), async_op)

        return exchanged_gather

    patching.install("torch.distributed:reduce_scatter_tensor", summing_scatter)
    patching.install("torch.distributed:all_gather_into_tensor", exchanging_gather)


class _Works:
    """The handle of messages under way, which keep their tensors alive. With no messages, it is already complete."""

    def __init__(self, works=()):
        self._works = list(works)

    def wait(self, *args) -> bool:
        works, self._works = self._works, []
        for work in works:
            # A second wait for a message that has arrived would never return.
            work.wait()
        return True

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def _messages(group, sent, received, *, tag: int) -> list:
    """Send `sent[rank]` to the other ranks of a group, and write what they send into `received[rank]`.

    They use the tensors' own memory, while gloo's collectives for whole tensors make copies.
    """
    import torch.distributed as dist

    works = []
    for rank in range(dist.get_world_size(group)):
        if rank != dist.get_rank(group):
            partner = rank if group is None else dist.get_global_rank(group, rank)
            works.append(dist.isend(sent[rank], partner, group=group, tag=tag))
            works.append(dist.irecv(received[rank], partner, group=group, tag=tag))
    return works


def _ended(works: _Works, async_op: bool) -> _Works | None:
    """What a collective returns: its handle if it is asynchronous; otherwise None, after waiting for it."""
    if async_op:
        return works
    works.wait()
    return None
