"""The token after a text, under every plugin: the most likely one, or the logits of some that are compared.

The head of a LLaMA returns these instead of the logits of all positions. It computes the logits of one position per
sample inside the model's forward pass, because Gemini has the weights only there. Ranks that hold parts of the
vocabulary, or of a sample, exchange what they have found.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine.chunked_loss import HeadPart

if TYPE_CHECKING:
    import torch

    # Positions and candidates, see `scoring_head`.
    Asked = tuple[torch.Tensor, torch.Tensor]


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
    with _replaced_head(model, lambda hidden, weight: most_likely(hidden, weight, places(), part, sample_group)):
        yield


@contextlib.contextmanager
def scoring_head(
    model: Any, part: HeadPart, asked: Callable[[], "Asked"], *, sample_group: Any = None
) -> Iterator[None]:
    """A context in which a LLaMA without labels returns, as `logits`, the float32 logits of some next tokens.

    They are (batch, candidates), the same on all ranks of a sample.

    Args:
        asked: called in each forward pass; returns the (batch,) positions of the tokens to continue, in whole samples,
            and the (batch, candidates) ids of the next tokens.
        model, part, sample_group: as in `choosing_head`.
    """
    with _replaced_head(model, lambda hidden, weight: logits_of(hidden, weight, *asked(), part, sample_group)):
        yield


@contextlib.contextmanager
def _replaced_head(model: Any, compute: Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]) -> Iterator[None]:
    """A context in which the head returns what `compute` makes of its hidden states and its weight."""
    head = model.lm_head
    before = vars(head).get("forward")
    # Set on the instance, as the chunked loss does.
    head.forward = lambda hidden: compute(hidden, head.weight)
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

    logits, is_here = _logits_at(hidden, weight[: part.rows], places, sample_group)
    highest, ids = logits.max(dim=1)
    # float64 holds every id exactly.
    best = torch.stack([highest.masked_fill(~is_here, -torch.inf).double(), (ids + part.first_token).double()])
    for group in (part.group, sample_group):
        best = _best_of(best, group)
    return best[1].long()


def logits_of(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    places: "torch.Tensor",
    candidates: "torch.Tensor",
    part: HeadPart,
    sample_group: Any,
) -> "torch.Tensor":
    """The (batch, candidates) float32 logits of these ids at one position of each sample, the same on all ranks.

    Args:
        candidates: (batch, candidates) token ids over the whole vocabulary.
        hidden, weight, places: as in `most_likely`.
    """
    from torch.overrides import handle_torch_function, has_torch_function

    if has_torch_function((hidden, weight)):
        # As in `most_likely`.
        tensors = (hidden, weight)
        return handle_torch_function(logits_of, tensors, *tensors, places, candidates, part, sample_group)
    import torch
    import torch.distributed as dist

    logits, is_here = _logits_at(hidden, weight, places, sample_group)
    rows = candidates - part.first_token
    found = logits.gather(1, rows.clamp(0, len(weight) - 1))
    found = found.masked_fill(~(is_here[:, None] & (rows >= 0) & (rows < part.rows)), -torch.inf)
    for group in (part.group, sample_group):
        if group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found


def _logits_at(
    hidden: "torch.Tensor", weight: "torch.Tensor", places: "torch.Tensor", sample_group: Any
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """The (batch, rows) float32 logits at one position of each sample, and whether that position is on this rank."""
    import torch
    import torch.distributed as dist

    length = hidden.shape[1]
    first = 0 if sample_group is None else dist.get_rank(sample_group) * length
    is_here = (places >= first) & (places < first + length)
    rows = hidden[torch.arange(len(hidden), device=hidden.device), (places - first).clamp(0, length - 1)]
    return (rows @ weight.T).float(), is_here


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
