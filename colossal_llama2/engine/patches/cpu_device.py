"""What ColossalAI 0.5.0 needs to run its Booster plugins without a GPU, to rehearse a cluster job.

ColossalAI's own plugins, optimizers and checkpoint code run, over gloo. This file and gloo_collectives.py add what it
lacks on a CPU, one function for each; the last two rows also make it faster:

    accelerator   a device whose streams and events do nothing            documented: set_accelerator
    kernels       CPU Adam and attention, by PyTorch's own fused kernels   documented: register_extension
    gemini        "the device" and "the host", both RAM, kept apart        patch, see `_patch_gemini_chunks`
    gemini_auto   how much memory a process may use and has used           patch, see `_patch_memory_tracer`
    pipelines     which backend a group has                                patch, see `_patch_backend_check`
    collectives   those that gloo lacks or does slowly                     patches, see gloo_collectives.py
    memory        what a GPU's caching allocator does                      glibc's settings, see `keep_freed_memory`

`install` is called once, before any plugin is built.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine.patches import adam_kernels, gloo_collectives, patching

if TYPE_CHECKING:
    import torch

GEMINI_CHUNK = "colossalai.zero.gemini.chunk.chunk:Chunk"
GEMINI_MANAGER = "colossalai.zero.gemini.chunk.manager:ChunkManager"
MEMORY_MONITOR = "colossalai.zero.gemini.memory_tracer.memory_monitor:SyncCudaMemoryMonitor"


def install() -> None:
    """Make ColossalAI run on this machine's CPU. May be called again.

    Raises:
        UserError: the patches do not support the installed version of ColossalAI.
    """
    _register_device()
    _patch_gemini_chunks()
    _patch_memory_tracer()
    _patch_backend_check()
    gloo_collectives.install()
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step, as PyTorch's allocator does on a GPU.

    By default much of it goes back to the kernel, which clears each page again: 25,000 page faults per step of a model
    with 8 M parameters in float32, a sixth of its time (measured). mmap is off, since mapped memory, which is used for
    everything over 32 MiB, goes back whenever it is freed. The cost: memory that loading a model frees stays with the
    process, and gemini_auto, which counts it as used, offloads weights earlier. Threads share one arena, since what the
    forward pass frees in one is of no use to the backward pass, which PyTorch runs in another thread: less than half of
    the remaining page faults (measured). Settings in the environment (MALLOC_..., GLIBC_TUNABLES) take precedence.
    """
    import ctypes
    import os

    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(arena_max, 1)


def _device() -> "torch.device":
    """The stand-in for a GPU's memory: an indexed CPU device, which does not compare equal to torch.device("cpu").

    Tensors made on it are plain CPU tensors, so all arithmetic is unchanged.
    """
    import torch

    return torch.device("cpu", 0)


class _NoStream:
    """A stream or event of a device without a queue: all work is always done."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = wait = wait_stream = wait_event = record = _nothing

    def record_event(self, event: Any = None) -> "_NoStream":
        return self

    def query(self) -> bool:
        return True


class _HostMethods:
    """The methods that CpuAccelerator leaves unsupported, for a single device whose operations are synchronous."""

    support_set_device = False

    def get_current_device(self) -> "torch.device":
        return _device()

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    set_device = synchronize = empty_cache = reset_peak_memory_stats = set_stream = _nothing

    def manual_seed(self, seed: int) -> None:
        import torch

        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> "torch.Tensor":
        import torch

        return torch.get_rng_state()

    def set_rng_state(self, new_state: "torch.Tensor", device: Any = None) -> None:
        import torch

        torch.set_rng_state(new_state)

    def memory_allocated(self, device: Any = None) -> int:
        import psutil

        return psutil.Process().memory_info().rss

    def max_memory_allocated(self, device: Any = None) -> int:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def Stream(self, *args: Any, **kwargs: Any) -> _NoStream:
        return _NoStream()

    Event = current_stream = default_stream = Stream

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@functools.lru_cache(maxsize=1)
def _register_device() -> None:
    """Register the accelerator and the kernels by the documented functions; once, since each call would add more."""
    from colossalai.accelerator import set_accelerator

    set_accelerator(_host_accelerator())
    _register_kernels()


def _host_accelerator() -> Any:
    """An accelerator for `set_accelerator`."""
    from colossalai.accelerator import CpuAccelerator

    class HostAccelerator(_HostMethods, CpuAccelerator):
        def __init__(self) -> None:
            super().__init__()
            # zero/low_level/low_level_optim.py:254 and zero/gemini/chunk/chunk.py:198 accept only "cuda" and "npu".
            self._name = "cuda"

    return HostAccelerator()


def _register_kernels() -> None:
    """Register CPU kernels with ColossalAI's loaders, whose own need CUDA headers or a GPU."""
    from colossalai.kernel import kernel_loader
    from colossalai.kernel.extensions.base_extension import _Extension

    class HostExtension(_Extension):
        kernel: Any = None

        def __init__(self) -> None:
            super().__init__(type(self).__name__, support_aot=False, support_jit=False)

        def is_available(self) -> bool:
            return True

        def assert_compatible(self) -> None:
            pass

        def build_aot(self) -> None:
            raise NotImplementedError

        build_jit = build_aot

        def load(self) -> Any:
            return type(self).kernel

    class HostAdam(HostExtension):
        kernel = adam_kernels.CpuKernels

    class HostAttention(HostExtension):
        kernel = staticmethod(host_attention)

    kernel_loader.CPUAdamLoader.register_extension(HostAdam)
    for loader in (
        kernel_loader.FlashAttentionLoader,
        kernel_loader.FlashAttentionDaoLoader,
        kernel_loader.FlashAttentionWithCustomMaskLoader,
        kernel_loader.FlashAttentionForFloatAndCustomMaskLoader,
    ):
        loader.register_extension(HostAttention)


