"""Which attention code a model runs with."""

from colossal_llama2 import logs
from colossal_llama2.errors import UserError


def has_flash_attn() -> bool:
    """True if a GPU and the flash-attn package are there."""
    import importlib.util

    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def choose_attention(use_flash_attn: bool, *, precision: str, replaced: bool = False) -> str:
    """The transformers name of the attention to load a model with, said in the log.

    Args:
        replaced: the engine puts ColossalAI's own flash attention in its place (flash-attn or a fused kernel).

    Raises:
        UserError: flash attention is asked for on a GPU, and the flash-attn package is missing.
    """
    import torch

    if not use_flash_attn:
        name, reason = "eager", "plain attention; --use_flash_attn is faster and needs less memory"
    elif replaced:
        name, reason = "sdpa", "ColossalAI's flash attention"
    elif torch.cuda.is_available() and precision == "fp32":
        name, reason = "sdpa", "PyTorch's scaled_dot_product_attention, since flash-attn has no fp32"
    elif has_flash_attn():
        name, reason = "flash_attention_2", "flash-attn"
    elif torch.cuda.is_available():
        raise UserError(
            "--use_flash_attn needs the flash-attn package on a GPU; "
            "pip install --no-build-isolation -r requirements-gpu.txt"
        )
    else:
        name, reason = "sdpa", "PyTorch's scaled_dot_product_attention, since there is no GPU for flash-attn"
    logs.get_logger().info("Attention: %s", reason)
    return name
