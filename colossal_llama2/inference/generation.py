"""Generate text with a trained model: load it safely, continue one prompt, cut the answer out by tokens.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.logs import get_logger
from colossal_llama2.model.config_fields import llama_config, read_fields
from colossal_llama2.model.loading import check_model, generation_ids
from colossal_llama2.model.model_folder import check_model_files, shard_names
from colossal_llama2.model.positions import positions_of
from colossal_llama2.model.tied_weights import check_is_one_matrix
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.plurals import counted
from colossal_llama2.storage.given_paths import is_hub_name, no_folder
from colossal_llama2.storage.unpickling_guard import unpickling_refused
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    import torch
    from transformers import BatchEncoding, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

# The published models were trained to continue after this mark (README of Colossal-LLaMA-2-7B-base).
PROMPT_SUFFIX = "\n\n->\n\n"
# Everything that a model needs, and nothing that would have to be unpickled or executed.
DOWNLOADED_FILES = ("*.json", "*.safetensors", "tokenizer.model")


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated.

    Attributes:
        max_new_tokens: most tokens to generate, the prompt not counted.
        do_sample: draw each token; if false, the most likely one is chosen and the attributes below have no effect.
        temperature: divides the logits.
        top_k: number of most likely tokens to draw from.
        top_p: total probability of the most likely tokens to draw from.
        seed: seeds PyTorch's global generators; None leaves them as they are.
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | None


@dataclass(frozen=True)
class InferenceSettings:
    """The flags of inference_example.py.

    Attributes:
        model_path: a folder, or the name of a model on Hugging Face.
        device: "cpu", "cuda", "cuda:N", or None for cuda:0 where there is a GPU and cpu elsewhere.
        input_txt: the prompt.
    """

    model_path: str
    device: str | None
    input_txt: str
    generation: GenerationSettings

    @classmethod
    def from_flags(
        cls, *, model_path: str, device: str | None, input_txt: str, **generation: Any
    ) -> "InferenceSettings":
        """The settings from the values of all flags, by name."""
        return cls(model_path, device, input_txt, GenerationSettings(**generation))


def answer_prompt(settings: InferenceSettings) -> None:
    """Load the model, continue the prompt, and print prompt and answer to stdout.

    Both are printed for people, also into a file, which may be shown on a terminal later: line feeds and tabs stay,
    other control characters are escaped. `generate` returns the exact text.

    Raises:
        UserError: the flags, the model's folder or its files cannot be used.
        RunError: the GPU runs out of memory.
    """
    model_path, device, input_txt = settings.model_path, settings.device, settings.input_txt
    _refuse_broken_text(input_txt)
    _refuse_missing_folder(model_path)
    if Path(model_path).is_dir():
        # Before the seconds that importing torch takes.
        _check_files(Path(model_path), given=model_path)
    _quiet_libraries()
    with memory_errors_named(device):
        model, tokenizer = load_model(model_path, device)
        start = time.monotonic()
        answer = generate(model, tokenizer, input_txt + PROMPT_SUFFIX, settings.generation)
    get_logger().info(f"answered in {time.monotonic() - start:.1f} s")
    show(f"Prompt: {input_txt}\nAnswer: {answer}")


def load_model(model_path: str, device: str | None) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """Load a model for inference and its tokenizer.

    Args:
        model_path: a folder with config.json and safetensors, or the name of such a model on Hugging Face.
        device: "cpu", "cuda", "cuda:N", or None for cuda:0 where there is a GPU and cpu elsewhere.

    Returns:
        The model on `device` in eval mode, and its tokenizer.

    Raises:
        UserError: there is no such folder, name or device, or weights are missing or pickled.
    """
    target = _resolve_device(device)
    folder = _local_folder(model_path)
    _check_files(folder, given=model_path)

    import torch

    from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer

    get_logger().info(f"loading {model_path} onto {target}")
    tokenizer = load_tokenizer(str(folder))
    # On a GPU, the checkpoint's own number format. On CPUs without half-precision instructions, its kernels in PyTorch
    # are many times slower than the float32 ones, and some are missing: hence float32.
    model = _read_weights(folder, given=model_path, dtype=torch.float32 if target.type == "cpu" else "auto")
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{model_path}: its tokenizer has {len(tokenizer):,} tokens but its model only {rows:,} embeddings; "
            f"copy the tokenizer that the model was trained with, or run init_model.py, which adds the missing rows"
        )
    return model.to(target).eval(), tokenizer


def generate(
    model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", prompt: str, settings: GenerationSettings
) -> str:
    """Continue `prompt`, which is not changed, and return only the new text.

    The answer is what follows the prompt's last token; it ends before an end-of-text token.

    Raises:
        UserError: the prompt alone fills the model's context.
    """
    import torch
    from transformers import GenerationConfig

    inputs = _encoded_prompt(tokenizer, prompt).to(model.device)
    prompt_length = inputs["input_ids"].shape[1]
    # Rows without a token, such as padding to a round number.
    tokenless = list(range(len(tokenizer), model.get_output_embeddings().weight.shape[0]))
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    config = GenerationConfig(
        max_new_tokens=_fit_context(model, prompt_length=prompt_length, max_new_tokens=settings.max_new_tokens),
        do_sample=settings.do_sample,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenless or None,
        **(sampling if settings.do_sample else {}),
    )
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    with torch.inference_mode(), _as_generation_config(model, config):
        sequences = model.generate(**inputs, generation_config=config)
    # Spaces before punctuation stay as they were generated.
    return tokenizer.decode(sequences[0, prompt_length:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _encoded_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> "BatchEncoding":
    """The (1, tokens) ids of a prompt, which begins as a document in training does: with the encoder's mark, if any.

    Many tokenizers of byte-level BPE, such as SmolLM2's, have a bos_token that transformers does not add.

    Raises:
        UserError: the prompt has a character that the tokenizer would drop.
    """
    import torch

    try:
        encoder = shared_encoder(tokenizer.name_or_path)
    except UserError:  # a kind of tokenizer that only transformers reads
        problem, mark = None, tokenizer.bos_token_id
    else:
        problem, mark = encoder.problem_of(prompt), encoder.bos_id if encoder.bos_id >= 0 else None
    if problem:
        raise UserError(f"the prompt cannot be used: {problem}; change --input_txt")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    if mark is not None and ids[0, :1].tolist() != [mark]:
        text = tokenizer.convert_ids_to_tokens(mark)
        get_logger().info(f"the prompt begins with {text}, as documents do in training")
        inputs["input_ids"] = torch.cat([torch.tensor([[mark]]), ids.long()], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


@contextlib.contextmanager
def _as_generation_config(model: "LlamaForCausalLM", config: "GenerationConfig") -> Iterator[None]:
    """Replace the model's own settings for a while, whose leftovers `generate` would mix with those it is given.

    transformers 4 has an argument for this, transformers 5 none.
    """
    held = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = held


@contextlib.contextmanager
def memory_errors_named(device: str | None) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a RunError that names the device."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RunError(f"--device {device or 'cuda:0'} has too little memory ({_first_line(error)}); use --device cpu")


def _refuse_broken_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"--input_txt is not valid UTF-8 from character {error.start} on; use a UTF-8 terminal")


def _refuse_missing_folder(model_path: str) -> None:
    """Raise a UserError for a path that is neither a folder nor OWNER/NAME of a model on the hub."""
    if not Path(model_path).is_dir() and not is_hub_name(model_path):
        raise UserError(
            f"--model_path {model_path}: {no_folder(model_path)}; give the folder that holds config.json, or "
            f"OWNER/NAME of a model on the Hugging Face hub"
        )


def _quiet_libraries() -> None:
    """Keep stderr to our own lines: no hints from transformers, and progress bars only on a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _resolve_device(device: str | None) -> "torch.device":
    """The torch.device of `--device`. Raises UserError if this machine does not have it."""
    import torch

    if device is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} given; cpu, cuda or cuda:N allowed")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device} given but {_count_gpus(torch.cuda.device_count())} here; use --device cpu")
    return target


