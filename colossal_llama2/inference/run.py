"""What inference_example.py does: load the model, then answer one prompt, answer those of a file, or chat."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.inference import loading
from colossal_llama2.inference.answer import Answer
from colossal_llama2.inference.answer_file import AnswerFile, model_digest
from colossal_llama2.inference.batch import answer_prompts, check_form
from colossal_llama2.inference.chat import Chat
from colossal_llama2.inference.generation import log_short_room
from colossal_llama2.inference.prompt_file import FilePrompt, content_digest, read_prompts
from colossal_llama2.inference.prompts import PromptStyle, choose_style, log_style, prompt_ids
from colossal_llama2.inference.settings import InferenceSettings
from colossal_llama2.logs import get_logger
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase


def run(settings: InferenceSettings) -> None:
    """Load the model, continue the prompts or the messages of a chat, and print them with the answers to stdout.

    Texts are printed for people, also into a file, which may be shown on a terminal later: line feeds and tabs stay,
    other control characters are escaped. `generation.generate` and --output_file have the exact text.

    Raises:
        UserError: the flags, the model's folder, its files or the prompts cannot be used.
        RunError: the GPU runs out of memory.
    """
    if sys.stdout is None and settings.output_file is None and not settings.interactive:
        raise UserError("stdout, where answers are printed, is closed; open it, or give --input_file and --output_file")
    prompts = _prompts(settings)
    loading.refuse_missing_folder(settings.model_path)
    given = Path(settings.model_path)
    # Before the seconds that importing torch takes.
    job = _Job.of(settings, given, prompts) if given.is_dir() else None
    if job is not None and job.is_done(prompts):
        return
    loading.quiet_libraries()
    cure = "use a smaller --batch_size, or --device cpu" if settings.input_file is not None else "use --device cpu"
    with loading.memory_errors_named(settings.device, cure=cure):
        device = loading.resolve_device(settings.device)
        folder = loading.local_folder(settings.model_path)
        job = job or _Job.of(settings, folder, prompts)
        log_style(job.style)
        rows = 1 if settings.interactive else min(settings.batch_size, len(prompts) * settings.num_return_sequences)
        dtype = (job.answers and job.answers.dtype) or settings.dtype
        model, tokenizer = loading.load_folder(folder, device, given=settings.model_path, dtype=dtype, rows=rows)
        if settings.interactive:
            Chat(model, tokenizer, job.style.name, settings.generation, streams=settings.streams).run()
        elif settings.input_file is None and settings.num_return_sequences == 1:
            _answer_one(settings, model, tokenizer, job.style)
        else:
            answer_prompts(model, tokenizer, job.style.name, prompts, settings, job.answers)


class _Job(NamedTuple):
    """The form of prompts, and the file of answers if there is one."""

    style: PromptStyle
    answers: AnswerFile | None

    @classmethod
    def of(cls, settings: InferenceSettings, folder: Path, prompts: Sequence[FilePrompt]) -> "_Job":
        """Those for a model's folder, all of which is checked without torch."""
        loading.check_files(folder, given=settings.model_path)
        style = choose_style(settings.prompt_style, folder, settings.model_path)
        check_form(prompts, style.name)
        if settings.output_file is None or settings.input_file is None:
            return cls(style, None)
        decides = {
            "input": content_digest(settings.input_file),
            "model": model_digest(folder),
            "prompt_style": style.name,
            "dtype": None if settings.dtype == "auto" else settings.dtype,
            "num_return_sequences": settings.num_return_sequences,
            **asdict(settings.generation),
        }
        return cls(style, AnswerFile(settings.output_file, decides, prompts=len(prompts)))

    def is_done(self, prompts: Sequence[FilePrompt]) -> bool:
        """Whether all answers are there already, which is logged."""
        is_done = self.answers is not None and self.answers.done == len(prompts)
        if is_done:
            get_logger().info(f"all {counted(len(prompts), 'prompt')} are answered already")
        return is_done


def _prompts(settings: InferenceSettings) -> list[FilePrompt]:
    if settings.interactive:
        return []
    if settings.input_file is not None:
        return read_prompts(settings.input_file)
    try:
        settings.input_txt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--input_txt is not valid UTF-8 from character {error.start} on; use a UTF-8 terminal")
    return [FilePrompt("--input_txt", settings.input_txt)]


def _answer_one(
    settings: InferenceSettings, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", style: PromptStyle
) -> None:
    """Answer --input_txt."""
    row = prompt_ids(tokenizer, style.name, settings.input_txt)
    log_short_room(model, prompt_length=len(row), max_new_tokens=settings.generation.max_new_tokens)
    answer = Answer(model, tokenizer, row, settings.generation)
    show(f"Prompt: {settings.input_txt}\nAnswer: ", end="")
    _show_parts(answer if settings.streams else ["".join(answer)])
    get_logger().info(f"answered in {answer.seconds:.1f} s: {answer.speed()}")


def _show_parts(parts: Iterable[str]) -> None:
    """Print the parts of an answer as they come, and end its line, even if it ends early."""
    try:
        for part in parts:
            show(part, end="")
    finally:
        show("")
