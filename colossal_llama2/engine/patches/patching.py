"""Every patch of a library, in one table, and the functions that apply patches.

ColossalAI 0.5.0 has bugs, and does not support CPUs. For each attribute that is replaced, or whose private details a
bug fix relies on, PATCHES lists the reason, the place in the upstream source and the versions it holds for. `install`,
`replaced` and `require` refuse anything that is not in the table.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from colossal_llama2.errors import UserError

COLOSSALAI = ("0.5.0",)
# Public functions, which all of these have.
TORCH, SAFETENSORS = ("2.",), ("0.",)


@dataclass(frozen=True)
class Patch:
    """One attribute that is replaced, or on which a fix for single objects relies.

    Attributes:
        target: module:name or module:Class.name of the attribute.
        reason: what goes wrong without the patch.
        upstream: FILE:LINE inside the colossalai package, the cause.
        mentions: text of that line.
        versions: prefixes of the versions of the target's package that this was verified with.
    """

    target: str
    reason: str
    upstream: str
    mentions: str
    versions: tuple[str, ...] = COLOSSALAI

    @property
    def package(self) -> str:
        """The name of the target's package."""
        return self.target.partition(":")[0].partition(".")[0]

    @property
    def name(self) -> str:
        """The attribute's name."""
        return self.target.partition(":")[2].rpartition(".")[2]

    @property
    def pin(self) -> str:
        """What pip installs of the package: a file of requirements would also change PyTorch on the other sets."""
        newest = self.versions[-1]
        return f"{self.package}=={newest}*" if newest.endswith(".") else f"{self.package}=={newest}"

    def owner(self) -> Any:
        """The module, class or object whose attribute it is. Raises UserError if it does not exist."""
        module, _, path = self.target.partition(":")
        try:
            return functools.reduce(getattr, path.split(".")[:-1], importlib.import_module(module))
        except (ImportError, AttributeError):
            raise self.unknown()

    def unknown(self) -> UserError:
        """The error of a package that lacks the attribute."""
        return UserError(
            f"{self.package} has no {self.target.replace(':', '.')}, as its version {_version(self.package)} should; "
            f"reinstall it: pip install --force-reinstall --no-deps '{self.pin}'"
        )


def _gemini_on_cpu(target: str, upstream: str, mentions: str) -> Patch:
    return Patch(target, "on a CPU, device memory and host memory cannot be distinguished", upstream, mentions)


def _gloo(name: str, reason: str, upstream: str, mentions: str) -> Patch:
    return Patch(f"torch.distributed:{name}", reason, upstream, mentions, TORCH)


def _log(name: str, line: int) -> Patch:
    reason = "a message that is not shown still searches all loaded modules"
    return Patch(
        f"colossalai.logging:DistributedLogger.{name}", reason, f"logging/logger.py:{line}", "self.__get_call_info()"
    )


def _checkpoint(target: str, reason: str, upstream: str, mentions: str, versions: tuple[str, ...] = COLOSSALAI):
    return Patch(target, reason, f"checkpoint_io/{upstream}", mentions, versions)


def _loop(target: str, upstream: str, mentions: str) -> Patch:
    return Patch(target, "several operations for each parameter, where one for all would do", upstream, mentions)


def _states(target: str, upstream: str, mentions: str) -> Patch:
    return Patch(target, "every rank gathers whole optimizer states, beside copies of them", upstream, mentions)


def _adam_kernel(loader: str) -> Patch:
    return Patch(
        f"colossalai.kernel.kernel_loader:{loader}.load",
        "a machine with a GPU needs nvcc and a C++ compiler at its first start",
        "kernel/kernel_loader.py:72",
        "ext.assert_compatible()",
    )


_PICKLE = "optimizer states are pickled"
_CONFIG = "a generation_config.json that only warned when it was read raises an error"
_HYBRID_IO = "colossalai.checkpoint_io.hybrid_parallel_checkpoint_io"
_CHUNK = "colossalai.zero.gemini.chunk.chunk:Chunk"
_ZERO = "colossalai.zero.low_level.low_level_optim:LowLevelZeroOptimizer"
_HYBRID = "colossalai.booster.plugin.hybrid_parallel_plugin:HybridParallel"
_HYBRID_FILE = "booster/plugin/hybrid_parallel_plugin.py"
_MIXED = "colossalai.amp.naive_amp.mixed_precision_optimizer:MixedPrecisionOptimizer"
_MIXED_FILE = "amp/naive_amp/mixed_precision_optimizer.py"

