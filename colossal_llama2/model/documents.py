"""Keep the documents of a spliced sample apart: attention inside a document only, positions that restart at each.

Every function here starts from `documents`, a (batch, length) tensor of integers: the number of a token's document in
its row, 1, 2, 3 ..., and 0 on the padding at the right. A row of 3 + 2 tokens and 3 of padding:

    documents    1 1 1 2 2 0 0 0
    positions    0 1 2 0 1 0 1 2

Padding is one more document: it attends to itself, so no row of a mask is entirely hidden. SDPA's gradient of such a
row is wrong on a CPU by a factor of the row's length.
"""

from enum import Enum
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import torch


class MaskForm(Enum):
    """The form in which an attention implementation gets the ends of documents.

    BLOCKS: a dense mask, for PyTorch's attention, eager or SDPA.
    BORDERS: cumulative lengths, for flash-attn by transformers.
    NUMBERS: `documents` as they are, for ColossalAI's attention (see engine/patches/document_attention.py).
    """

    BLOCKS = "blocks"
    BORDERS = "borders"
    NUMBERS = "numbers"


def attention_inputs(
    attention_mask: Optional["torch.Tensor"],
    documents: Optional["torch.Tensor"],
    *,
    form: MaskForm,
    dtype: "torch.dtype",
    device: "torch.device",
    shape: tuple[int, int],
) -> dict[str, Any]:
    """Keyword arguments of a LLaMA's forward pass for attention: which tokens attend to which.

    Args:
        attention_mask: (batch, length) on the CPU, 1 on tokens and 0 on padding at the right; None if nothing is
            padded. Used where `documents` is None: each row is one document, for which a causal mask is enough.
        documents: (batch, length) on the CPU, see above.
        dtype: dtype of the model, and of a dense mask.
        device: where the model is.
        shape: of the batch, (rows, length).
    """
    if form is MaskForm.BORDERS:
        # Also for rows of one document each, whose mask serves as `documents`: otherwise transformers would look for
        # borders in each layer, and the host would wait for them.
        return _border_inputs(attention_mask if documents is None else documents, shape, device)
    if documents is None:
        return {"attention_mask": None if attention_mask is None else attention_mask.to(device, non_blocking=True)}
    there = documents.to(device, non_blocking=True)
    inputs: dict[str, Any] = {"position_ids": position_ids(there)}
    if form is MaskForm.BLOCKS:
        inputs["attention_mask"] = block_mask(there, dtype)
    else:
        inputs["attention_mask"] = there
    return inputs


def _border_inputs(
    documents: Optional["torch.Tensor"], shape: tuple[int, int], device: "torch.device"
) -> dict[str, Any]:
    import torch

    rows, length = shape
    inputs: dict[str, Any] = {"attention_mask": None}
    if documents is None:
        cumulative, longest = torch.arange(0, rows * length + 1, length, dtype=torch.int32), length
    else:
        # Found on the CPU: on a GPU the longest length would make the host wait for it.
        cumulative, longest = borders(documents)
        inputs["position_ids"] = position_ids(documents.to(device, non_blocking=True))
    # A few numbers, which the driver copies at once: the host does not wait for the queue before them.
    cumulative = cumulative.to(device, non_blocking=True)
    inputs.update(cu_seq_lens_q=cumulative, cu_seq_lens_k=cumulative, max_length_q=longest, max_length_k=longest)
    return inputs


def one_document_each(lengths: "torch.Tensor", width: int) -> "torch.Tensor":
    """(batch, width) `documents` of rows that are one document of these (batch,) lengths."""
    import torch

    return (torch.arange(width) < lengths[:, None]).long()


def document_lengths(documents: "torch.Tensor") -> "torch.Tensor":
    """(batch, length) int64: the number of tokens in each token's document; 0 on padding."""
    import torch

    counts = torch.zeros(len(documents), int(documents.max()) + 1, dtype=torch.int64, device=documents.device)
    counts.scatter_add_(1, documents, torch.ones_like(documents))
    counts[:, 0] = 0
    return counts.gather(1, documents)


def position_ids(documents: "torch.Tensor") -> "torch.Tensor":
    """(batch, length) int64: the position of each token in its document."""
    import torch

    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    return places - torch.where(_starts(documents), places, 0).cummax(dim=1).values


def block_mask(documents: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """(batch, 1, length, length): 0 where a token (row) attends to another (column), the type's minimum elsewhere."""
    import torch

    sees = (documents[:, :, None] == documents[:, None, :]).tril()
    mask = torch.full(sees.shape, torch.finfo(dtype).min, dtype=dtype, device=documents.device)
    return mask.masked_fill_(sees, 0.0)[:, None]


def borders(documents: "torch.Tensor") -> tuple["torch.Tensor", int]:
    """The arguments of flash-attn's variable-length kernels, over all rows concatenated, padding included.

    Returns:
        (documents + 1,) int32 cumulative lengths from 0 to batch * length, and the longest length.
    """
    import torch

    starts = _starts(documents).flatten().nonzero().flatten()
    cumulative = torch.cat([starts, starts.new_tensor([documents.numel()])]).to(torch.int32)
    return cumulative, int(cumulative.diff().max())


def _starts(documents: "torch.Tensor") -> "torch.Tensor":
    """(batch, length) bool: whether a token is the first of its document."""
    import torch

    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts
