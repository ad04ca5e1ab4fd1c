"""Train the embeddings alone, the first stage after a vocabulary is extended; or of them the new rows alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import CONFIG_FILE, NEW_ROWS_KEY
from colossal_llama2.storage.files import read_json

if TYPE_CHECKING:
    import torch

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
# [begin, end) ranges of token ids.
Ranges = tuple[tuple[int, int], ...]


def freeze_non_embedding_parameters(model) -> tuple[int, int]:
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


def read_new_rows(model_path: str) -> Ranges:
    """Which rows of the embeddings init_model.py added to a model, as its config.json says.

    Raises:
        UserError: it says nothing of that, or something impossible.
    """
    path = Path(model_path, CONFIG_FILE)
    config = read_json(path)
    ranges = config.get(NEW_ROWS_KEY)
    size = config.get("vocab_size")
    if not ranges:
        raise UserError(
            f"--train_new_rows_only: {path} does not say which rows are new; initialize the model with init_model.py, "
            f'or add to that file: "{NEW_ROWS_KEY}": [[FIRST, {size}]], where FIRST is the first new token id'
        )
    try:
        pairs = tuple((int(begin), int(end)) for begin, end in ranges)
    except (TypeError, ValueError):
        pairs = ()
    borders = [0, *(border for pair in pairs for border in pair), size]
    if not pairs or borders != sorted(borders) or any(begin == end for begin, end in pairs):
        raise UserError(
            f'{path}: "{NEW_ROWS_KEY}" is {ranges}; ascending [begin, end) ranges of token ids from 0 to {size} are '
            f"needed, as init_model.py writes them"
        )
    return pairs


def train_rows_only(embedding: "torch.nn.Module", trained: Ranges, *, vocab_size: int) -> None:
    """Let an input embedding pass gradients on to the rows of these token ids alone.

    What the other tokens give is cut off from their rows, so that these have a gradient of exactly 0, and Adam, whose
    moments of them stay 0, leaves every bit of them as it is. It is done on the output, since that is the same whole
    tensor wherever the rows lie, on one rank or on many.
    """
    import torch

    is_trained = torch.zeros(vocab_size, dtype=torch.bool)
    for begin, end in trained:
        is_trained[begin:end] = True
    on_device = {}

    def cut_off(_module, args, output):
        (ids,) = args
        if ids.device not in on_device:
            on_device[ids.device] = is_trained.to(ids.device)
        return torch.where(on_device[ids.device][ids][..., None], output, output.detach())

    embedding.register_forward_hook(cut_off)
