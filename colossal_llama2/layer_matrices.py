"""The matrices of a LLaMA's decoder layer, by the names that checkpoints and --lora_targets give them."""

from collections.abc import Iterable

ATTENTION_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MATRICES = ("gate_proj", "up_proj", "down_proj")
# In the order in which they compute.
LAYER_MATRICES = (*ATTENTION_MATRICES, *MLP_MATRICES)


def module_of(matrix: str) -> str:
    """The module of a decoder layer that holds a matrix: "self_attn" for "q_proj"."""
    return "self_attn" if matrix in ATTENTION_MATRICES else "mlp"


def in_order(matrices: Iterable[str]) -> tuple[str, ...]:
    """Each of these matrices once, in the order in which they compute."""
    chosen = set(matrices)
    return tuple(name for name in LAYER_MATRICES if name in chosen)
