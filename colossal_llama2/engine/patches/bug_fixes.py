"""Bugs of ColossalAI 0.5.0 on every device, each fixed by one small function.

clip_in_bf16           Gemini in bf16: gradient clipping is computed but not applied where Adam runs on the CPU
refresh_offloaded      Gemini that accumulates: weights on the host are saved as they were one step before
forget_skipped         Gemini that accumulates in fp16: after one overflow all later steps overflow
agree_on_memory        Gemini with automatic placement: ranks may gather different chunks, and then deadlock
save_padded_vocabulary 3d: a vocabulary that had to be padded cannot be saved
ring_weight_gradients  3d, --sp_mode ring: wrong gradients of q, k, v, gate and up
wrap_only_to_reduce    3d: gradients are added several times if --zero 2 accumulates and the data-parallel size is 1
gathered_weights       Gemini with automatic placement: refuses to evaluate before its first step
fill_buckets           ZeRO: gradients of small models are exchanged wherever matrices and norms alternate
skip_hidden_messages   Gemini: after each backward the host looks up the source line of a message that is not shown
sum_split_biases       3d, --sp_mode split_gather and ring: wrong gradients of the biases of o_proj and down_proj
unrounded_buffers      every plugin in bf16 or fp16: rotary frequencies are rounded, and with them all positions
norm_in_blocks         Gemini: the gradient norm of a large chunk is too low on the CPU, and so is clipping
convert_into_chunks    Gemini: a parameter's float32 copy is made twice, which decides the peak of loading a small model
"""

import contextlib
import functools
import logging
from collections.abc import Iterator

from colossal_llama2.engine.patches import patching

PADDED_TENSOR = "colossalai.tensor.padded_tensor.api"
HYBRID_IO = "colossalai.checkpoint_io.hybrid_parallel_checkpoint_io"


def install() -> None:
    """Apply the fixes that replace an attribute which every plugin uses. May be called again.

    Raises:
        UserError: the fixes do not support the installed version of ColossalAI.
    """
    skip_hidden_messages()


def install_for_gemini() -> None:
    """Apply the fixes that replace an attribute of Gemini. May be called again. Raises UserError as `install`."""
    norm_in_blocks()
    convert_into_chunks()


def install_for_3d() -> None:
    """Apply the fixes that replace an attribute for 3d. May be called again. Raises UserError as `install`."""
    save_padded_vocabulary()
    ring_weight_gradients()
    wrap_only_to_reduce()
    sum_split_biases()


