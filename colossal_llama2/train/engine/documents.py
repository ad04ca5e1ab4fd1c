"""Documents kept apart in ColossalAI's own attention, which --plugin 3d runs with --use_flash_attn.

Its kernels can do it: the one of flash-attn takes cumulative lengths, those of PyTorch a mask. Its models cannot ask
for it, since they make both of the padding alone (shardformer/modeling/llama.py:134).
"""


def install() -> None:
    """Let ColoAttention take numbers of documents for a padding mask. May be called again at no cost."""
    from colossalai.kernel.extensions import FlashAttentionDaoCudaExtension
    from colossalai.kernel.kernel_loader import FlashAttentionLoader
    from colossalai.shardformer.layer.attn import AttnMaskType, ColoAttention

    from colossal_llama2.model.attention import has_flash_attn
    from colossal_llama2.model.documents import block_mask, borders

    if not has_flash_attn():
        # ColossalAI asks only whether it imports, and would run it on a GPU that is too old for it.
        loader = FlashAttentionLoader
        loader.REGISTRY = [kernel for kernel in loader.REGISTRY if kernel is not FlashAttentionDaoCudaExtension]
    prepare_padding = ColoAttention.prepare_attn_kwargs

    def prepare_documents(shape_4d, dtype, device, q_padding_mask=None, **others):
        """The arguments of ColoAttention.attention, by (batch, length) numbers that model/documents.py explains."""
        import torch

        # Ones and zeros are a padding mask.
        if q_padding_mask is None or int(q_padding_mask.max()) <= 1:
            return prepare_padding(shape_4d, dtype, device, q_padding_mask, **others)
        cumulative, longest = borders(q_padding_mask)
        every_token = torch.arange(q_padding_mask.numel(), device=device)
        # flash-attn reads no mask, and a dense one of a long sample fills a GPU.
        is_read = not has_flash_attn() or dtype is torch.float32
        mask = block_mask(q_padding_mask, dtype) if is_read else torch.empty(0, dtype=dtype, device=device)
        return {
            "attention_mask": mask,
            "attention_mask_type": AttnMaskType.PADDED_CAUSAL,
            "cu_seqlens_q": cumulative, "cu_seqlens_kv": cumulative,
            "max_seqlen_q": longest, "max_seqlen_kv": longest,
            "q_indices": every_token, "kv_indices": every_token,
        }  # fmt: skip

    if prepare_padding.__name__ != prepare_documents.__name__:
        ColoAttention.prepare_attn_kwargs = staticmethod(prepare_documents)
