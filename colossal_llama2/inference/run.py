"""What inference_example.py does: load the model, then answer one prompt, or chat."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.errors import UserError
from colossal_llama2.inference import loading
from colossal_llama2.inference.answer import Answer
from colossal_llama2.inference.chat import Chat
from colossal_llama2.inference.generation import log_short_room
from colossal_llama2.inference.prompts import PromptStyle, choose_style, log_style, prompt_ids
from colossal_llama2.inference.settings import InferenceSettings
from colossal_llama2.logs import get_logger
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def run(settings: InferenceSettings) -> None:
    """Load the model, continue the prompt or the messages of a chat, and print them with the answers to stdout.

    Texts are printed for people, also into a file, which may be shown on a terminal later: line feeds and tabs stay,
    other control characters are escaped. `generation.generate` returns the exact text.

    Raises:
        UserError: the flags, the model's folder or its files cannot be used.
        RunError: the GPU runs out of memory.
    """
    _refuse_broken_text(settings.input_txt)
    loading.refuse_missing_folder(settings.model_path)
    if Path(settings.model_path).is_dir():
        # Before the seconds that importing torch takes.
        _checked_style(settings, Path(settings.model_path))
    loading.quiet_libraries()
    with loading.memory_errors_named(settings.device):
        device = loading.resolve_device(settings.device)
        folder = loading.local_folder(settings.model_path)
        style = _checked_style(settings, folder)
        log_style(style)
        model, tokenizer = loading.load_folder(folder, device, given=settings.model_path, dtype=settings.dtype, rows=1)
        if settings.interactive:
            Chat(model, tokenizer, style.name, settings.generation, streams=settings.streams).run()
        else:
            _answer(settings, model, tokenizer, style)


def _answer(
    settings: InferenceSettings, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", style: PromptStyle
) -> None:
    """Answer --input_txt."""
    row = prompt_ids(tokenizer, style.name, settings.input_txt)
    log_short_room(model, prompt_length=len(row), max_new_tokens=settings.generation.max_new_tokens)
    answer = Answer(model, tokenizer, row, settings.generation)
    show(f"Prompt: {settings.input_txt}\nAnswer: ", end="")
    _show_parts(answer if settings.streams else ["".join(answer)])
    get_logger().info(f"answered in {answer.seconds:.1f} s: {answer.speed()}")


def _checked_style(settings: InferenceSettings, folder: Path) -> PromptStyle:
    """The form of prompts for a folder, whose files are checked."""
    loading.check_files(folder, given=settings.model_path)
    return choose_style(settings.prompt_style, folder, settings.model_path)


def _show_parts(parts: Iterable[str]) -> None:
    """Print the parts of an answer as they come, and end its line, even if it ends early."""
    try:
        for part in parts:
            show(part, end="")
    finally:
        show("")


def _refuse_broken_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--input_txt is not valid UTF-8 from character {error.start} on; use a UTF-8 terminal")