def clip_in_bf16(optimizer) -> None:
    """Make HybridAdam apply Gemini's clipping to bf16 gradients of parameters in CPU memory.

    Gemini hands the clipping factor to the optimizer as `div_scale`. For a bf16 gradient on the CPU,
    nn/optimizer/hybrid_adam.py:128 takes a branch that ignores it. float32 gradients go to a kernel that applies it.
    """
    import torch

    patching.require("colossalai.nn.optimizer:HybridAdam.torch_adam_update")

    def promote_gradients(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for param in group["params"]:
                on_cpu_in_bf16 = param.grad is not None and param.grad.dtype is torch.bfloat16 and not param.is_cuda
                if on_cpu_in_bf16 and param.dtype is torch.float32:
                    param.grad = param.grad.float()

    optimizer.register_step_pre_hook(promote_gradients)


def refresh_offloaded(optimizer) -> None:
    """Bring Gemini's half-precision weights up to date before they are saved.

    zero/gemini/chunk/chunk.py:509: if weights and optimizer are on the host, an update does not reach the
    half-precision chunk until it moves to the device; gemini_ddp.py:941 saves that chunk if gradients are accumulated.
    """
    patching.require("colossalai.zero.gemini.chunk.chunk:Chunk.optim_update")
    for chunk in optimizer.chunk16_set:
        if not chunk.optim_sync_flag:
            chunk.cpu_shard.copy_(chunk.paired_chunk.cpu_shard)


def forget_skipped(gemini) -> None:
    """Let Gemini drop the gradients of a step whose update was skipped.

    zero/gemini/gemini_optimizer.py:275: if fp16 has overflowed, a step returns before line 293, which ends the
    accumulation. The gradients of the next step, and of all later ones, are then added to infinite ones.
    """
    patching.require("colossalai.zero:GeminiOptimizer.step")
    gemini.chunk_manager.accumulating_grads = False


def agree_on_memory(gemini) -> None:
    """Make all ranks place Gemini's chunks by the same figures: those of the rank with the least free memory.

    zero/gemini/placement_policy.py:184: each rank decides which chunks to release from the memory of its own device and
    its own memory use besides chunks, measured in the first step. A rank that has released a chunk gathers it, while
    another rank, which still has it, continues to the next collective.
    """
    collector = gemini.gemini_manager._mem_stats_collector
    if collector is None:
        return
    from colossalai.legacy.utils import memory

    from colossal_llama2.engine.ranks import collectives

    own = float(memory.colo_device_memory_capacity(gemini.chunk_manager.device))
    least = min(collectives.gather_values(own))
    patching.install("colossalai.legacy.utils.memory:colo_device_memory_capacity", lambda _: lambda device: least)
    finish = collector.finish_collection

    def finish_and_agree() -> None:
        # Only once; the deletion also ends the reference cycle.
        del collector.finish_collection
        finish()
        figures = collector._memstats.non_model_data_list("cuda")
        taken = collectives.gather_values([float(figure) - (own - least) for figure in figures])
        figures[:] = [max(of_ranks) for of_ranks in zip(*taken, strict=True)]

    collector.finish_collection = finish_and_agree


def save_padded_vocabulary() -> None:
    """Make checkpoints work for models whose vocabulary is not a multiple of the tensor-parallel size.

    tensor/padded_tensor/api.py:47: a detached padded tensor is padded, but has no `_unpad_detach` to restore.
    checkpoint_io/utils.py:127: the padded dimension is not recognized, since original != tp_size * shard there.
    """

    def only_if_hijacked(hijack_back):
        return lambda padded: hijack_back(padded) if hasattr(padded, "_unpad_detach") else padded

    def search_tp_partition_dim(current_shape, original_shape, tp_size):
        for dimension, length in enumerate(original_shape):
            if length > current_shape[dimension]:
                assert length <= tp_size * current_shape[dimension], (original_shape, current_shape, tp_size)
                return dimension
        return None

    patching.install(f"{PADDED_TENSOR}:_hijack_back_detach_and_clone", only_if_hijacked)
    patching.install(f"{HYBRID_IO}:search_tp_partition_dim", lambda _: search_tp_partition_dim)


def ring_weight_gradients() -> None:
    """Use the whole gathered input in the backward pass of --sp_mode ring.

    shardformer/layer/_operation.py:470 keeps the tensor that a rank sent last instead of the one it received, and
    computes the weight gradients of all column-parallel layers from it. With this fix, the products of the ring no
    longer overlap with its messages.
    """
    from colossalai.shardformer.layer import _operation

    def gather_then_compute(
        func, input_to_gather=None, input_local=None, process_group=None, gather_dim=1, keep_item=False
    ):
        gathered = {
            name: _operation._gather(value.contiguous(), gather_dim, process_group)
            for name, value in input_to_gather.items()
        }
        return func(**gathered, **input_local), gathered

    patching.install("colossalai.shardformer.layer._operation:_ring_as_gather", lambda _: gather_then_compute)


def wrap_only_to_reduce() -> None:
    """Wrap a model in DistributedDataParallel only if there are ranks to reduce its gradients over.

    booster/plugin/hybrid_parallel_plugin.py:1311 also does it for a data-parallel size of 1, even with ZeRO. ZeRO stage
    2 removes each gradient as it arrives. At the end of backward the wrapper restores it from its bucket, so the next
    micro batch is added to a gradient that ZeRO has already counted. The buckets also hold a second copy of all
    gradients.
    """

    def wrapping_to_reduce(begin):
        @functools.wraps(begin)
        def begin_without_needless_wrapper(self, *args, dp_group, use_ddp: bool, **keywords) -> None:
            begin(self, *args, dp_group=dp_group, use_ddp=use_ddp and dp_group.size() > 1, **keywords)

        return begin_without_needless_wrapper

    target = "colossalai.booster.plugin.hybrid_parallel_plugin:HybridParallelModule.__init__"
    patching.install(target, wrapping_to_reduce)


def skip_hidden_messages() -> None:
    """Make ColossalAI's logger skip messages below its level.

    logging/logger.py:71 first looks up where a message comes from with inspect.stack(), which searches all loaded
    modules for each function on the stack. Gemini logs such a message after each backward (gemini_ddp.py:343).
    """

    def only_if_shown(log, level: int):
        @functools.wraps(log)
        def log_if_shown(self, *args, **keywords) -> None:
            if self._logger.isEnabledFor(level):
                log(self, *args, **keywords)

        return log_if_shown

    for name in ("debug", "info", "warning", "error"):
        level = getattr(logging, name.upper())
        patching.install(f"colossalai.logging:DistributedLogger.{name}", functools.partial(only_if_shown, level=level))


def sum_split_biases() -> None:
    """Sum the gradients of row-parallel biases over the ranks that share a sample.

    shardformer/layer/linear.py:592: with --sp_mode split_gather or ring, the bias is added after the sequence is split
    again, so each rank has the bias's gradient from its own tokens only. The weights of norms, whose input is split
    too, are marked so that their gradients are summed (shardformer/layer/normalization.py:187). Biases are not.
    """
    from colossalai.shardformer.layer.utils import SeqParallelUtils, is_share_sp_tp

    def marking_bias(begin):
        @functools.wraps(begin)
        def begin_and_mark(self, *args, **keywords) -> None:
            begin(self, *args, **keywords)
            if self.bias is not None and is_share_sp_tp(self.seq_parallel_mode):
                SeqParallelUtils.marked_as_sp_partial_derived_param(self.bias)

        return begin_and_mark

    patching.install("colossalai.shardformer.layer.linear:Linear1D_Row.__init__", marking_bias)


@contextlib.contextmanager
def unrounded_buffers(model) -> Iterator[None]:
    """A context in which a plugin may convert the model. At its end the model's buffers get their dtype back.

    Every plugin casts buffers with the weights (booster/plugin/low_level_zero_plugin.py:83 and
    hybrid_parallel_plugin.py:104, zero/gemini/gemini_ddp.py:883). A LLaMA has one, the rotary frequencies, which
    transformers keeps in float32: `from_pretrained(torch_dtype=...)` casts only parameters. Rounded to bf16 they are
    off by up to 3.7e-3 of their value: in some channels a distance of 2,048 tokens counts as 2,055, in others as 2,041.
    """
    import torch
    from colossalai.lazy.lazy_init import LazyTensor

    patching.require("colossalai.zero:GeminiDDP._cast_buffers")
    kept = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            # With lazy loading nothing has computed it yet; Gemini does so at the same point.
            buffer = buffer.materialize() if isinstance(buffer, LazyTensor) else buffer
            if torch.is_floating_point(buffer):
                kept.append((module, name, buffer.clone()))
    yield
    for module, name, buffer in kept:
        # In place: transformers, and wrappers around the model, hold the same tensor under other names.
        cast = getattr(module, name)
        if cast.dtype is not buffer.dtype:
            cast.data = buffer.to(cast.device)


# Numbers whose squares are summed in float32; the sums of blocks are summed in float64.
NORM_BLOCK = 1024


def norm_in_blocks() -> None:
    """Make Gemini sum the squares of a chunk's gradients in blocks.

    zero/gemini/chunk/chunk.py:261 computes one float32 norm of the whole chunk. A CPU adds one number after the other,
    so small squares are lost when added to a large sum: 0.01 % of the norm of 4 M random numbers, 0.2 % for 32 M.
    Clipping divides by this norm. ZeRO and 3d use float64 (low_level_optim.py:672).
    """

    def set_l2_norm(self) -> None:
        assert self.l2_norm is None, "the norm of a chunk is computed twice"
        values = self.cuda_global_chunk[: self.utilized_size] if self.is_gathered else self.cuda_shard[: self.valid_end]
        self.l2_norm = sum_of_squares(values)

    patching.install("colossalai.zero.gemini.chunk.chunk:Chunk.set_l2_norm", lambda _: set_l2_norm)


def convert_into_chunks() -> None:
    """Make Gemini convert a parameter to float32 inside the chunk of master weights.

    zero/gemini/gemini_ddp.py:851 makes a float32 copy first, of which the chunk then makes another one. For embeddings,
    which have a chunk of their own, both are whole on every rank.
    """
    import torch

    def converting(register):
        @functools.wraps(register)
        def register_and_convert(self, tensor, group_type, *args, **keywords) -> None:
            if group_type != "fp32_param":
                register(self, tensor, group_type, *args, **keywords)
                return
            # Its half-precision original was registered before it, and is in a chunk too.
            original, shape = next(reversed(self.tensor_chunk_map)), tensor.shape
            # One number, as many times as the parameter has numbers: the copy is freed before there is a chunk.
            tensor.data = torch.zeros(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.numel())
            register(self, tensor, group_type, *args, **keywords)
            tensor.data = tensor.data.view(shape)
            tensor.data.copy_(original.data)

        return register_and_convert

    patching.install("colossalai.zero.gemini.chunk.manager:ChunkManager.register_tensor", converting)


def sum_of_squares(values) -> float:
    """The sum of the squares of a flat tensor of any number format, within 1e-6 of it."""
    import torch

    whole = values.numel() // NORM_BLOCK * NORM_BLOCK
    parts = values[:whole].view(-1, NORM_BLOCK), values[whole:].view(1, -1)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts]
    return torch.cat(norms).double().square().sum().item()