_TABLE = (
    # cpu_device.py
    _gemini_on_cpu(f"{_CHUNK}.close_chunk", "zero/gemini/chunk/chunk.py:318", 'shard_device.type == "cpu"'),
    _gemini_on_cpu(f"{_CHUNK}.shard_move", "zero/gemini/chunk/chunk.py:349", 'device.type == "cpu"'),
    _gemini_on_cpu(
        "colossalai.zero.gemini.chunk.manager:ChunkManager.move_chunk",
        "zero/gemini/chunk/manager.py:142",
        "chunk.device_type == device.type",
    ),
    Patch(
        "colossalai.zero.gemini.memory_tracer.memory_monitor:SyncCudaMemoryMonitor.start",
        "automatic placement asks CUDA for the memory in use",
        "zero/gemini/memory_tracer/memory_monitor.py:135",
        "torch.cuda.synchronize",
    ),
    Patch(
        "colossalai.zero.gemini.memory_tracer.memory_monitor:SyncCudaMemoryMonitor.finish",
        "automatic placement asks CUDA for the memory in use",
        "zero/gemini/memory_tracer/memory_monitor.py:147",
        "torch.cuda.max_memory_allocated",
    ),
    Patch(
        "colossalai.legacy.core:global_context.num_processes_on_current_node",
        "the host's memory is divided by a number of processes that only a legacy launcher sets; it is -1 otherwise",
        "legacy/utils/memory.py:113",
        "gpc.num_processes_on_current_node",
    ),
    Patch(
        "colossalai.pipeline.p2p:_check_for_nccl_hccl_backend",
        "Backend.HCCL exists only in a PyTorch for Ascend; NCCL, compared first, never gets there",
        "pipeline/p2p.py:160",
        "c10d.Backend.HCCL",
    ),
    # gloo_collectives.py
    _gloo("reduce_scatter", "gloo lacks it", "shardformer/layer/_operation.py:522", "dist.reduce_scatter("),
    _gloo("all_to_all", "gloo lacks it", "shardformer/layer/_operation.py:1259", "dist.all_to_all("),
    _gloo(
        "reduce_scatter_tensor",
        "gloo sums everything on every rank",
        "zero/low_level/low_level_optim.py:382",
        "dist.reduce_scatter_tensor(",
    ),
    _gloo(
        "all_gather_into_tensor",
        "gloo sends everything around a ring",
        "zero/gemini/chunk/chunk.py:535",
        "dist.all_gather_into_tensor(",
    ),
    # document_attention.py
    Patch(
        "colossalai.shardformer.layer.attn:ColoAttention.prepare_attn_kwargs",
        "models compute its arguments from the padding alone, so documents of a sample attend to each other",
        "shardformer/modeling/llama.py:134",
        "ColoAttention.prepare_attn_kwargs(",
    ),
    Patch(
        "colossalai.kernel.kernel_loader:FlashAttentionLoader.REGISTRY",
        "flash-attn is used whenever it imports, even without the flag and on GPUs that are too old for it",
        "kernel/kernel_loader.py:115",
        "REGISTRY",
    ),
    # checkpoint_io.py, only while a checkpoint is written or read
    _checkpoint("torch:save", _PICKLE, "utils.py:492", "torch.save(", TORCH),
    _checkpoint("torch:load", _PICKLE, "utils.py:748", "torch.load(", TORCH),
    _checkpoint("colossalai.checkpoint_io.utils:load_flat", "it unpickles metadata", "utils.py:994", "load_flat("),
    _checkpoint(
        f"{_HYBRID_IO}:load_flat", "it unpickles metadata", "hybrid_parallel_checkpoint_io.py:725", "load_flat("
    ),
    _checkpoint(
        f"{_HYBRID_IO}:Path",
        "a rank that cannot make a folder leaves the others waiting",
        "hybrid_parallel_checkpoint_io.py:301",
        "Path(tmp_index_file_folder).mkdir",
    ),
    _checkpoint(
        "colossalai.checkpoint_io:CheckpointIndexFile.write_index_file",
        "a rank that cannot write leaves the others waiting",
        "index_file.py:174",
        "def write_index_file",
    ),
    _checkpoint(
        "safetensors.torch:save_file",
        "a rank that cannot write leaves the others waiting",
        "utils.py:488",
        "from safetensors.torch import save_file",
        SAFETENSORS,
    ),
    _checkpoint(
        "colossalai.checkpoint_io.utils:StateDictSharder.append_param",
        "tied embeddings are written twice",
        "utils.py:155",
        "def append_param",
    ),
    _checkpoint(
        "colossalai.checkpoint_io.utils:save_state_dict",
        "a rank that has written a file holds it while the next one is gathered",
        "utils.py:255",
        "shard_pair in enumerate",
    ),
    _checkpoint(f"{_HYBRID_IO}:save_config_file", _CONFIG, "hybrid_parallel_checkpoint_io.py:287", "save_config_file("),
    _checkpoint(
        "colossalai.checkpoint_io.general_checkpoint_io:save_config_file",
        _CONFIG,
        "general_checkpoint_io.py:262",
        "save_config_file(",
    ),
    Patch(
        "colossalai.booster.plugin.gemini_plugin:save_config_file",
        _CONFIG,
        "booster/plugin/gemini_plugin.py:211",
        "save_config_file(",
    ),
    # chunk_loading.py
    Patch(
        "colossalai.booster.plugin.gemini_plugin:GeminiCheckpointIO.load_sharded_model",
        "Gemini: each rank reads all weights, and every chunk is gathered on every rank once for each file",
        "zero/gemini/gemini_ddp.py:754",
        "get_temp_total_chunk_on_cuda(",
    ),
    Patch(
        "colossalai.booster.plugin.gemini_plugin:GeminiCheckpointIO.load_unsharded_model",
        "Gemini: each rank reads all weights, and gathers every chunk",
        "zero/gemini/gemini_ddp.py:754",
        "get_temp_total_chunk_on_cuda(",
    ),
    # gathered_states.py
    _states(f"{_ZERO}.state_dict_shard", "zero/low_level/low_level_optim.py:899", "all_gather_into_flat_tensor_nd("),
    _states(
        f"{_HYBRID_IO}:HybridParallelCheckpointIO._optimizer_sharder",
        "checkpoint_io/hybrid_parallel_checkpoint_io.py:1057",
        "dist.all_gather(",
    ),
    _states("colossalai.zero:GeminiOptimizer.state_shard", "zero/gemini/gemini_optimizer.py:536", "all_gather_object("),
    # batched_operations.py
    _loop(f"{_ZERO}._compute_grad_norm", "zero/low_level/low_level_optim.py:672", "grad.data.double().norm(norm_type)"),
    _loop(f"{_ZERO}._unscale_and_clip_grads", "zero/low_level/low_level_optim.py:715", "grad.data.mul_("),
    _loop(f"{_HYBRID}ZeroOptimizer._compute_grad_norm", f"{_HYBRID_FILE}:881", "grad.data.double().norm(norm_type)"),
    _loop(f"{_HYBRID}AMPOptimizer._compute_grad_norm", f"{_HYBRID_FILE}:624", "grad.data.double().norm(norm_type)"),
    _loop(f"{_HYBRID}NaiveOptimizer._compute_grad_norm", f"{_HYBRID_FILE}:418", "grad.data.double().norm(norm_type)"),
    _loop(f"{_HYBRID}NaiveOptimizer._clip_grad_norm", f"{_HYBRID_FILE}:475", "p.grad.data.mul_("),
    _loop(f"{_MIXED}._compute_grad_norm", f"{_MIXED_FILE}:164", "grad.data.double().norm(norm_type)"),
    _loop(f"{_MIXED}._unscale_and_clip_grads", f"{_MIXED_FILE}:138", "grad.data.mul_("),
    _loop(
        "colossalai.zero.low_level.bookkeeping.tensor_bucket:TensorBucket.all_gather",
        "zero/low_level/bookkeeping/tensor_bucket.py:86",
        "_flatten_dense_tensors(unflat_shards)",
    ),
    # lazy_loading.py
    Patch(
        "colossalai.lazy.pretrained:new_from_pretrained",
        "lazy initialization imports functions that transformers 5 does not have",
        "lazy/pretrained.py:45",
        "download_url",
    ),
    # bug_fixes.py, attributes that are replaced
    Patch(
        "colossalai.tensor.padded_tensor.api:_hijack_back_detach_and_clone",
        "3d: a vocabulary that had to be padded cannot be saved",
        "tensor/padded_tensor/api.py:47",
        "ptensor._unpad_detach",
    ),
    _checkpoint(
        f"{_HYBRID_IO}:search_tp_partition_dim",
        "3d: a vocabulary that had to be padded cannot be saved",
        "utils.py:128",
        "tp_size * current_shape[partition_dim]",
    ),
    Patch(
        "colossalai.shardformer.layer._operation:_ring_as_gather",
        "3d, --sp_mode ring: wrong gradients of q, k, v, gate and up",
        "shardformer/layer/_operation.py:470",
        "input_tensors.append(send_tensors)",
    ),
    Patch(
        "colossalai.booster.plugin.hybrid_parallel_plugin:HybridParallelModule.__init__",
        "3d: gradients are added several times if --zero 2 accumulates and the data-parallel size is 1",
        "booster/plugin/hybrid_parallel_plugin.py:1311",
        "use_ddp =",
    ),
    _log("info", 143),
    _log("warning", 154),
    _log("debug", 165),
    _log("error", 176),
    Patch(
        "colossalai.shardformer.layer.linear:Linear1D_Row.__init__",
        "3d, --sp_mode split_gather and ring: wrong gradients of the biases of o_proj and down_proj",
        "shardformer/layer/linear.py:592",
        "self.bias",
    ),
    Patch(
        f"{_CHUNK}.set_l2_norm",
        "the gradient norm of a large chunk is too low on the CPU, and so is clipping",
        "zero/gemini/chunk/chunk.py:261",
        "float().norm(2)",
    ),
    Patch(
        "colossalai.zero.gemini.chunk.manager:ChunkManager.register_tensor",
        "Gemini: a parameter's float32 copy is made twice",
        "zero/gemini/gemini_ddp.py:851",
        "fp32_p.data.float()",
    ),
    Patch(
        "colossalai.legacy.utils.memory:colo_device_memory_capacity",
        "automatic placement: ranks may gather different chunks, and wait for each other",
        "zero/gemini/placement_policy.py:177",
        "colo_device_memory_capacity(",
    ),
    # adam_kernels.py
    _adam_kernel("CPUAdamLoader"),
    _adam_kernel("FusedOptimizerLoader"),
    # bug_fixes.py, attributes on which the fix for a single object relies
    Patch(
        "colossalai.nn.optimizer:HybridAdam.torch_adam_update",
        "Gemini in bf16: clipping is computed but not applied where Adam runs on the CPU",
        "nn/optimizer/hybrid_adam.py:130",
        "self.torch_adam_update(",
    ),
    Patch(
        f"{_CHUNK}.optim_update",
        "Gemini that accumulates: weights on the host are saved as they were one step before",
        "zero/gemini/chunk/chunk.py:513",
        "self.optim_sync_flag = False",
    ),
    Patch(
        "colossalai.zero:GeminiOptimizer.step",
        "Gemini that accumulates in fp16: after one overflow all later steps overflow",
        "zero/gemini/gemini_optimizer.py:293",
        "accumulating_grads = False",
    ),
    Patch(
        "colossalai.zero.low_level.bookkeeping:BucketStore.reset_all",
        "ZeRO: gradients of small models are exchanged wherever matrices and norms alternate",
        "zero/low_level/low_level_optim.py:440",
        "current_group_id",
    ),
    Patch(
        "colossalai.zero:GeminiDDP._post_forward",
        "automatic placement refuses to evaluate before its first step",
        "zero/gemini/gemini_ddp.py:280",
        "completed iteration as your warmup",
    ),
    Patch(
        "colossalai.zero:GeminiDDP._cast_buffers",
        "every plugin in bf16 or fp16: rotary frequencies are rounded, and with them all positions",
        "zero/gemini/gemini_ddp.py:882",
        "is_floating_point(buffer)",
    ),
)
PATCHES: dict[str, Patch] = {patch.target: patch for patch in _TABLE}

