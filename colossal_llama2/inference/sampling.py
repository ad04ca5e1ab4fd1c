"""Which token comes next: the most likely one, or one that is drawn.

The steps and their order are those of transformers' `generate` (generation/logits_process.py): repetition penalty,
temperature, top_k, top_p. A seed draws the same tokens as there. Only the candidates of top_k are sorted for top_p.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_llama2.errors import RunError
from colossal_llama2.inference.settings import GenerationSettings

if TYPE_CHECKING:
    import torch

SEEDS = 2**32


class Sampler:
    """Chooses the next token of each row.

    Rows draw from generators of their own, so what a row draws does not depend on the others. Padding is not a token
    of a row, and is not penalized.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        rows: Sequence[Sequence[int]],
        *,
        numbers: Sequence[int],
        tokens: int,
        vocabulary: int,
        device: "torch.device",
    ):
        """
        Args:
            rows: the ids of each prompt.
            numbers: which answer each row is, from 0. It is drawn with the seed `settings.seed` + this number.
            tokens: ids from here on are rows of the output embedding without a token, and are never chosen.
            vocabulary: rows of the output embedding.
        """
        import torch

        self._settings, self._tokens = settings, tokens
        self._generators: list[torch.Generator | None] = [None for _ in rows]
        if settings.do_sample and settings.seed is not None:
            seeds = [(settings.seed + number) % SEEDS for number in numbers]
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._seen: torch.Tensor | None = None
        if settings.repetition_penalty != 1:
            self._seen = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
            for row, ids in enumerate(rows):
                self._seen[row, torch.tensor(ids, dtype=torch.long, device=device)] = True

    def choose(self, logits: "torch.Tensor") -> "torch.Tensor":
        """(rows,) the ids that follow, from (rows, vocabulary) logits in any floating-point dtype.

        Raises:
            RunError: a logit is NaN or Inf.
        """
        import torch

        scores = logits.float()
        if not math.isfinite(scores.sum()):
            dtype = str(logits.dtype).removeprefix("torch.")
            raise RunError(f"the model computes NaN or Inf in {dtype}; use --dtype fp32, or another model")
        if self._seen is not None:
            penalty = self._settings.repetition_penalty
            scores = torch.where(self._seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        scores = scores[:, : self._tokens]
        chosen = self._drawn(scores) if self._settings.do_sample else scores.argmax(dim=-1)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with these rows only, in this order."""
        self._generators = [self._generators[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _drawn(self, scores: "torch.Tensor") -> "torch.Tensor":
        import torch

        values, candidates = self._candidates(scores / self._settings.temperature)
        probabilities = torch.zeros_like(scores).scatter_(1, candidates, torch.softmax(values, dim=-1))
        if self._settings.seed is None:
            return torch.multinomial(probabilities, 1)[:, 0]
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self._generators, strict=True)
        ]
        return torch.cat(drawn)

    def _candidates(self, scores: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """(rows, some) scores and ids of the candidates, in descending order; -inf for those that are left out."""
        import torch

        top_k, top_p = self._settings.top_k, self._settings.top_p
        vocabulary = scores.shape[-1]
        if top_k and top_k < vocabulary:
            least = scores.topk(top_k, dim=-1).values[:, -1:]
            # All that are as likely as the last one.
            count = int((scores >= least).sum(dim=-1).max())
            values, candidates = scores.topk(count, dim=-1)
            values = values.masked_fill(values < least, -torch.inf)
        else:
            values, candidates = scores.sort(dim=-1, descending=True)
        if top_p < 1:
            # Of all less likely ones and itself, as transformers sums.
            tail = torch.softmax(values, dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
            left_out = tail <= 1 - top_p
            left_out[:, 0] = False
            values = values.masked_fill(left_out, -torch.inf)
        return values, candidates
