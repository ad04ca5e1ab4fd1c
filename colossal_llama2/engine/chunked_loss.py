"""The output head and its cross-entropy in one function, which never holds the logits of the whole vocabulary.

Logits of 4,096 tokens over 69,104 pieces are 1.1 GB in float32, and a cross-entropy holds several such matrices. Here
the logits are computed for one block of the vocabulary at a time. Forward adds each block to each token's sum of
exponentials, and keeps only these sums and the exponentials of the first few blocks. Backward recomputes the other
blocks. From each block it computes the gradient of the weight's rows of that block, and adds to the gradient of the
hidden states, in float32.

The method is that of Wijmans et al., "Cut your losses in large-vocabulary language models" (arXiv 2411.09009).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

# The versions of liger-kernel that take the arguments that `_liger_sum` passes.
LIGER_VERSION = "0.8."


@dataclass(frozen=True)
class Blocks:
    """How many logits are computed and kept at a time.

    Attributes:
        logits: number of logits in a block, unless `min_rows` gives more.
        min_rows: fewest rows of the weight in a block. With fewer, adding up the hidden states' gradient would take
            more time than the products.
        kept: number of logits whose exponentials are kept for backward, which then does not recompute them; all of
            them if there are no more.
    """

    logits: int
    min_rows: int = 512
    kept: int = 2**23

    def rows(self, tokens: int) -> int:
        """Rows of the vocabulary in a block, for this number of tokens."""
        return max(self.logits // max(tokens, 1), self.min_rows)


# By type of device. On a CPU, 4 MiB in float32 stay in the caches from one operation to the next. A GPU's kernels are
# fast on large matrices: 32 MiB.
BLOCKS = {"cpu": Blocks(2**20), "cuda": Blocks(2**23)}


@dataclass(frozen=True)
class HeadPart:
    """The part of the output head on this rank, and how its loss is computed.

    Attributes:
        first_token: the token id of the weight's first row.
        rows: number of rows that are tokens; the rest pads the vocabulary.
        group: process group whose ranks hold the other parts; None if the head is not split.
        trained: [begin, end) ranges of token ids; the gradient of all other rows is zero. None: all are trained.
        blocks: sizes of blocks; None for those of the device.
    """

    first_token: int
    rows: int
    group: Any = None
    trained: tuple[tuple[int, int], ...] | None = None
    blocks: Blocks | None = None

    def blocks_on(self, device: "torch.device") -> Blocks:
        """The block sizes on this device."""
        return self.blocks or BLOCKS[device.type]

    def trained_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The [begin, end) ranges of trained rows among the weight's rows `start` to `stop` - 1."""
        if self.trained is None:
            return [(start, stop)]
        here = [(begin - self.first_token, end - self.first_token) for begin, end in self.trained]
        return [(max(begin, start), min(end, stop)) for begin, end in here if begin < stop and end > start]


def chunked_cross_entropy(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    targets: "torch.Tensor",
    part: HeadPart,
    record: Callable[["torch.Tensor"], None] | None = None,
) -> "torch.Tensor":
    """Sum over all tokens of the loss of `hidden @ weight.T`, in float32, as a scalar.

    Args:
        hidden: (tokens, width) hidden states; the same on all ranks of `part.group`.
        weight: (rows or more, width) rows of the head.
        targets: (tokens,) token ids over the whole vocabulary; a token whose target is IGNORE_INDEX has no loss.
        record: called in the forward pass with the (tokens,) float32 loss of each token, 0 where there is no target;
            not called with Liger's kernel, which does not return such losses.
    """
    from torch.overrides import handle_torch_function, has_torch_function

    if has_torch_function((hidden, weight)):
        # Gemini's parameters are sharded. It gathers them around each call that it treats as one PyTorch operation.
        return handle_torch_function(chunked_cross_entropy, (hidden, weight), hidden, weight, targets, part, record)
    is_whole = part.group is None and part.trained is None and part.rows == len(weight)
    if is_whole and uses_liger(hidden.device, hidden.dtype):
        return _liger_sum(hidden, weight, targets)
    return _chunked_function().apply(hidden, weight, targets, part, record)


def has_liger() -> bool:
    """Whether there is a GPU and a supported version of liger-kernel. Does not import liger-kernel."""
    from importlib import metadata

    import torch

    try:
        return torch.cuda.is_available() and metadata.version("liger-kernel").startswith(LIGER_VERSION)
    except metadata.PackageNotFoundError:
        return False


