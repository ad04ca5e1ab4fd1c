"""Continue prompts with a loaded model, token by token: one prompt, or several together.

The loop is our own. `generate` of transformers copies settings and checks all of them again for each prompt, sorts the
whole vocabulary for each drawn token, and computes rows that have ended until the last one ends.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

import inspect
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.inference.prompts import text_ids
from colossal_llama2.inference.sampling import Sampler
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.logs import get_logger
from colossal_llama2.model.positions import positions_of
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


class KeptStates:
    """The keys and values of the last prompt and its answer, so that a prompt that begins alike need not repeat them.

    `ids` are the tokens that they belong to. Of one row.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.cache: Any = None

    def take(self, row: Sequence[int]) -> Any:
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


def generate(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", prompt: str, settings: GenerationSettings
) -> str:
    """Continue `prompt`, which is not changed, and return only the new text.

    The answer is what follows the prompt's last token; it ends before an end-of-text token.

    Raises:
        UserError: the prompt alone fills the model's context, or has a character without a token.
    """
    row = text_ids(tokenizer, prompt)
    log_short_room(model, prompt_length=len(row), max_new_tokens=settings.max_new_tokens)
    stream = TextStream(tokenizer)
    steps = generate_tokens(model, tokenizer, [row], settings)
    return "".join([stream.push(token) for step in steps for token in step.values()]) + stream.end()


def generate_tokens(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    numbers: Sequence[int] | None = None,
    kept: KeptStates | None = None,
) -> Generator[dict[int, int], None, None]:
    """Continue prompts together. For each step, yield the new token of each row that it has one for, by row.

    A row ends at an end-of-text token, which is not yielded, after `settings.max_new_tokens`, or at the end of the
    model's context. It then leaves the batch. The iterator ends with the last row, and may be left at any step.

    Args:
        rows: the ids of each prompt, at least one.
        numbers: which answer each row is, for its seed; by default 0, 1, ...
        kept: of earlier prompts, for a single row. It is updated with this one.

    Raises:
        UserError: a prompt alone fills the model's context.
    """
    limits = [room_for_answer(model, prompt_length=len(row), max_new_tokens=settings.max_new_tokens) for row in rows]
    ends = set(end_tokens(model, tokenizer))
    head = model.get_output_embeddings().weight.shape[0]
    sampler = Sampler(
        settings,
        rows,
        numbers=range(len(rows)) if numbers is None else numbers,
        tokens=min(len(tokenizer), head),
        vocabulary=head,
        device=model.device,
    )
    batch = _Batch(model, rows, kept)
    active = list(range(len(rows)))
    for count in range(1, max(limits) + 1):
        chosen = sampler.choose(batch.logits()).tolist()
        found = {row: token for row, token in zip(active, chosen, strict=True) if token not in ends}
        if found:
            yield found
        going_on = [place for place, row in enumerate(active) if row in found and count < limits[row]]
        if not going_on:
            return
        batch.feed([chosen[place] for place in going_on], going_on)
        if len(going_on) < len(active):
            sampler.keep(going_on)
            active = [active[place] for place in going_on]


class _Batch:
    """The rows that are still generated: their states, and the tokens that the next forward pass gets.

    Shorter prompts are padded on the left, and the padding is masked.
    """

    def __init__(self, model: "LlamaForCausalLM", rows: Sequence[Sequence[int]], kept: KeptStates | None):
        import torch
        from transformers import DynamicCache

        self._model, self._kept = model, kept
        # Renamed in transformers 5.24, where the old name warns.
        is_renamed = "cache" in inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if is_renamed else "past_key_values"
        self._cache: Any = None if kept is None else kept.take(rows[0])
        reused = 0 if self._cache is None else self._cache.get_seq_length()
        if self._cache is None:
            self._cache = DynamicCache()
        # Of the single row of `kept`: the tokens whose states the cache has after the next forward pass.
        self._ids = list(rows[0])
        width = max(map(len, rows))
        padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
        self._inputs = padded[:, reused:].to(model.device)
        # Without padding, the model makes both itself, and faster.
        self._mask = None if bool(mask.all()) else mask.to(model.device)
        self._positions = None if self._mask is None else (self._mask.cumsum(dim=-1) - 1).clamp(min=0)

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


def end_tokens(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end a text: the tokenizer's, and the model's own, which may be one number or several."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [tokenizer.eos_token_id, *ends] if token is not None})


def room_for_answer(model: "LlamaForCausalLM", *, prompt_length: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, reduced to the room that the prompt leaves in the model's context. Lengths are in tokens.

    Raises:
        UserError: the prompt leaves no room.
    """
    context = positions_of(model.config)
    if prompt_length >= context:
        raise UserError(
            f"the prompt has {counted(prompt_length, 'token')}, the model's context has {context:,}: "
            f"no room for an answer; shorten it"
        )
    return min(max_new_tokens, context - prompt_length)


def log_short_room(model: "LlamaForCausalLM", *, prompt_length: int, max_new_tokens: int) -> None:
    """Log if `room_for_answer` is less than `max_new_tokens`. Raises UserError as it does."""
    room = room_for_answer(model, prompt_length=prompt_length, max_new_tokens=max_new_tokens)
    if room < max_new_tokens:
        get_logger().info(
            f"the prompt has {counted(prompt_length, 'token')} and the model's context has "
            f"{positions_of(model.config):,}: generating at most {counted(room, 'new token')}, not {max_new_tokens:,}"
        )
