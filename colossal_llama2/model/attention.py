"""Choose the attention implementation of a model."""

import functools
import importlib

from colossal_llama2 import logs

# The oldest generation of GPUs with flash-attn 2 kernels, Ampere.
FLASH_ATTN_CAPABILITY = (8, 0)


def has_flash_attn() -> bool:
    """True if flash-attn can run here."""
    return _why_no_flash_attn() is None


@functools.lru_cache(maxsize=1)
def _why_no_flash_attn() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU for flash-attn"
    if torch.cuda.get_device_capability() < FLASH_ATTN_CAPABILITY:
        return f"flash-attn needs an Ampere GPU or a later one, not {torch.cuda.get_device_name()}"
    try:
        importlib.import_module("flash_attn")
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "flash-attn is not installed (pip install --no-deps --no-build-isolation -r requirements-gpu.txt)"
        return f"flash-attn does not import: {error}"
    except Exception as error:
        # A package compiled for another PyTorch fails in many ways.
        return f"flash-attn does not import: {error}"
    return None


def choose_attention(use_flash_attn: bool, *, precision: str, replaced: bool = False) -> str:
    """The transformers name of the attention to load a model with, which is also logged.

    Args:
        replaced: the engine replaces it by ColossalAI's own attention, which uses the same kernels.
    """
    if not use_flash_attn:
        # transformers' eager attention would keep a matrix of length x length for each head and layer.
        name, reason = "sdpa", "PyTorch's scaled_dot_product_attention; --use_flash_attn takes flash-attn on GPUs"
    elif replaced:
        name, reason = "sdpa", f"ColossalAI's, with {_fused_kernel(precision)}"
    elif has_flash_attn() and precision != "fp32":
        name, reason = "flash_attention_2", _fused_kernel(precision)
    else:
        name, reason = "sdpa", _fused_kernel(precision)
    logs.get_logger().info("Attention: %s", reason)
    return name


def _fused_kernel(precision: str) -> str:
    cause = _why_no_flash_attn()
    if cause is None and precision != "fp32":
        return "flash-attn"
    return f"PyTorch's scaled_dot_product_attention, since {cause or 'flash-attn has no fp32'}"
