"""Which attention code a model runs with."""

from colossal_llama2 import logs


def has_flash_attn() -> bool:
    """True if a GPU and the flash-attn package are there."""
    import importlib.util

    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def choose_attention(use_flash_attn: bool, *, precision: str, replaced: bool = False) -> str:
    """The transformers name of the attention to load a model with, said in the log.

    Args:
        replaced: the engine puts ColossalAI's own attention in its place, which takes the same kernels as here.
    """
    if not use_flash_attn:
        name, reason = "eager", "plain attention; --use_flash_attn is faster and needs less memory"
    elif replaced:
        name, reason = "sdpa", f"ColossalAI's, with {_fused_kernel(precision)}"
    elif has_flash_attn() and precision != "fp32":
        name, reason = "flash_attention_2", _fused_kernel(precision)
    else:
        name, reason = "sdpa", _fused_kernel(precision)
    logs.get_logger().info("Attention: %s", reason)
    return name


def _fused_kernel(precision: str) -> str:
    import torch

    if has_flash_attn() and precision != "fp32":
        return "flash-attn"
    if not torch.cuda.is_available():
        cause = "there is no GPU for flash-attn"
    elif has_flash_attn():
        cause = "flash-attn has no fp32"
    else:
        cause = "flash-attn is not installed (pip install --no-build-isolation -r requirements-gpu.txt)"
    return f"PyTorch's scaled_dot_product_attention, since {cause}"
