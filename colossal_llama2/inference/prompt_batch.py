"""The rows of a batch that is continued: their keys and values, and the tokens that the next forward pass gets.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedModel


class KeptStates:
    """The keys and values of the last prompt and its answer, so that a prompt that begins alike need not repeat them.

    `ids` are the tokens that they belong to. Of one row.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Any = None

    def reused_for(self, row: Sequence[int]) -> Any:
        """The states of the longest common beginning, without the last token of `row`; None if there is none."""
        cache, ids = self.cache, self.ids
        self.ids, self.cache = [], None
        common = next((n for n, pair in enumerate(zip(ids, row, strict=False)) if pair[0] != pair[1]), None)
        length = min(len(ids) if common is None else common, len(row) - 1)
        if cache is None or length < 1:
            return None
        surplus = cache.get_seq_length() - length
        if surplus:
            # A negative number is one of tokens to remove, in every version of transformers.
            cache.crop(-surplus)
        return cache


class SharedStates:
    """The keys and values of a beginning that several prompts share, computed once. `ids` are its tokens."""

    def __init__(self, model: "LlamaForCausalLM", ids: Sequence[int]):
        import torch
        from transformers import DynamicCache

        self.ids, self._device = list(ids), model.device
        self._cache = DynamicCache()
        row = torch.tensor([self.ids], dtype=torch.long, device=model.device)
        with torch.inference_mode():
            model(input_ids=row, use_cache=True, logits_to_keep=1, **{cache_argument(model): self._cache})

    def for_rows(self, count: int) -> Any:
        """A copy of the states for each of `count` rows."""
        import torch

        cache = copy.deepcopy(self._cache)
        with torch.inference_mode():
            cache.batch_select_indices(torch.zeros(count, dtype=torch.long, device=self._device))
        return cache


def cache_argument(model: "PreTrainedModel") -> str:
    """The argument of `forward` for keys and values: renamed in transformers 5.24, where the old name warns."""
    is_renamed = "cache" in inspect.signature(type(model).forward).parameters
    return "cache" if is_renamed else "past_key_values"


class PromptBatch:
    """The rows that are still continued: their states, and the tokens that the next forward pass gets.

    Shorter prompts are padded on the left, behind the states that they share, and the padding is masked.
    """

    def __init__(
        self,
        model: "LlamaForCausalLM",
        rows: Sequence[Sequence[int]],
        kept: KeptStates | None = None,
        shared: SharedStates | None = None,
    ):
        """
        Args:
            rows: the ids of each prompt.
            kept: states of an earlier prompt, for a single row; updated with this one.
            shared: states that all rows begin with, and each row is longer.
        """
        import torch
        from transformers import DynamicCache

        self._model, self._kept = model, kept
        self._cache_argument = cache_argument(model)
        self._cache: Any = shared.for_rows(len(rows)) if shared else kept.reused_for(rows[0]) if kept else None
        reused = 0 if self._cache is None else self._cache.get_seq_length()
        if self._cache is None:
            self._cache = DynamicCache()
        # Of the single row of `kept`: the tokens whose states the cache has after the next forward pass.
        self._ids = list(rows[0])
        rest = [list(row[reused:]) for row in rows]
        width = max(map(len, rest))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in rest], dtype=torch.long)
        mask = torch.tensor(
            [[1] * reused + [0] * (width - len(row)) + [1] * len(row) for row in rest], dtype=torch.long
        )
        self._inputs = padded.to(model.device)
        # Without padding, the model makes both itself, and faster.
        self._mask = None if bool(mask.all()) else mask.to(model.device)
        self._positions = None if self._mask is None else (self._mask.cumsum(dim=-1) - 1).clamp(min=0)[:, reused:]

    def logits(self) -> "torch.Tensor":
        """(rows, vocabulary): of what follows each row."""
        import torch

        with torch.inference_mode():
            output = self._model(
                input_ids=self._inputs,
                attention_mask=self._mask,
                position_ids=self._positions,
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: self._cache},
            )
        if self._kept is not None:
            # Not before: an interrupted pass leaves states of some layers only.
            self._kept.ids, self._kept.cache = self._ids.copy(), self._cache
        return output.logits[:, -1]

    def feed(self, tokens: Sequence[int], rows: Sequence[int]) -> None:
        """Continue with these rows of the last pass only, each with its new token."""
        import torch

        if self._kept is not None:
            self._kept.ids, self._kept.cache = [], None
        self._ids.append(tokens[0])
        if len(rows) < len(self._inputs):
            chosen = torch.tensor(rows, device=self._inputs.device)
            with torch.inference_mode():
                self._cache.batch_select_indices(chosen)
            if self._mask is not None and self._positions is not None:
                self._mask, self._positions = self._mask[chosen], self._positions[chosen]
        self._inputs = torch.tensor(tokens, dtype=torch.long, device=self._inputs.device)[:, None]
        if self._mask is not None and self._positions is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
            self._positions = self._positions[:, -1:] + 1