def fill_buckets(optimizer) -> None:
    """Make ZeRO collect gradients in one bucket per parameter group, which is exchanged when it is full.

    zero/low_level/low_level_optim.py:440 has one bucket for all groups, and exchanges it whenever a gradient of another
    group arrives: four times in each layer of a LLaMA, where matrices have weight decay and norms do not.
    """
    from colossalai.zero.low_level.bookkeeping import BucketStore

    patching.require("colossalai.zero.low_level.bookkeeping:BucketStore.reset_all")

    def bucket_of(group_id: int, like: BucketStore) -> BucketStore:
        class GroupBucket(BucketStore):
            def reset_all(self) -> None:
                super().reset_all()
                self.current_group_id = group_id

        return GroupBucket(like.torch_pg, like.reduce_bucket_size)

    buckets = optimizer.pg_to_bucket_store
    for group_id, params in optimizer._working_param_groups.items():
        # The first group keeps the existing bucket, whose key other code looks up.
        for param in params if group_id else ():
            ranks = optimizer.param_to_pg[param]
            if (ranks, group_id) not in buckets:
                buckets[ranks, group_id] = bucket_of(group_id, buckets[ranks])
            optimizer.pid_to_bucket_store[id(param)] = buckets[ranks, group_id]


@contextlib.contextmanager
def gathered_weights(gemini) -> Iterator[None]:
    """A context in which Gemini's bare model runs, with all half-precision weights gathered on each device.

    zero/gemini/gemini_ddp.py:278 refuses a forward pass without gradients until a step has recorded how much memory it
    needs. Nothing is recorded here, so the first step still does that. Weights are released as in line 260.
    """
    patching.require("colossalai.zero:GeminiDDP._post_forward")
    for chunk in gemini.chunk_manager.get_chunks(gemini.fp16_params):
        gemini.chunk_manager.access_chunk(chunk)
    gemini.forward = gemini.module.forward
    try:
        yield
    finally:
        del gemini.forward
        gemini._post_forward()
        gemini.gemini_manager.reset_attributes()