# What `install` has replaced, by target: (original, replacement).
_installed: dict[str, tuple[Any, Any]] = {}


def require(target: str) -> Patch:
    """The table's entry for a target, after checking the package's version and that it has the attribute.

    Raises:
        UserError: the package has another version, or lacks the attribute.
    """
    patch = PATCHES[target]
    version = _version(patch.package)
    if not version.startswith(patch.versions):
        known = " or ".join(begin + "x" if begin.endswith(".") else begin for begin in patch.versions)
        raise UserError(
            f"{patch.package} {version} is installed, but the patch of {patch.target.replace(':', '.')} supports only "
            f"version {known}; install that one: pip install --no-deps '{patch.pin}'"
        )
    if not hasattr(patch.owner(), patch.name):
        raise patch.unknown()
    return patch


def install(target: str, make: Callable[[Any], Any]) -> None:
    """Replace an attribute permanently by what `make` returns for the original.

    May be called again, also with another `make`: it is called with the original, never with a replacement.

    Raises:
        UserError: as `require`.
    """
    patch = require(target)
    owner = patch.owner()
    current = getattr(owner, patch.name)
    original, replacement = _installed.get(target, (None, None))
    if replacement is None or current is not replacement:
        original = current
    replacement = make(original)
    if callable(replacement):
        replacement.__wrapped__ = original
    is_static = isinstance(inspect.getattr_static(owner, patch.name), staticmethod)
    setattr(owner, patch.name, staticmethod(replacement) if is_static else replacement)
    _installed[target] = original, replacement


def current(target: str) -> Any:
    """The attribute's present value. Raises UserError as `require`."""
    patch = require(target)
    return getattr(patch.owner(), patch.name)


def original_of(target: str) -> Any:
    """The attribute's original value. Raises KeyError if `install` has not replaced it."""
    return _installed[target][0]


@contextlib.contextmanager
def replaced(replacements: dict[str, Any]) -> Iterator[None]:
    """A context in which the targets are replaced by the given values.

    Raises:
        UserError: as `require`; nothing is replaced then.
    """
    patches = [require(target) for target in replacements]
    places = [(patch.owner(), patch.name) for patch in patches]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), replacement in zip(places, replacements.values(), strict=True):
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)
