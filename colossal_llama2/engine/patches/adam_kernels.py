"""PyTorch's fused Adam in the interfaces of ColossalAI's Adam kernels.

On a machine with a GPU, ColossalAI compiles both kernels at the first start, which needs nvcc of PyTorch's CUDA version
and a C++ compiler; images that only run programs have neither. Where that fails, PyTorch's fused kernels compute the
same update. Without a GPU, FusedCpuAdam is always used (cpu_device.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.engine.patches import patching
from colossal_llama2.terminal_text import one_line

if TYPE_CHECKING:
    import torch

LOADERS = "colossalai.kernel.kernel_loader"
# The fused kernels always correct the bias of the moments; at a high step number the correction is 1.
NO_CORRECTION_STEP = 1e9


def install() -> None:
    """Let ColossalAI's loaders of Adam kernels fall back on PyTorch's. May be called again.

    Raises:
        UserError: the patches do not support the installed version of ColossalAI.
    """
    for loader, kernels in (("CPUAdamLoader", CpuKernels), ("FusedOptimizerLoader", GpuKernels)):
        patching.install(f"{LOADERS}:{loader}.load", functools.partial(_or_pytorch, kernels))


def _or_pytorch(kernels: Any, load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_or_replace(self: Any, ext_name: str | None = None) -> Any:
        try:
            return load(self, ext_name)
        except Exception as error:
            # ColossalAI checks by assert and by raising Exception; ninja, nvcc and compilers fail in many more ways.
            reason = one_line(str(error)) or type(error).__name__
            logs.get_logger().warning(
                "PyTorch's fused Adam is used, since ColossalAI's kernel of %s cannot be compiled here: %s",
                type(self).__name__.removesuffix("Loader"),
                reason if len(reason) <= 300 else f"{reason[:297]}...",
            )
            return kernels

    return load_or_replace


class FusedCpuAdam:
    """The interface of ColossalAI's csrc/kernel/x86/cpu_adam.cpp, implemented by PyTorch's fused CPU Adam."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
    ) -> None:
        self._adamw_mode = adamw_mode

    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        param: "torch.Tensor",
        grad: "torch.Tensor",
        exp_avg: "torch.Tensor",
        exp_avg_sq: "torch.Tensor",
        div_scale: float,
    ) -> None:
        """Update `param` and both moments in place; `grad` is divided by `div_scale` if that is positive."""
        multi_tensor_adam(
            0,
            None,
            [[grad], [param], [exp_avg], [exp_avg_sq]],
            lr,
            beta1,
            beta2,
            eps,
            step,
            int(self._adamw_mode),
            int(bias_correction),
            weight_decay,
            div_scale,
        )


def multi_tensor_adam(
    chunk_size: int,
    overflow: "torch.Tensor | None",
    tensors: "Sequence[list[torch.Tensor]]",
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    div_scale: float,
) -> None:
    """The interface of ColossalAI's csrc/kernel/cuda/multi_tensor_adam_kernel.cu, by PyTorch's fused Adam.

    Args:
        chunk_size, overflow: for launching the original, and not used by it either.
        tensors: gradients, parameters, first and second moments. A parameter and its moments, which are updated in
            place, have the same type; its gradient may have another one. Gradients do not change.
        mode: 1 for decoupled weight decay (AdamW), 0 for L2.
        div_scale: divides the gradients if it is positive.
    """
    import torch

    # Made on the device: a copy from the host would wait for it.
    steps = torch.full((), float(step) if bias_correction else NO_CORRECTION_STEP, device=tensors[0][0].device)

    def update(rows: "Sequence[tuple[torch.Tensor, ...]]") -> None:
        grads, params, firsts, seconds = (list(column) for column in zip(*rows, strict=True))
        kernel = torch._fused_adamw_ if mode == 1 else torch._fused_adam_
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
        kernel(params, grads, firsts, seconds, [], [steps] * len(params), amsgrad=False, maximize=False, **settings)

    at_once: dict[torch.dtype, list[tuple[torch.Tensor, ...]]] = {}
    for row in zip(*tensors, strict=True):
        grad, param = row[:2]
        if div_scale <= 0 and grad.dtype == param.dtype:
            at_once.setdefault(param.dtype, []).append(row)
        else:
            # One at a time: each is a copy of its gradient.
            grad = grad.float() / div_scale if div_scale > 0 else grad
            update([(grad.to(param.dtype), *row[1:])])
    for rows in at_once.values():
        update(rows)


def is_replaced(adam: Any) -> bool:
    """Whether a HybridAdam has one of the kernels of this file."""
    on_gpu = getattr(adam, "gpu_adam_op", None)
    return isinstance(adam.cpu_adam_op, FusedCpuAdam) or on_gpu is multi_tensor_adam


def replace(adam: Any) -> None:
    """Give a HybridAdam the kernels of this file."""
    settings = adam.defaults
    beta1, beta2 = settings["betas"]
    adam.cpu_adam_op = FusedCpuAdam(
        settings["lr"], beta1, beta2, settings["eps"], settings["weight_decay"], adam.adamw_mode
    )
    if hasattr(adam, "gpu_adam_op"):
        adam.gpu_adam_op = multi_tensor_adam


class CpuKernels:
    """What CPUAdamLoader loads."""

    CPUAdamOptimizer = FusedCpuAdam


class GpuKernels:
    """What FusedOptimizerLoader loads, as far as HybridAdam uses it."""

    multi_tensor_adam = staticmethod(multi_tensor_adam)
