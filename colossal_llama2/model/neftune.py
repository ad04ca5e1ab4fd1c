"""NEFTune: uniform noise on the input embeddings while fine-tuning (Jain et al., arXiv 2310.05914, algorithm 1).

Its magnitude is alpha / sqrt(L * d) for a sequence of L tokens and width d, so that the noise of a whole sequence has
the same expected norm for every length. In the paper a sequence is one conversation; if several are spliced into a
sample and kept apart, each is a separate sequence. Padding is not counted. The paper's sample code uses the padded
length, so that the noise of a conversation would depend on the rest of its batch.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional

from colossal_llama2.model.documents import document_lengths, one_document_each

if TYPE_CHECKING:
    import torch


class NoNoise:
    """No-op, used where NEFTune is off."""

    def prepare(
        self, *, step: int, micro_step: int, lengths: "torch.Tensor", documents: Optional["torch.Tensor"] = None
    ) -> None:
        """Do nothing."""


class EmbeddingNoise(NoNoise):
    """Adds noise in [-1, 1] * alpha / sqrt(L * d) to the embeddings of each document of L tokens and width d.

    The noise is a function of (seed, data rank, step, micro step): partners of a tensor-parallel group draw the same,
    ranks with other data draw different noise, and a resumed run draws the same noise as the uninterrupted one.
    """

    def __init__(self, *, alpha: float, seed: int, data_rank: int):
        self._alpha, self._seed, self._data_rank = alpha, seed, data_rank
        self._noise_seed, self._lengths, self._documents = 0, None, None

    def prepare(
        self, *, step: int, micro_step: int, lengths: "torch.Tensor", documents: Optional["torch.Tensor"] = None
    ) -> None:
        """Set the step of the next forward pass, and the documents of its tokens.

        Args:
            lengths: (batch,) tokens of each sample.
            documents: (batch, length) as in model/documents.py; None if each sample is one document.
        """
        import numpy as np

        words = np.random.SeedSequence([self._seed, self._data_rank, step, micro_step]).generate_state(2, np.uint32)
        self._noise_seed, self._lengths, self._documents = int(words[0]) << 32 | int(words[1]), lengths, documents

    def add(self, module: "torch.nn.Module", inputs: tuple[Any, ...], embeddings: "torch.Tensor") -> "torch.Tensor":
        """Forward hook of an embedding: (batch, length, width) plus noise, none on padding, none in evaluation."""
        import torch

        if not module.training:
            return embeddings
        _, length, width = embeddings.shape
        device = embeddings.device
        documents = one_document_each(self._lengths, length) if self._documents is None else self._documents
        lengths = document_lengths(documents).to(device, non_blocking=True)
        generator = torch.Generator(device).manual_seed(self._noise_seed)
        noise = torch.empty(embeddings.shape, device=device).uniform_(-1, 1, generator=generator)
        scale = self._alpha / (lengths.float() * width).sqrt()
        noise *= torch.where(lengths > 0, scale, 0.0)[..., None]
        return embeddings + noise.to(embeddings.dtype)


@contextlib.contextmanager
def embedding_noise(model: Any, *, alpha: float, seed: int, data_rank: int) -> Iterator[EmbeddingNoise]:
    """Add NEFTune's noise to a model's input embeddings inside the `with` block; checkpoints do not change."""
    noise = EmbeddingNoise(alpha=alpha, seed=seed, data_rank=data_rank)
    handle = model.get_input_embeddings().register_forward_hook(noise.add)
    try:
        yield noise
    finally:
        handle.remove()
