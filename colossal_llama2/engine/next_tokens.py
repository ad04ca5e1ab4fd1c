"""The most likely token after a text, under every plugin: the head of a LLaMA returns token ids instead of logits.

The logits of one position per sample are computed inside the model's forward pass, because Gemini has the weights only
there. Ranks that hold parts of the vocabulary, or of a sample, compare their best tokens.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine.chunked_loss import HeadPart

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def choosing_head(
    model: Any, part: HeadPart, places: Callable[[], "torch.Tensor"], *, sample_group: Any = None
) -> Iterator[None]:
    """A context in which a LLaMA without labels returns, as `logits`, the (batch,) ids of the most likely next tokens.

    Args:
        model: a LlamaForCausalLM on this rank, or the last stage of one.
        part: this rank's part of the head.
        places: called in each forward pass; returns the (batch,) positions of the tokens to continue, in whole samples.
        sample_group: process group whose ranks each have an equal part of every sample's hidden states at the head;
            None if samples are not split.
    """
    head = model.lm_head
    before = vars(head).get("forward")

    def choose(hidden: "torch.Tensor") -> "torch.Tensor":
        return most_likely(hidden, head.weight, places(), part, sample_group)

    # Set on the instance, as the chunked loss does.
    head.forward = choose
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def most_likely(
    hidden: "torch.Tensor", weight: "torch.Tensor", places: "torch.Tensor", part: HeadPart, sample_group: Any
) -> "torch.Tensor":
    """The (batch,) ids of the tokens with the highest logit at one position of each sample, the same on all ranks.

    Args:
        hidden: (batch, length, width) hidden states; with a `sample_group`, this rank's part of the length.
        weight: (rows or more, width) rows of the head.
        places: (batch,) positions in whole samples.
    """
    from torch.overrides import handle_torch_function, has_torch_function

    if has_torch_function((hidden, weight)):
        # Gemini gathers its parameters around each call that it treats as one PyTorch operation.
        return handle_torch_function(most_likely, (hidden, weight), hidden, weight, places, part, sample_group)
    import torch
    import torch.distributed as dist

    length = hidden.shape[1]
    first = 0 if sample_group is None else dist.get_rank(sample_group) * length
    is_here = (places >= first) & (places < first + length)
    rows = hidden[torch.arange(len(hidden), device=hidden.device), (places - first).clamp(0, length - 1)]
    logits = (rows @ weight[: part.rows].T).float()
    highest, ids = logits.max(dim=1)
    # float64 holds every id exactly.
    best = torch.stack([highest.masked_fill(~is_here, -torch.inf).double(), (ids + part.first_token).double()])
    for group in (part.group, sample_group):
        best = _best_of(best, group)
    return best[1].long()


def _best_of(best: "torch.Tensor", group: Any) -> "torch.Tensor":
    """Of the (2, batch) highest logits and their ids of each rank in a group, the higher ones."""
    import torch
    import torch.distributed as dist

    if group is None:
        return best
    parts = [torch.empty_like(best) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, best.contiguous(), group=group)
    stacked = torch.stack(parts)
    winner = stacked[:, 0].argmax(dim=0)
    return stacked[winner, :, torch.arange(best.shape[1], device=best.device)].T
