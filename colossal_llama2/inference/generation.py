"""Continue prompts with a loaded model, token by token: one prompt, or several together.

The loop is our own. `generate` of transformers copies settings and checks all of them again for each prompt, sorts the
whole vocabulary for each drawn token, and computes rows that have ended until the last one ends.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from colossal_llama2.errors import UserError
from colossal_llama2.inference.prompt_batch import KeptStates, PromptBatch, SharedStates
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
    shared: SharedStates | None = None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
    on_first: Callable[["torch.Tensor"], None] = lambda logits: None,
) -> Generator[dict[int, int], None, None]:
    """Continue prompts together. For each step, yield the new token of each row that it has one for, by row.

    A row ends at an end-of-text token, which is not yielded, after `settings.max_new_tokens`, or at the end of the
    model's context. It then leaves the batch. The iterator ends with the last row, and may be left at any step.

    Args:
        rows: the ids of each prompt, at least one.
        numbers: which answer each row is, for its seed; by default 0, 1, ...
        kept: of earlier prompts, for a single row. It is updated with this one.
        shared: states that all rows begin with.
        ends: called with a row and its new token, which has been yielded; if true, the row ends there.
        on_first: called with the (rows, vocabulary) logits of what follows each prompt.

    Raises:
        UserError: a prompt alone fills the model's context.
    """
    limits = [room_for_answer(model, prompt_length=len(row), max_new_tokens=settings.max_new_tokens) for row in rows]
    end_ids = set(end_tokens(model, tokenizer))
    head = model.get_output_embeddings().weight.shape[0]
    sampler = Sampler(
        settings,
        rows,
        numbers=range(len(rows)) if numbers is None else numbers,
        tokens=min(len(tokenizer), head),
        vocabulary=head,
        device=model.device,
    )
    batch = PromptBatch(model, rows, kept, shared)
    active = list(range(len(rows)))
    for count in range(1, max(limits) + 1):
        logits = batch.logits()
        if count == 1:
            on_first(logits)
        chosen = sampler.choose(logits).tolist()
        found = {row: token for row, token in zip(active, chosen, strict=True) if token not in end_ids}
        if found:
            yield found
        going_on = [
            place
            for place, row in enumerate(active)
            if row in found and count < limits[row] and not ends(row, found[row])
        ]
        if not going_on:
            return
        batch.feed([chosen[place] for place in going_on], going_on)
        if len(going_on) < len(active):
            sampler.keep(going_on)
            active = [active[place] for place in going_on]


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