def _count_gpus(count: int) -> str:
    return {0: "there is no GPU", 1: "only cuda:0 is"}.get(count, f"only cuda:0 to cuda:{count - 1} are")


def _local_folder(model_path: str) -> Path:
    """`model_path` if it is a folder, else the folder of Hugging Face's cache with the files of that model."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    _refuse_missing_folder(model_path)

    from huggingface_hub import snapshot_download

    get_logger().info(f"{model_path} is not a local folder; downloading the model of this name from Hugging Face")
    try:
        return Path(snapshot_download(model_path, allow_patterns=list(DOWNLOADED_FILES)))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # such as a full disk: not about the name
        raise UserError(
            f"--model_path {model_path} is neither a local folder nor a model that can be downloaded from Hugging Face "
            f"({_first_line(error)}); give the folder that holds config.json"
        )


def _check_files(folder: Path, *, given: str) -> None:
    """Raise a UserError unless the folder has a LLaMA model whose weights can be read without unpickling."""
    if not (folder / "config.json").exists() and (folder / "modeling" / "config.json").is_file():
        raise UserError(f"--model_path {given} has no config.json; its model is {given.rstrip('/')}/modeling")
    check_model(str(folder), "--model_path")


def _read_weights(folder: Path, *, given: str, dtype: "torch.dtype | str") -> "LlamaForCausalLM":
    """The LLaMA in `folder`. Raises UserError for a broken file, missing or NaN/Inf weights, or unequal tied ones."""
    import torch
    from transformers import LlamaForCausalLM

    check_model_files(folder)
    held = None if dtype == "auto" else {torch.float32: "F32"}[dtype]
    check_numbers(str(folder), held, cure="give the model in bfloat16 or float32")
    config = llama_config(folder)
    # transformers would use the input embedding for both.
    problem = check_is_one_matrix(folder, shard_names(str(folder))) if config.tie_word_embeddings else None
    if problem:
        raise UserError(problem)
    try:
        with warnings.catch_warnings(), unpickling_refused():
            warnings.simplefilter("ignore", UserWarning)
            model, report = LlamaForCausalLM.from_pretrained(
                folder,
                config=config,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (torch.cuda.OutOfMemoryError, RunError):
        raise
    except Exception as error:  # transformers does not document what it raises for invalid entries
        raise UserError(f"--model_path {given} cannot be loaded: {_first_line(error)}; save or copy the model again")
    if report["missing_keys"]:
        # transformers would fill them with random numbers.
        names = sorted(report["missing_keys"])
        raise UserError(
            f"--model_path {given} lacks {len(names)} of its weights, such as {names[0]}; save or copy the model again"
        )
    # Only these ids of generation_config.json are used.
    model.generation_config.update(**generation_ids(folder, read_fields(folder)))
    return model


def _fit_context(model: "LlamaForCausalLM", *, prompt_length: int, max_new_tokens: int) -> int:
    """`max_new_tokens`, reduced to the room that the prompt leaves in the model's context. Lengths are in tokens."""
    context = positions_of(model.config)
    if prompt_length + max_new_tokens <= context:
        return max_new_tokens
    room = context - prompt_length
    if room < 1:
        raise UserError(
            f"the prompt has {counted(prompt_length, 'token')}, the model's context has {context:,}: "
            f"no room for an answer; shorten --input_txt"
        )
    get_logger().info(
        f"the prompt has {counted(prompt_length, 'token')} and the model's context has {context:,}: "
        f"generating at most {counted(room, 'new token')}, not {max_new_tokens:,}"
    )
    return room


def _end_tokens(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    """Ids that end a text, or None: the tokenizer's, and the model's own, which may be one number or several."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in [tokenizer.eos_token_id, *ends] if token is not None}) or None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A heading alone is not informative.
    return " ".join(lines[: 2 if lines[0].endswith((":", ";")) else 1]).rstrip(".") if lines else type(error).__name__
