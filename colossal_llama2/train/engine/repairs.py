"""Faults of ColossalAI 0.5.0 that exist on every device, each mended by one small function.

    clip_in_bf16           Gemini in bf16: gradient clipping is computed but not applied where Adam runs on the CPU
    refresh_offloaded      Gemini that accumulates: weights that lie on the host are saved as they were a step before
    save_padded_vocabulary 3d: a vocabulary that had to be padded cannot be saved
"""

REPAIRED_VERSION = "0.5.0"


def install() -> None:
    """Apply the repairs that work by replacing a function, to the version that needs them."""
    import colossalai

    from colossal_llama2 import logs

    if colossalai.__version__ != REPAIRED_VERSION:
        logs.get_logger().warning(
            "ColossalAI %s: its faults in %s are mended here, later ones are not known; compare with a short run first",
            colossalai.__version__,
            REPAIRED_VERSION,
        )
        return
    save_padded_vocabulary()


def clip_in_bf16(optimizer) -> None:
    """Make HybridAdam apply Gemini's clipping to bf16 gradients of parameters in CPU memory.

    Gemini hands the clipping factor to the optimizer as `div_scale`. For a bf16 gradient on the CPU,
    nn/optimizer/hybrid_adam.py:128 takes a branch that ignores it; float32 gradients take the kernel, which does not.
    """
    import torch

    def promote_gradients(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for param in group["params"]:
                on_cpu_in_bf16 = param.grad is not None and param.grad.dtype is torch.bfloat16 and not param.is_cuda
                if on_cpu_in_bf16 and param.dtype is torch.float32:
                    param.grad = param.grad.float()

    optimizer.register_step_pre_hook(promote_gradients)


def refresh_offloaded(optimizer) -> None:
    """Bring Gemini's half-precision weights up to date before they are saved.

    zero/gemini/chunk/chunk.py:509: where weights and optimizer lie on the host, an update leaves the half-precision
    chunk as it is until it moves to the device; gemini_ddp.py:941 saves that chunk if gradients are accumulated.
    """
    for chunk in optimizer.chunk16_set:
        if not chunk.optim_sync_flag:
            chunk.cpu_shard.copy_(chunk.paired_chunk.cpu_shard)


def save_padded_vocabulary() -> None:
    """Make checkpoints of models work whose vocabulary is not a multiple of the tensor-parallel size.

    tensor/padded_tensor/api.py:47: a detached padded tensor is padded, but has no `_unpad_detach` to take back.
    checkpoint_io/utils.py:127: the padded dimension is not recognized, since original != tp_size * shard there.
    """
    from colossalai.checkpoint_io import hybrid_parallel_checkpoint_io
    from colossalai.tensor.padded_tensor import api

    take_back = api._hijack_back_detach_and_clone

    def take_back_if_taken(padded):
        return take_back(padded) if hasattr(padded, "_unpad_detach") else padded

    def search_tp_partition_dim(current_shape, original_shape, tp_size):
        for dimension, length in enumerate(original_shape):
            if length > current_shape[dimension]:
                assert length <= tp_size * current_shape[dimension], (original_shape, current_shape, tp_size)
                return dimension
        return None

    if take_back.__name__ != take_back_if_taken.__name__:
        api._hijack_back_detach_and_clone = take_back_if_taken
        hybrid_parallel_checkpoint_io.search_tp_partition_dim = search_tp_partition_dim
