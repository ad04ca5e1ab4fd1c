"""One call for all parameters, where an optimizer step of ColossalAI loops over them.

norms     zero2, 3d, ddp    the gradient norm: four operations for each parameter
factor    zero2, 3d, ddp    clipping: one for each parameter; with ddp three, since its factor is a tensor there
write     zero2, 3d         copying gathered weights into the model: two for each parameter

On a GPU, PyTorch's `_foreach` functions start one kernel for many small tensors; a large matrix takes several. On a CPU
they compute the same in a loop. Values are those of ColossalAI; the sum over parameters, in float64, is rounded in
another order.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from colossal_llama2.engine.patches import patching

ZERO = "colossalai.zero.low_level.low_level_optim:LowLevelZeroOptimizer"
HYBRID = "colossalai.booster.plugin.hybrid_parallel_plugin:HybridParallel"
MIXED = "colossalai.amp.naive_amp.mixed_precision_optimizer:MixedPrecisionOptimizer"
BUCKET = "colossalai.zero.low_level.bookkeeping.tensor_bucket:TensorBucket"


def install() -> None:
    """Replace the loops. May be called again.

    Raises:
        UserError: the patches do not support the installed version of ColossalAI.
    """
    patching.install(f"{ZERO}._compute_grad_norm", _norm_of_gradients)
    patching.install(f"{HYBRID}ZeroOptimizer._compute_grad_norm", _norm_of_gradients)
    for name in (f"{HYBRID}NaiveOptimizer", f"{HYBRID}AMPOptimizer", MIXED):
        patching.install(f"{name}._compute_grad_norm", _norm_of_pairs)
    patching.install(f"{ZERO}._unscale_and_clip_grads", _scaling_list)
    patching.install(f"{MIXED}._unscale_and_clip_grads", _scaling_groups)
    patching.install(f"{HYBRID}NaiveOptimizer._clip_grad_norm", _clipping_groups)
    patching.install(f"{BUCKET}.all_gather", _writing_at_once)


def _shares_layers(optimizer: Any) -> bool:
    """Whether some gradients are counted in part, since other ranks hold the same parameters."""
    import torch.distributed as dist

    groups = (getattr(optimizer, name, None) for name in ("tp_pg", "pp_pg"))
    return any(group is not None and dist.get_world_size(group) > 1 for group in groups)


def _norms(gradients: list[Any]) -> Any:
    """(gradients,) float64 norms, whose norm is that of all gradients together."""
    import torch

    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))


def _norm_of_gradients(compute: Callable[..., float]) -> Callable[..., float]:
    @functools.wraps(compute)
    def compute_at_once(self: Any, dp_pg: Any, gradients: list[Any], norm_type: int = 2) -> float:
        if not gradients or norm_type != 2 or _shares_layers(self):
            return compute(self, dp_pg, gradients, norm_type)
        return compute(self, dp_pg, [_norms(gradients)], norm_type)

    return compute_at_once


def _norm_of_pairs(compute: Callable[..., Any]) -> Callable[..., float]:
    @functools.wraps(compute)
    def compute_at_once(self: Any, param_gradient_pairs: list[tuple[Any, Any]], norm_type: int = 2) -> float:
        pairs = param_gradient_pairs
        if pairs and norm_type == 2 and not _shares_layers(self):
            pairs = [(None, _norms([gradient for _, gradient in pairs]))]
        # A number on the host: from MixedPrecisionOptimizer it would be a tensor, and so would be the clipping factor.
        return float(compute(self, pairs, norm_type))

    return compute_at_once


class _Factor:
    """In place of a gradient: records the factor by which it is multiplied."""

    value = 1.0

    @property
    def data(self) -> "_Factor":
        return self

    def mul_(self, value: float) -> None:
        self.value = value


def _scale(gradients: list[Any], factor: float) -> None:
    import torch

    if gradients:
        torch._foreach_mul_(gradients, factor)


def _scaling_list(unscale: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(unscale)
    def scale_at_once(self: Any, grad_groups_flat: list[Any], total_norm: float) -> None:
        factor = _Factor()
        unscale(self, [factor], total_norm)
        _scale(grad_groups_flat, factor.value)

    return scale_at_once


def _scaling_groups(unscale: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(unscale)
    def scale_at_once(self: Any, total_norm: float) -> None:
        factor = _Factor()
        stand_in = SimpleNamespace(
            mixed_precision=self.mixed_precision, max_norm=self.max_norm, param_groups=_groups_of(factor)
        )
        unscale(stand_in, total_norm)
        _scale(_gradients_of(self.param_groups), factor.value)

    return scale_at_once


def _clipping_groups(clip: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(clip)
    def clip_at_once(self: Any, total_norm: float) -> None:
        factor = _Factor()
        optim = SimpleNamespace(param_groups=_groups_of(factor))
        clip(SimpleNamespace(max_norm=self.max_norm, optim=optim), total_norm)
        # The factor is a tensor on the host, of float32.
        _scale(_gradients_of(self.optim.param_groups), float(factor.value))

    return clip_at_once


def _groups_of(gradient: _Factor) -> list[dict[str, Any]]:
    """Parameter groups with one parameter, whose gradient records the factor."""
    return [{"params": [SimpleNamespace(grad=gradient)]}]


def _gradients_of(groups: list[dict[str, Any]]) -> list[Any]:
    return [param.grad for group in groups for param in group["params"] if param.grad is not None]


def _without_padding(shard: Any, part: Any) -> Any:
    """As many elements of a shard as a part has. Most have as many, and a slice takes the host longer than a copy.

    Padding fills up the last shard, or several of a parameter with fewer elements than ranks.
    """
    return shard if shard.numel() == part.numel() else shard[: part.numel()]


def _writing_at_once(all_gather: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(all_gather)
    def gather_and_write(self: Any, group: Any = None, fp8_communication: bool = False) -> None:
        import torch
        import torch.distributed as dist

        pairs = [(shard, self._write_back_pairs[shard]) for shard in self._bucket]
        if fp8_communication or isinstance(group, tuple) or not all(whole.is_contiguous() for _, whole in pairs):
            all_gather(self, group, fp8_communication)
            return
        own = self.flatten()
        gathered = own.new_empty(dist.get_world_size(group), own.numel())
        dist.all_gather_into_tensor(gathered.view(-1), own, group=group)
        # Each rank's row has a shard of every parameter.
        rows = [row.split([shard.numel() for shard, _ in pairs]) for row in gathered.unbind()]
        targets: list[Any] = []
        sources: list[Any] = []
        for (shard, whole), shards in zip(pairs, zip(*rows, strict=True), strict=True):
            parts = whole.data.view(-1).split(max(shard.numel(), 1))
            targets += parts
            sources += map(_without_padding, shards, parts)
        torch._foreach_copy_(targets, sources)
        self.empty()

    return gather_and_write
