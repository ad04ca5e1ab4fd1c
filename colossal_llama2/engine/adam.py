"""The optimizer: HybridAdam over a model's trainable parameters, and an Adam that makes no update from a NaN or Inf."""

import math
import socket
import weakref
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.engine.patches import adam_kernels
from colossal_llama2.engine.ranks.collectives import gather_values
from colossal_llama2.errors import UserError

if TYPE_CHECKING:
    import torch

BETAS = (0.9, 0.95)


def make_adam(model: "torch.nn.Module", *, learning_rate: float, weight_decay: float) -> "torch.optim.Optimizer":
    """HybridAdam over the trainable parameters of a model.

    Raises:
        UserError: no parameter is trainable.
    """
    from colossalai.nn.optimizer import HybridAdam

    optimizer = HybridAdam(parameter_groups(model, weight_decay), lr=learning_rate, betas=BETAS, adamw_mode=True)
    _use_the_same_kernels(optimizer)
    return optimizer


def _use_the_same_kernels(adam: "torch.optim.Optimizer") -> None:
    """If a rank could not compile ColossalAI's kernels, use PyTorch's on all ranks.

    They round differently. Ranks that hold the same weights would drift apart.
    """
    hosts = gather_values(socket.gethostname() if adam_kernels.is_replaced(adam) else "")
    if not any(hosts):
        return
    if not all(hosts):
        logs.get_logger().warning(
            "PyTorch's fused Adam is used on all ranks, since ColossalAI's cannot be compiled on %s",
            ", ".join(sorted(set(filter(None, hosts)))),
        )
    adam_kernels.replace(adam)


def parameter_groups(model: "torch.nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms, which do not."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    if not trainable:
        raise UserError("no parameter of the model is trainable")
    groups = [
        {"params": [param for param in trainable if param.dim() > 1], "weight_decay": weight_decay},
        {"params": [param for param in trainable if param.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def begin_moments(adam: "torch.optim.Optimizer", *, without_gradient: bool = False) -> None:
    """Set Adam's moments to their values before the first update; without them no optimizer can be saved."""
    import torch

    for param in (param for group in adam.param_groups for param in group["params"]):
        if (param.grad is not None or without_gradient) and not adam.state[param]:
            moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[param].update(step=0, **moments)


def guard_updates(optimizer: Any) -> None:
    """Make Adam skip its update where `optimizer.optim.may_update` is False or the gradient norm is NaN or Inf.

    The plugin around it runs its complete step in any case, since it has to release the gradients: Gemini's are in the
    memory of its weights. All ranks have the same norm, so either all of them update or none.
    """
    # Weak, since a reference cycle would keep the plugin's process groups until Python collects cycles, which each rank
    # does at a different moment. Closing the groups is collective, so all ranks must do it at the same moment.
    adam_reference, wrapper_reference = weakref.ref(optimizer.optim), weakref.ref(optimizer)

    def update_if_finite(*args: Any, **kwargs: Any) -> None:
        adam, wrapper = adam_reference(), wrapper_reference()
        assert adam is not None and wrapper is not None, "the wrapper calls this, and it holds both"
        norm = wrapper._current_grad_norm
        if adam.may_update and (norm is None or math.isfinite(norm)):
            type(adam).step(adam, *args, **kwargs)
        else:
            begin_moments(adam)

    optimizer.optim.step = update_if_finite
