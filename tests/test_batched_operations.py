"""Optimizer steps of ColossalAI in few operations: the same values as from its own loops."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from colossal_llama2.engine.patches import batched_operations, cpu_device, patching

pytestmark = pytest.mark.usefixtures("with_colossalai")
SHAPES = ((5, 3), (7,), (4, 4), (1,))


@pytest.fixture(scope="module")
def gloo_group():
    """A process group with only this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    cpu_device.install()
    batched_operations.install()
    yield dist.group.WORLD
    dist.destroy_process_group()


def without_batches():
    """A context in which ColossalAI's own loops run."""
    targets = [target for target, patch in patching.PATCHES.items() if "for each parameter" in patch.reason]
    return patching.replaced({target: patching.original_of(target) for target in targets})


def parameters(dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def zero(params, max_norm, dtype):
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    return LowLevelZeroOptimizer(
        HybridAdam(params, lr=0.1), initial_scale=2, clip_grad_norm=max_norm, partition_grad=True
    )


def mixed(params, max_norm, dtype):
    from colossalai.amp.naive_amp.mixed_precision_optimizer import MixedPrecisionOptimizer
    from colossalai.nn.optimizer import HybridAdam

    precision = "fp16" if dtype is torch.float16 else "bf16"
    return MixedPrecisionOptimizer(HybridAdam(params, lr=0.1), precision=precision, initial_scale=2, max_norm=max_norm)


def naive(params, max_norm, dtype):
    """3d in fp32 without ZeRO, on one rank."""
    from colossalai.booster.plugin.hybrid_parallel_plugin import HybridParallelNaiveOptimizer
    from colossalai.nn.optimizer import HybridAdam

    model = SimpleNamespace(stage_manager=None, shared_params=[], require_grad_sync=False, _hook_context=nullcontext)
    return HybridParallelNaiveOptimizer(
        HybridAdam(params, lr=0.1), model, use_pipeline=False, param_info=None, max_norm=max_norm
    )


def three_steps(make, max_norm: float, dtype) -> tuple[list[torch.Tensor], list[float]]:
    """Weights after three steps, and the gradient norm of each."""
    params = parameters(dtype)
    optimizer, norms = make(params, max_norm, dtype), []
    for _ in range(3):
        optimizer.backward(sum((param.float() ** 3).sum() for param in params))
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.get_grad_norm()))
    return [param.detach() for param in params], norms


@pytest.mark.parametrize("max_norm", [0.5, float("inf")])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        *((make, dtype) for make in (zero, mixed) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        (naive, torch.float32),
    ],
)
def test_steps_are_those_of_colossalai_s_loops(gloo_group, make, max_norm, dtype):
    found, norms = three_steps(make, max_norm, dtype)
    with without_batches():
        wanted, wanted_norms = three_steps(make, max_norm, dtype)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], parameters(dtype)[0])


@pytest.mark.parametrize("make", [zero, mixed, naive])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_of_nan_or_infinity_does_what_it_does_in_colossalai(gloo_group, make, value):
    def step() -> list[torch.Tensor]:
        dtype = torch.float32 if make is naive else torch.bfloat16
        params = parameters(dtype)
        optimizer = make(params, 1.0, dtype)
        optimizer.backward((params[0].float() * value).sum() + sum(param.float().sum() for param in params))
        optimizer.step()
        assert optimizer.get_grad_norm() == pytest.approx(value, nan_ok=True)
        return [param.detach() for param in params]

    found = step()
    with without_batches():
        wanted = step()
    assert all(torch.equal(one.isnan(), other.isnan()) for one, other in zip(found, wanted, strict=True))
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", [mixed, naive])
def test_a_parameter_without_a_gradient_is_left_alone(gloo_group, make):
    params = parameters(torch.float32)
    optimizer = make(params, 0.5, torch.float32)
    optimizer.backward((params[0] ** 2).sum())
    optimizer.step()
    assert optimizer.get_grad_norm() == pytest.approx(2 * parameters(torch.float32)[0].norm().item())
    assert torch.equal(params[1], parameters(torch.float32)[1]) and not torch.equal(
        params[0], parameters(torch.float32)[0]
    )


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "transposed"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_gathered_weights_are_written_where_they_belong(gloo_group, monkeypatch, ranks, kind):
    """Each shape of SHAPES is padded to a multiple of the ranks; one has fewer elements than some of them.

    A model's weights may have another precision than what is gathered. One that is not contiguous is for ColossalAI.
    """
    import torch.distributed as dist
    from colossalai.zero.low_level.bookkeeping import TensorBucket

    wholes = [torch.arange(1.0, 1 + torch.Size(shape).numel()) + 100 * i for i, shape in enumerate(SHAPES)]
    padded = [torch.nn.functional.pad(whole, (0, -len(whole) % ranks)).chunk(ranks) for whole in wholes]

    def gather(output, own, group=None, async_op=False):
        torch.cat([torch.cat(shards) for shards in zip(*padded, strict=True)], out=output)

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    bucket = TensorBucket(1000)
    targets = [torch.zeros(shape, dtype=torch.bfloat16 if kind == "bfloat16" else None) for shape in SHAPES]
    if kind == "transposed":
        targets[0] = torch.zeros(SHAPES[0][::-1]).t()
    for shards, target in zip(padded, targets, strict=True):
        bucket.add_to_bucket(shards[0], write_back_tensor=target)
    bucket.all_gather(gloo_group)
    for target, whole in zip(targets, wholes, strict=True):
        assert torch.equal(target.flatten(), whole.to(target.dtype))
    assert bucket.is_empty()


def operations_of_a_step(make, parameter_count: int, *, dtype=torch.bfloat16) -> int:
    """Operations of an optimizer step over some parameters, after one that makes Adam's states."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += not func.is_view
            return func(*args, **(kwargs or {}))

    params = [torch.nn.Parameter(torch.ones(8, dtype=dtype)) for _ in range(parameter_count)]
    optimizer = make(params, 1.0, dtype)
    for _ in range(2):
        optimizer.backward(sum(param.float().sum() for param in params))
        with Counter() as counter:
            optimizer.step()
        optimizer.zero_grad()
    return counter.count


@pytest.mark.parametrize("make", [zero, mixed])
def test_a_parameter_adds_few_operations_to_a_step(gloo_group, make):
    """Adam's kernel for CPUs is called for each; the rest converts its gradient and its weight."""

    def by_parameter() -> float:
        return (operations_of_a_step(make, 12) - operations_of_a_step(make, 2)) / 10

    adam, conversions = 2, 3 if make is zero else 2
    assert by_parameter() <= adam + conversions
    with without_batches():
        assert by_parameter() > adam + conversions + 4
