"""Attention within documents for ColossalAI's own attention, which --plugin 3d runs with --use_flash_attn, and wherever
ranks share a sample.

Its kernels support it: flash-attn's by cumulative lengths, PyTorch's by a mask. Its models do not, since they compute
both from the padding alone (shardformer/modeling/llama.py:134).
"""

from collections.abc import Callable
from typing import Any

from colossal_llama2.engine.patches import patching


def install(*, use_flash_attn: bool) -> None:
    """Let ColoAttention accept numbers of documents as a padding mask. May be called again, with another choice.

    Args:
        use_flash_attn: use flash-attn's kernel where it can run, and not only PyTorch's.

    Raises:
        UserError: the patches do not support the installed version of ColossalAI.
    """
    from colossalai.kernel.extensions import FlashAttentionDaoCudaExtension

    from colossal_llama2.model.attention import has_flash_attn

    uses_flash_attn = use_flash_attn and has_flash_attn()

    def allowed(kernels: list) -> list:
        # ColossalAI only checks that flash-attn can be imported.
        return [kernel for kernel in kernels if uses_flash_attn or kernel is not FlashAttentionDaoCudaExtension]

    patching.install("colossalai.kernel.kernel_loader:FlashAttentionLoader.REGISTRY", allowed)
    patching.install(
        "colossalai.shardformer.layer.attn:ColoAttention.prepare_attn_kwargs",
        lambda prepare_padding: _preparing_documents(prepare_padding, uses_flash_attn=uses_flash_attn),
    )


def _preparing_documents(prepare_padding: Callable[..., dict[str, Any]], *, uses_flash_attn: bool):
    """ColoAttention.prepare_attn_kwargs for numbers of documents; `prepare_padding` is the one for padding."""
    import torch
    from colossalai.shardformer.layer.attn import AttnMaskType

    from colossal_llama2.model.documents import block_mask, borders

    def prepare_documents(shape_4d, dtype, device, q_padding_mask=None, **others):
        """The arguments of ColoAttention.attention, from (batch, length) numbers that model/documents.py explains."""
        # flash-attn does not read the mask, and a dense one for a long sample fills a GPU. The kernel in cpu_device.py
        # ignores a mask that is only causal.
        is_read = not uses_flash_attn or dtype is torch.float32
        nothing = torch.empty(0, dtype=dtype, device=device)
        if q_padding_mask is None and (not is_read or nothing.device.type == "cpu"):
            return {"attention_mask": nothing, "attention_mask_type": AttnMaskType.CAUSAL}
        # Ones and zeros are a padding mask.
        if q_padding_mask is None or int(q_padding_mask.max()) <= 1:
            return prepare_padding(shape_4d, dtype, device, q_padding_mask, **others)
        cumulative, longest = borders(q_padding_mask)
        every_token = torch.arange(q_padding_mask.numel(), device=device)
        return {
            "attention_mask": block_mask(q_padding_mask, dtype) if is_read else nothing,
            "attention_mask_type": AttnMaskType.PADDED_CAUSAL,
            "cu_seqlens_q": cumulative,
            "cu_seqlens_kv": cumulative,
            "max_seqlen_q": longest,
            "max_seqlen_kv": longest,
            "q_indices": every_token,
            "kv_indices": every_token,
        }

    return prepare_documents
