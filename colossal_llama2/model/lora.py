"""LoRA (Hu et al., arXiv 2106.09685): which matrices of a LLaMA get an adapter, and how the weights of both are named.

PEFT computes the adapter. It is injected into the model, whose class and other names stay the same:

    model.layers.0.self_attn.q_proj.weight            without an adapter
    model.layers.0.self_attn.q_proj.base_layer.weight with one: the frozen matrix
    model.layers.0.self_attn.q_proj.lora_A.default.weight, ...lora_B.default.weight

Imports neither torch nor PEFT at the top.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama2.layer_matrices import LAYER_MATRICES, module_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# What PEFT puts before the names of a model's modules in an adapter's files.
PEFT_PREFIX = "base_model.model."
# PEFT's name for an adapter that is given none. It is not in the files.
ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LoraShape:
    """The adapter of a run.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the product B A is multiplied by alpha / rank.
        dropout: share of the inputs of A that are set to zero while training.
        targets: the matrices of each decoder layer that get an adapter, in the order of LAYER_MATRICES.
        seed: of A. B is zero at first.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = LAYER_MATRICES
    seed: int = 1024

    def elements(self, matrix: tuple[int, int]) -> int:
        """Numbers in the adapter of a matrix of (outputs, inputs)."""
        return self.rank * sum(matrix)


def saved_name(name: str) -> str:
    """The name that a parameter of a model with an adapter has in the adapter's file."""
    return PEFT_PREFIX + name.replace(f".{ADAPTER_NAME}.", ".")


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a model is A or B of an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def adapter_shapes(
    shape: LoraShape, matrices: dict[str, tuple[int, int]], layers: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name in the adapter's file and shape of each A and B.

    Args:
        matrices: (outputs, inputs) of each matrix of a decoder layer.
    """
    for layer in range(layers):
        for target in shape.targets:
            outputs, inputs = matrices[target]
            prefix = f"{PEFT_PREFIX}model.layers.{layer}.{module_of(target)}.{target}"
            yield f"{prefix}.lora_A.weight", (shape.rank, inputs)
            yield f"{prefix}.lora_B.weight", (outputs, shape.rank)


def inject(model: "LlamaForCausalLM", shape: LoraShape) -> None:
    """Add an adapter to a loaded model, and freeze all else. A depends on the shape and its seed alone.

    The state of PyTorch's random generators stays the same.
    """
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=shape.dropout,
        target_modules=list(shape.targets),
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        inject_adapter_in_model(config, model, ADAPTER_NAME)
    for name, param in model.named_parameters():
        param.requires_grad_(is_of_adapter(name))
