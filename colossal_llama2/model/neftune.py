"""NEFTune: uniform noise on the input embeddings while fine-tuning (Jain et al., arXiv 2310.05914)."""

import contextlib
from typing import Iterator


class NoNoise:
    """Stands for NEFTune where it is off."""

    def prepare(self, *, step: int, micro_step: int, lengths) -> None:
        """Do nothing."""


class EmbeddingNoise(NoNoise):
    """Adds noise in [-1, 1] * alpha / sqrt(L * d) to the embeddings of each sample of L tokens and width d.

    The noise is a function of (seed, data rank, step, micro step): partners of a tensor-parallel group draw the same,
    ranks with other data draw another, and a resumed run draws what the uninterrupted one would have.
    """

    def __init__(self, *, alpha: float, seed: int, data_rank: int):
        self._alpha, self._seed, self._data_rank = alpha, seed, data_rank
        self._noise_seed, self._lengths = 0, None

    def prepare(self, *, step: int, micro_step: int, lengths) -> None:
        """Set the place of the next forward pass and the (batch,) lengths of its samples."""
        import numpy as np

        words = np.random.SeedSequence([self._seed, self._data_rank, step, micro_step]).generate_state(2, np.uint32)
        self._noise_seed, self._lengths = int(words[0]) << 32 | int(words[1]), lengths

    def add(self, module, inputs, embeddings):
        """Forward hook of an embedding: (batch, length, width) plus noise, none on padding, none in evaluation."""
        import torch

        if not module.training:
            return embeddings
        batch, length, width = embeddings.shape
        device = embeddings.device
        lengths = self._lengths.to(device, non_blocking=True)
        generator = torch.Generator(device).manual_seed(self._noise_seed)
        noise = torch.empty(embeddings.shape, device=device).uniform_(-1, 1, generator=generator)
        scale = self._alpha / (lengths.float() * width).sqrt()
        is_token = torch.arange(length, device=device) < lengths[:, None]
        noise *= scale.view(batch, 1, 1) * is_token[..., None]
        return embeddings + noise.to(embeddings.dtype)


@contextlib.contextmanager
def embedding_noise(model, *, alpha: float, seed: int, data_rank: int) -> Iterator[EmbeddingNoise]:
    """Add NEFTune's noise to a model's input embeddings inside the `with` block; checkpoints are not touched by it."""
    noise = EmbeddingNoise(alpha=alpha, seed=seed, data_rank=data_rank)
    handle = model.get_input_embeddings().register_forward_hook(noise.add)
    try:
        yield noise
    finally:
        handle.remove()
