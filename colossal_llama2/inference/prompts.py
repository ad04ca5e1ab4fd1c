"""In which form a model gets a prompt: as a chat, before the mark of the published models, or as it is."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.inference.chat_template import has_chat_template, message_ids
from colossal_llama2.logs import get_logger
from colossal_llama2.model.config_fields import opened
from colossal_llama2.model.purpose import read_purpose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, SFT, PRETRAINED, PLAIN = "auto", "sft", "pretrained", "plain"
# The published models were trained to continue after this mark (README of Colossal-LLaMA-2-7B-base).
PROMPT_SUFFIX = "\n\n->\n\n"
# A name on the hub, a folder of that name, or one of the hub's cache.
PUBLISHED = re.compile(
    r"(?:.*[/\\](?:models--)?)?hpcai-tech(?:/|--)Colossal-LLaMA-2-[^/\\]+(?:[/\\].*)?", re.IGNORECASE
)


class PromptStyle(NamedTuple):
    """The form of prompts, SFT, PRETRAINED or PLAIN, and why it was chosen, as a clause for the log."""

    name: str
    reason: str


def choose_style(given: str, folder: Path, model_path: str) -> PromptStyle:
    """The form of prompts for a model.

    Args:
        given: --prompt_style, one of inference_flags.PROMPT_STYLES.
        folder: the model's.
        model_path: --model_path, which may be a name on the hub.

    Raises:
        UserError: the style is SFT, but the folder has no chat template.
    """
    style = PromptStyle(given, "--prompt_style") if given != AUTO else _style_of(folder, model_path)
    if style.name == SFT and not has_chat_template(folder):
        raise UserError(
            f"--model_path {model_path} has no chat template, which prompt style {SFT} needs ({style.reason}); copy "
            f"the chat_template.jinja of its training data into the folder, or use --prompt_style {PLAIN}"
        )
    return style


def _style_of(folder: Path, model_path: str) -> PromptStyle:
    purpose = read_purpose(opened(folder).content)
    if purpose is not None and purpose.stage == "sft":
        named = f", template {purpose.chat_template}" if purpose.chat_template else ""
        return PromptStyle(SFT, f"config.json records fine-tuning{named}")
    if purpose is not None:
        return PromptStyle(PRETRAINED, "config.json records pre-training")
    if any(PUBLISHED.fullmatch(path) for path in (model_path, str(folder), str(folder.absolute()))):
        return PromptStyle(PRETRAINED, "a published Colossal-LLaMA-2")
    if has_chat_template(folder):
        return PromptStyle(SFT, "the folder has a chat template")
    return PromptStyle(PLAIN, "no record of training, no chat template")


def log_style(style: PromptStyle) -> None:
    """Log the form of prompts, and why it was chosen."""
    get_logger().info(f"prompt style {style.name} ({style.reason})")


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", style: str, prompt: str) -> list[int]:
    """The ids of one prompt in a style. Raises UserError for a character without a token, or as `message_ids`."""
    if style == SFT:
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return text_ids(tokenizer, prompt + (PROMPT_SUFFIX if style == PRETRAINED else ""))


def chat_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """`message_ids`. Raises UserError also for a character that the tokenizer would drop."""
    for message in messages:
        _check_characters(tokenizer, message["content"])
    ids = message_ids(tokenizer, messages)
    if not ids:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} writes nothing for these messages; correct it, or use "
            f"--prompt_style {PLAIN}"
        )
    return ids


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a text that begins as a document in training does: with the encoder's mark, if it has one.

    Many tokenizers of byte-level BPE, such as SmolLM2's, have a bos_token that transformers does not add. A special
    token that is spelled out in the text stays text.

    Raises:
        UserError: the text has a character that the tokenizer would drop, or there is not a single token.
    """
    _check_characters(tokenizer, text)
    ids = list(tokenizer(text, split_special_tokens=True)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        # By add_eos_token of some tokenizers. The text goes on.
        _log_once(f"{tokenizer.eos_token}, which the tokenizer puts behind every text, is left out of prompts")
        del ids[-1]
    mark = first_mark(tokenizer)
    if mark is not None and ids[:1] != [mark]:
        _log_once(f"the prompt begins with {tokenizer.convert_ids_to_tokens(mark)}, as documents do in training")
        ids = [mark, *ids]
    if not ids:
        raise UserError("the prompt is empty, and the tokenizer begins a text with no mark; give some text")
    return ids


@lru_cache(maxsize=100)
def _log_once(line: str) -> None:
    get_logger().info("%s", line)


def _check_characters(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    try:
        encoder = shared_encoder(tokenizer.name_or_path)
    except UserError:  # a kind of tokenizer that only transformers reads
        return
    problem = encoder.problem_of(text)
    if problem:
        raise UserError(f"the prompt cannot be used: {problem}; change it")


def first_mark(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The id before a document in training, which the encoder decides; None if there is none."""
    try:
        encoder = shared_encoder(tokenizer.name_or_path)
    except UserError:
        return tokenizer.bos_token_id
    return encoder.bos_id if encoder.bos_id >= 0 else None
