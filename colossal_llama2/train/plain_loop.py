"""Training without the suite's engine: one process, one document at a time, and only PyTorch itself.

`selftest` compares real training with it, so only the data and the learning rate are shared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

ADAM_BETAS = (0.9, 0.95)
# A document: its token ids, and its labels.
Document = tuple[list[int], list[int]]


@dataclass
class Trace:
    """Loss and gradient norm of every step, and the weights after the last, in float32 on the CPU."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, "torch.Tensor"] = field(default_factory=dict)


def train(
    model: "LlamaForCausalLM",
    steps: Sequence[Sequence[Document]],
    *,
    learning_rate: Callable[[int], float],
    max_norm: float,
    weight_decay: float,
    together: int = 1,
) -> Trace:
    """AdamW over float32 copies of a transformers model's trainable weights, whatever their dtype.

    Args:
        steps: the documents of each optimizer step; its loss is the mean over all predicted tokens of all of them.
        learning_rate: of the step counted from 0.
        max_norm: of the gradient; 0 clips nothing.
        together: documents in one forward pass, padded on the right, which a causal model's tokens do not attend to.
    """
    import torch

    working = [param for param in model.parameters() if param.requires_grad]
    masters = [param.detach().clone().float().requires_grad_() for param in working]
    groups = [
        {"params": [master for master in masters if master.dim() > 1], "weight_decay": weight_decay},
        {"params": [master for master in masters if master.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=ADAM_BETAS, eps=1e-8)
    trace = Trace()
    for step, documents in enumerate(steps):
        predicted = sum(label != IGNORE_INDEX for _, labels in documents for label in labels[1:])
        model.zero_grad()
        loss_sum = 0.0
        for start in range(0, len(documents), together):
            loss = _loss_sum(model, documents[start : start + together]) / predicted
            loss.backward()
            loss_sum += loss.item()
        for master, param in zip(masters, working, strict=True):
            master.grad = param.grad.float()
        norm = _clip([master.grad for master in masters], max_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, working, strict=True):
                param.copy_(master)
        trace.losses.append(loss_sum)
        trace.grad_norms.append(norm)
    trace.weights = {name: param.detach().float().cpu() for name, param in model.named_parameters()}
    return trace


def _clip(gradients: Sequence["torch.Tensor"], max_norm: float) -> float:
    """Scale gradients to a common norm of at most `max_norm`; returns the norm before that.

    torch.nn.utils.clip_grad_norm_ adds up squares in float32, which on a CPU loses 0.2 % of the norm of 32 M numbers.
    """
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm


def _loss_sum(model: "LlamaForCausalLM", documents: Sequence[Document]) -> "torch.Tensor":
    """Sum of the loss over the predicted tokens of some documents, in float32."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value).to(model.device)
        for rows, value in zip(zip(*documents, strict=True), (0, IGNORE_INDEX), strict=True)
    )
    logits = model(ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