def host_attention(
    q: "torch.Tensor",
    k: "torch.Tensor",
    v: "torch.Tensor",
    dropout_p: float = 0.0,
    scale: float | None = None,
    attention_mask: "torch.Tensor | None" = None,
    is_causal: bool = False,
    cu_seqlens_q: "torch.Tensor | None" = None,
    cu_seqlens_kv: "torch.Tensor | None" = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    q_indices: "torch.Tensor | None" = None,
    kv_indices: "torch.Tensor | None" = None,
) -> "torch.Tensor":
    """The interface of ColossalAI's flash attention kernels, implemented by scaled_dot_product_attention.

    Args:
        q, k, v: (batch, heads, length, head_dim)
        attention_mask: additive, the type's minimum where hidden; None or empty if nothing is hidden.
        is_causal: hide later positions; without `q_indices` the mask adds nothing to that and is ignored.

    Returns:
        (batch, heads, length, head_dim). Rows that may attend to nothing are zeros: on a CPU, SDPA's gradient of such
        a row is wrong by a factor of the row's length.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    if attention_mask is not None and (attention_mask.numel() == 0 or (is_causal and q_indices is None)):
        attention_mask = None
    causal = is_causal and attention_mask is None
    blind = None
    if attention_mask is not None:
        blind = attention_mask.amax(-1, keepdim=True) <= torch.finfo(attention_mask.dtype).min
        if blind.any():
            attention_mask = attention_mask.masked_fill(blind, 0.0)
        else:
            # With padding on the right, and with documents, there is no such row. A filled mask is a new tensor, which
            # each layer keeps for backward, while all layers share the original mask.
            blind = None
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attention_mask,
        dropout_p=dropout_p,
        scale=scale,
        is_causal=causal,
    )
    return out if blind is None else out.masked_fill(blind, 0.0)


def _patch_gemini_chunks() -> None:
    """Let Gemini's chunks move between "device" and "host" when both are CPU memory.

    chunk.py:304-319, chunk.py:323-360 and manager.py:142 read `device.type == "cpu"` as "offloaded to the host". Here
    both sides have that type, and the index distinguishes them (see `_device`).
    """

    def closing_on_device(close_chunk: Callable[..., None]) -> Callable[..., None]:
        def close_chunk_on_device(self: Any) -> None:
            close_chunk(self)
            if not self.keep_gathered and self.shard_device == _device() and self.cuda_shard is None:
                self.cuda_shard, self.cpu_shard, self.cpu_vis_flag = self.cpu_shard, None, False

        return close_chunk_on_device

    def moving_shards(shard_move: Callable[..., None]) -> Callable[..., None]:
        def shard_move_to_device(
            self: Any, device: "torch.device", force_copy: bool = False, non_blocking: bool = False
        ) -> None:
            if device != _device():
                shard_move(self, device, force_copy, non_blocking)
            elif not self.optim_sync_flag:
                self._Chunk__paired_shard_move(non_blocking=non_blocking)
                self.optim_sync_flag = True
            elif self.cuda_shard is None:
                self.cuda_shard = self.cpu_shard.clone()
                if not self.pin_memory:
                    self.cpu_shard = None

        return shard_move_to_device

    def moving_chunks(move_chunk: Callable[..., None]) -> Callable[..., None]:
        def move_chunk_to_device(
            self: Any, chunk: Any, device: "torch.device", force_copy: bool = False, async_move: bool = False
        ) -> None:
            if device != _device():
                move_chunk(self, chunk, device, force_copy, async_move)
            elif chunk.can_move and chunk.device_type == "cpu":
                self._ChunkManager__sub_memory_usage(chunk.memory_usage)
                chunk.shard_move(device, force_copy, non_blocking=async_move)
                self._ChunkManager__add_memory_usage(chunk.memory_usage)

        return move_chunk_to_device

    patching.install(f"{GEMINI_CHUNK}.close_chunk", closing_on_device)
    patching.install(f"{GEMINI_CHUNK}.shard_move", moving_shards)
    patching.install(f"{GEMINI_MANAGER}.move_chunk", moving_chunks)


def _patch_memory_tracer() -> None:
    """Give gemini_auto the process's memory figures instead of CUDA's.

    legacy/utils/memory.py:113 divides the host's memory by a process count that only a legacy launcher sets (it is -1
    otherwise, and the plugin fails with "No enough CUDA memory"); memory_tracer/memory_monitor.py asks torch.cuda.
    """
    import os
    import time

    import psutil

    def start(self: Any) -> None:
        pass

    def finish(self: Any) -> int:
        used = psutil.Process().memory_info().rss
        self.time_stamps.append(time.time())
        self.mem_stats.append(used)
        return used

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    patching.install("colossalai.legacy.core:global_context.num_processes_on_current_node", lambda _: processes)
    patching.install(f"{MEMORY_MONITOR}.start", lambda _: start)
    patching.install(f"{MEMORY_MONITOR}.finish", lambda _: finish)


def _patch_backend_check() -> None:
    """Let the stages of a pipeline communicate over gloo.

    pipeline/p2p.py:159 compares a group's backend with Backend.HCCL, which exists only in a PyTorch for Ascend. NCCL is
    compared first, so the fault does not show with it.
    """
    from colossalai.pipeline import p2p

    patching.install(
        "colossalai.pipeline.p2p:_check_for_nccl_hccl_backend",
        lambda _: lambda group: p2p.check_for_nccl_backend(group),
    )
