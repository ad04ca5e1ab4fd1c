"""Messages to token ids, by the chat template of a model's folder."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.chat.chat_tokens import ChatTokenizer
from colossal_llama2.chat.folder_chat import chat_of_folder
from colossal_llama2.chat.renderer import Renderer
from colossal_llama2.chat.templates import template_of_folder
from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.storage.row_errors import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a chat template, in a place where transformers finds it."""
    return template_of_folder(folder) is not None


def message_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation, up to where the assistant's next message begins: those of training.

    A special token that is spelled out in a message, such as "<|im_end|>", stays text.

    Args:
        messages: {"role": "system", "user" or "assistant", "content": ...}, of which the last is the user's.

    Raises:
        UserError: the template refuses the messages, or is damaged.
    """
    folder = tokenizer.name_or_path
    try:
        shared_encoder(folder)
    except UserError:  # a kind of tokenizer that only transformers reads
        return _by_transformers(tokenizer, messages)
    chat = _chat_of(folder)
    if chat is None:
        raise UserError(f"{folder} has no chat template")
    try:
        return chat.prompt(messages)
    except RowError as error:
        raise UserError(_with_cure(str(error)))


# Its process renders all prompts of a command.
@lru_cache(maxsize=1)
def _chat_of(folder: str) -> ChatTokenizer | None:
    return chat_of_folder(folder)


def _by_transformers(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """For such a tokenizer, special tokens in a message cannot be told from those of the template."""
    spelled = [token for token in tokenizer.all_special_tokens if any(token in m["content"] for m in messages)]
    if spelled:
        raise UserError(_with_cure(f"a message has {spelled[0]!r}, a special token of {tokenizer.name_or_path}"))
    found = template_of_folder(tokenizer.name_or_path)
    if found is None:
        raise UserError(f"{tokenizer.name_or_path} has no chat template")
    text, origin = found
    renderer = Renderer(text, names=tokenizer.special_tokens_map, origin=origin)
    try:
        rendered = renderer.prompt(messages)
    except RowError as error:
        raise UserError(_with_cure(str(error)))
    finally:
        renderer.close()
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _with_cure(problem: str) -> str:
    return f"{problem}; change the messages, or use --prompt_style plain"