def uses_liger(device: "torch.device", dtype: "torch.dtype") -> bool:
    """Whether a head that is not split uses Liger's kernel for hidden states of this device and dtype."""
    import torch

    # Liger computes gradients in forward, before the loss is scaled: small ones would underflow in fp16.
    return device.type == "cuda" and dtype is torch.bfloat16 and has_liger()


def _liger_sum(hidden: "torch.Tensor", weight: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    import torch
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32)
    return loss(weight, hidden, targets)


@functools.lru_cache(maxsize=1)
def _chunked_function() -> type["torch.autograd.Function"]:
    """The autograd.Function, defined on the first call, since the module does not import torch."""
    import torch

    class ChunkedCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: torch.Tensor,
            weight: torch.Tensor,
            targets: torch.Tensor,
            part: HeadPart,
            record: Callable[[torch.Tensor], None] | None,
        ) -> torch.Tensor:
            ctx.part, ctx.kept = part, []
            room = part.blocks_on(hidden.device).kept if any(ctx.needs_input_grad) else 0
            highest, total, target_logits = _softmax_sums(hidden, weight, targets, part, kept=ctx.kept, room=room)
            ctx.save_for_backward(hidden, weight, targets, highest, total)
            losses = torch.where(targets == IGNORE_INDEX, 0.0, total.log().float() + (highest - target_logits))
            if record is not None:
                record(losses)
            return losses.sum()

        @staticmethod
        def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            # Gemini's tensors replace in-place operations by others, which would be lost.
            with torch._C.DisableTorchFunctionSubclass():
                grad_hidden, grad_weight = _gradients(
                    ctx.saved_tensors, ctx.part, grad_loss, needed=ctx.needs_input_grad[:2], kept=ctx.kept
                )
                return grad_hidden, grad_weight, None, None, None

    return ChunkedCrossEntropy


def _softmax_sums(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    targets: "torch.Tensor",
    part: HeadPart,
    *,
    kept: list[tuple["torch.Tensor", "torch.Tensor"]],
    room: int,
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """For each token: the highest logit, the sum of exponentials relative to it (float64), and the target's logit or 0.

    The exponentials of the first blocks, up to `room` logits, relative to the highest logit of the block, are added to
    `kept`. The sum is one number per token, so float64 costs nothing. A rounding error in it, as in a log-sum-exp in
    lower precision, would make all probabilities of the token too large or too small.
    """
    import torch
    import torch.distributed as dist

    highest = hidden.new_full(targets.shape, -torch.inf, dtype=torch.float32)
    total, target_logits = torch.zeros_like(highest, dtype=torch.float64), torch.zeros_like(highest)
    for rows, places, is_here in _blocks(targets, part):
        logits = (hidden @ weight[rows].T).float()
        target_logits += torch.where(is_here, logits.gather(1, places[:, None])[:, 0], 0.0)
        block_highest = logits.amax(1)
        exponentials = logits.sub_(block_highest[:, None]).exp_()
        before, highest = highest, torch.maximum(highest, block_highest)
        total = total * _exp_of(before, highest) + exponentials.sum(1) * _exp_of(block_highest, highest)
        room -= exponentials.numel()
        if room >= 0:
            kept.append((exponentials, block_highest))
        del logits, exponentials
    if part.group is not None:
        before, highest = highest, highest.clone()
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=part.group)
        sums = torch.stack([total * _exp_of(before, highest), target_logits.double()])
        dist.all_reduce(sums, group=part.group)
        total, target_logits = sums[0], sums[1].float()
    return highest, total, target_logits


def _exp_of(logits: "torch.Tensor", highest: "torch.Tensor") -> "torch.Tensor":
    """The exponential of the difference, in float64. It is 0 for a logit of -inf, which means that there are none."""
    return (logits.double() - highest).exp_()


