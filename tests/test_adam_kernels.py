"""PyTorch's fused Adam behind ColossalAI's interfaces: the same update, and used where nothing can be compiled."""

import logging
import math

import pytest
import torch

from colossal_llama2.engine.patches import adam_kernels

LR, BETAS, EPS, DECAY = 0.1, (0.9, 0.95), 1e-8, 0.1


def adam_by_hand(param, grad, *, steps, decoupled, corrects, div_scale):
    """Adam in float64 with the same gradient at each step. Returns the parameter and both moments."""
    param, first, second = param.double(), torch.zeros(len(param)).double(), torch.zeros(len(param)).double()
    grad = grad.double() / (div_scale if div_scale > 0 else 1.0)
    for step in range(1, steps + 1):
        given = grad if decoupled else grad + DECAY * param
        first = BETAS[0] * first + (1 - BETAS[0]) * given
        second = BETAS[1] * second + (1 - BETAS[1]) * given**2
        one, two = ((1 - beta**step) if corrects else 1.0 for beta in BETAS)
        update = (first / one) / ((second / two).sqrt() + EPS)
        param = param - LR * (update + DECAY * param * decoupled)
    return param, first, second


def weights(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return torch.randn(50).to(dtype)


@pytest.mark.parametrize("div_scale", [-1.0, 4.0])
@pytest.mark.parametrize("decoupled", [True, False])
def test_the_cpu_kernel_is_adam(div_scale, decoupled):
    start, grad = weights(0), weights(1)
    expected = adam_by_hand(start, grad, steps=3, decoupled=decoupled, corrects=True, div_scale=div_scale)
    param, first, second = start.clone(), torch.zeros(50), torch.zeros(50)
    kernel = adam_kernels.FusedCpuAdam(LR, *BETAS, EPS, DECAY, decoupled)
    for step in (1, 2, 3):
        kernel.step(step, LR, *BETAS, EPS, DECAY, True, param, grad, first, second, div_scale)
    for found, right in zip((param, first, second), expected, strict=True):
        assert torch.allclose(found.double(), right, atol=1e-6)


@pytest.mark.parametrize("div_scale", [-1.0, 4.0])
@pytest.mark.parametrize("mode, corrects", [(1, 1), (0, 1), (1, 0)])
def test_the_kernel_for_many_tensors_is_adam(div_scale, mode, corrects):
    """Parameters of two types in one call, and a gradient of another type than its parameter's."""
    types = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)] * 2
    params = [weights(seed, dtype) for seed, (dtype, _) in enumerate(types)]
    grads = [weights(seed + 10, dtype) for seed, (_, dtype) in enumerate(types)]
    options = {"decoupled": mode == 1, "corrects": corrects == 1, "div_scale": div_scale}
    # A single step, after which bf16 weights are a rounding apart.
    expected = [adam_by_hand(param, grad, steps=1, **options)[0] for param, grad in zip(params, grads, strict=True)]
    before = [grad.clone() for grad in grads]
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    adam_kernels.multi_tensor_adam(
        65536, torch.tensor([0]), [grads, params, *moments], LR, *BETAS, EPS, 1, mode, corrects, DECAY, div_scale
    )
    for param, right in zip(params, expected, strict=True):
        assert torch.allclose(param.double(), right, atol=1e-6 if param.dtype == torch.float32 else 2e-2)
    assert all(torch.equal(*pair) for pair in zip(grads, before, strict=True)), "gradients stay as they were"


def test_later_steps_correct_the_bias_by_their_number():
    start, grad = weights(0), weights(1)
    expected = adam_by_hand(start, grad, steps=4, decoupled=True, corrects=True, div_scale=-1.0)[0]
    param, first, second = start.clone(), torch.zeros(50), torch.zeros(50)
    for step in range(1, 5):
        adam_kernels.multi_tensor_adam(
            65536, torch.tensor([0]), [[grad], [param], [first], [second]], LR, *BETAS, EPS, step, 1, 1, DECAY, -1.0
        )
    assert torch.allclose(param.double(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["FusedOptimizerLoader", "CPUAdamLoader"])
def test_without_a_toolkit_the_loaders_give_pytorchs_kernels(monkeypatch, caplog, name):
    """As on a machine with a GPU and without nvcc: ColossalAI's own check of it fails."""
    import torch.utils.cpp_extension
    from colossalai.kernel import kernel_loader
    from colossalai.kernel.extensions.pybind.cpu_adam.cpu_adam_x86 import CpuAdamX86Extension

    monkeypatch.setenv("FORCE_CUDA", "1")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    # Kernels for a rehearsal may be registered already, and would be used instead.
    monkeypatch.setattr(kernel_loader.CPUAdamLoader, "REGISTRY", [CpuAdamX86Extension])
    monkeypatch.setattr(logging.getLogger("colossal_llama2"), "propagate", True)
    adam_kernels.install()
    kernels = getattr(kernel_loader, name)().load()
    assert kernels is {"FusedOptimizerLoader": adam_kernels.GpuKernels, "CPUAdamLoader": adam_kernels.CpuKernels}[name]
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "PyTorch's fused Adam is used" in record.getMessage() and "CUDA_HOME" in record.getMessage()


def test_a_compiled_kernel_stays_in_use(caplog):
    from colossalai.kernel import kernel_loader
    from colossalai.kernel.extensions.base_extension import _Extension

    class Compiled(_Extension):
        def __init__(self):
            super().__init__("compiled", support_aot=True, support_jit=False)

        def is_available(self):
            return True

        def assert_compatible(self):
            pass

        def build_aot(self):
            pass

        build_jit = build_aot

        def load(self):
            return math

    class Loader(kernel_loader.FusedOptimizerLoader):
        REGISTRY = [Compiled]

    adam_kernels.install()
    assert Loader().load() is math and not caplog.records


@pytest.mark.parametrize("hosts", [["a", "a"], ["", ""], ["a", ""], ["", "b"]])
def test_ranks_use_pytorchs_kernels_if_one_of_them_must(monkeypatch, caplog, hosts):
    """Replicas would drift apart if they rounded differently."""
    from types import SimpleNamespace

    from colossal_llama2.engine import adam

    monkeypatch.setattr(adam, "gather_values", lambda value: [value, *hosts[1:]])
    monkeypatch.setattr(adam.socket, "gethostname", lambda: hosts[0])
    monkeypatch.setattr(logging.getLogger("colossal_llama2"), "propagate", True)
    defaults = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    own = adam_kernels.FusedCpuAdam(LR, *BETAS, EPS, DECAY, True) if hosts[0] else "ColossalAI's"
    optimizer = SimpleNamespace(defaults=defaults, adamw_mode=True, cpu_adam_op=own, gpu_adam_op="ColossalAI's")
    adam._use_the_same_kernels(optimizer)
    if not any(hosts):
        assert optimizer.cpu_adam_op is own and optimizer.gpu_adam_op == "ColossalAI's" and not caplog.records
        return
    assert isinstance(optimizer.cpu_adam_op, adam_kernels.FusedCpuAdam)
    assert optimizer.gpu_adam_op is adam_kernels.multi_tensor_adam
    messages = [record.getMessage() for record in caplog.records]
    expected = [] if all(hosts) else [f"cannot be compiled on {max(hosts)}"]
    assert [message[message.index("cannot") :] for message in messages] == expected
