"""Train the embeddings alone: the first stage after a vocabulary is extended."""

from typing import Tuple

EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def freeze_non_embedding_parameters(model) -> Tuple[int, int]:
    """Let only the input and output embeddings of a LLaMA model be trained.

    Returns:
        Numbers of trainable and of frozen elements.
    """
    trainable = frozen = 0
    for name, param in model.named_parameters():
        param.requires_grad_(any(part in EMBEDDING_NAMES for part in name.split(".")))
        if param.requires_grad:
            trainable += param.numel()
        else:
            frozen += param.numel()
    return trainable, frozen