def _gradients(
    saved: Sequence["torch.Tensor"],
    part: HeadPart,
    grad_loss: "torch.Tensor",
    *,
    needed: Sequence[bool],
    kept: list[tuple["torch.Tensor", "torch.Tensor"]],
) -> tuple["torch.Tensor | None", "torch.Tensor | None"]:
    """Gradients of hidden states and weight, where needed, by what forward saved. Empties `kept`."""
    import torch
    import torch.distributed as dist

    hidden, weight, targets, highest, total = saved
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
    grad_weight = None
    if needed[1]:
        # The gradient of rows that are not trained stays zero.
        grad_weight = torch.empty_like(weight) if part.trained is None else torch.zeros_like(weight)
        grad_weight[part.rows :] = 0.0
    factor = torch.where(targets == IGNORE_INDEX, 0.0, grad_loss.float())
    for rows, places, is_here in _blocks(targets, part):
        block = weight[rows]
        if kept:
            exponentials, block_highest = kept.pop(0)
            scale = _exp_of(block_highest, highest).div_(total)
        else:
            exponentials = (hidden @ block.T).float().sub_(highest[:, None]).exp_()
            scale = total.reciprocal()
        # The probabilities, less 1 at the target, are the gradient of the logits.
        slopes = exponentials.mul_(scale.mul_(factor).float()[:, None])
        slopes.scatter_add_(1, places[:, None], (is_here * -factor)[:, None])
        slopes = slopes.to(weight.dtype)
        if grad_hidden is not None:
            grad_hidden += slopes @ block
        if grad_weight is not None:
            for begin, end in part.trained_in(rows.start, rows.stop):
                torch.mm(slopes[:, begin - rows.start : end - rows.start].T, hidden, out=grad_weight[begin:end])
        del exponentials, slopes
    if grad_hidden is not None:
        if part.group is not None:
            dist.all_reduce(grad_hidden, group=part.group)
        grad_hidden = grad_hidden.to(hidden.dtype)
    return grad_hidden, grad_weight


def _blocks(targets: "torch.Tensor", part: HeadPart) -> Iterator[tuple[slice, "torch.Tensor", "torch.Tensor"]]:
    """Yield for each block: its slice of rows, the (tokens,) targets as rows of it, and whether they are in it."""
    size = part.blocks_on(targets.device).rows(len(targets))
    for start in range(0, part.rows, size):
        stop = min(start + size, part.rows)
        places = targets - (part.first_token + start)
        is_here = (places >= 0) & (places < stop - start)
        yield slice(start, stop), places.clamp(0, stop - start - 1), is_here


def use_chunked_loss(
    model: Any, part: HeadPart, *, sample_group: Any = None, record: Callable[..., None] | None = None
) -> None:
    """Make a LLaMA compute its loss without logits.

    It no longer returns logits. Without labels, it returns what its head returns in their place: the hidden states,
    or what the heads of `next_tokens` return.

    Args:
        model: a LlamaForCausalLM on this rank, or the last stage of one; its `model` and `lm_head` may be sharded.
        part: this rank's part of the head.
        sample_group: process group whose ranks each have an equal part of every sample's hidden states at the head,
            and whose gradients are averaged; None if samples are not split.
        record: called in each forward pass with the (tokens,) losses of `chunked_cross_entropy`, and with the keyword
            `share`, (rank, ranks) in `sample_group`: the part of each sample's length that these tokens are.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    forward_to_logits = model.forward

    def forward_to_loss(labels: "torch.Tensor | None" = None, **inputs: Any) -> CausalLMOutputWithPast:
        """The mean loss over the predicted tokens, 0 if there are none."""
        hidden = forward_to_logits(**inputs).logits
        if labels is None:
            return CausalLMOutputWithPast(logits=hidden)
        loss = _mean_loss(hidden, model.lm_head.weight, labels, part, sample_group, record)
        return CausalLMOutputWithPast(loss=loss)

    # Set on the instances, as ColossalAI does, since plugins look up the model by its class.
    model.forward = forward_to_loss
    model.lm_head.forward = lambda hidden: hidden


def _mean_loss(
    hidden: "torch.Tensor",
    weight: "torch.Tensor",
    labels: "torch.Tensor",
    part: HeadPart,
    sample_group: Any,
    record: Callable[..., None] | None,
) -> "torch.Tensor":
    """The mean loss for (batch, length) labels, from hidden states of that length or of this rank's part of it."""
    import torch
    import torch.distributed as dist

    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    predicted = (targets != IGNORE_INDEX).sum().clamp(min=1)
    if sample_group is None:
        return chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), part, record) / predicted
    rank, size = dist.get_rank(sample_group), dist.get_world_size(sample_group)
    targets = targets.chunk(size, dim=1)[rank]
    record_share = None if record is None else functools.partial(record, share=(rank, size))
    own = chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten(), part, record_share)
    total = own.detach().clone()
    dist.all_reduce(total, group=sample_group)
    # The value is the sum over ranks. The gradient is that of this rank's part, times `size` to undo the averaging.
    return (total + (own - own.detach()) * size) / predicted
