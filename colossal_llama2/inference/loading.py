"""Load a model for inference, from a folder or the Hugging Face hub, without unpickling anything.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.errors import RunError, UserError
from colossal_llama2.inference.cpu_speed import choose_on_cpu
from colossal_llama2.logs import get_logger
from colossal_llama2.model.config_fields import llama_config, read_fields
from colossal_llama2.model.loading import check_model, dtype_of, generation_ids
from colossal_llama2.model.model_folder import check_model_files, shard_names
from colossal_llama2.model.tied_weights import check_is_one_matrix
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.storage.given_paths import is_hub_name, no_folder
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Everything that a model needs, and nothing that would have to be unpickled or executed.
DOWNLOADED_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def load_model(
    model_path: str, device: str | None, *, dtype: str = "auto", rows: int = 1
) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """Load a model for inference and its tokenizer.

    Args:
        model_path: a folder with config.json and safetensors, or the name of such a model on Hugging Face.
        device: "cpu", "cuda", "cuda:N", or None for cuda:0 where there is a GPU and cpu elsewhere.
        dtype: "fp32", "bf16", "fp16", or "auto": on a GPU as the weights are stored, on CPUs what `cpu_speed` chooses.
        rows: how many prompts will be continued together, for that choice.

    Returns:
        The model on `device` in eval mode, and its tokenizer.

    Raises:
        UserError: there is no such folder, name or device, or weights are missing or pickled.
    """
    target = resolve_device(device)
    folder = local_folder(model_path)
    check_files(folder, given=model_path)
    return load_folder(folder, target, given=model_path, dtype=dtype, rows=rows)


def load_folder(
    folder: Path, device: "torch.device", *, given: str, dtype: str, rows: int
) -> tuple["LlamaForCausalLM", "PreTrainedTokenizerBase"]:
    """The same for a folder that `check_files` accepted. `given` is --model_path, for messages."""
    from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer

    get_logger().info(f"loading {given} onto {device}")
    tokenizer = load_tokenizer(str(folder))
    precision: str | None = dtype
    if dtype == "auto":
        precision = choose_on_cpu(folder, rows=rows) if device.type == "cpu" else None
    model = _read_weights(folder, given=given, precision=precision)
    rows_of_model = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows_of_model:
        raise UserError(
            f"{given}: its tokenizer has {len(tokenizer):,} tokens but its model only {rows_of_model:,} embeddings; "
            f"copy the tokenizer that the model was trained with, or run init_model.py, which adds the missing rows"
        )
    return model.to(device).eval(), tokenizer


def _read_weights(folder: Path, *, given: str, precision: str | None) -> "LlamaForCausalLM":
    """The LLaMA in `folder`, in fp32, bf16 or fp16, or as it is stored for None.

    Raises:
        UserError: a broken file, missing or NaN/Inf weights, numbers too large for fp16, or unequal tied embeddings.
    """
    import torch
    from transformers import LlamaForCausalLM

    check_model_files(folder)
    cure = "use --dtype bf16 or fp32" if precision == "fp16" else "give the model in bfloat16 or float32"
    check_numbers(str(folder), precision, cure=cure)
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
                torch_dtype="auto" if precision is None else dtype_of(precision),
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


def precision_of(model: "LlamaForCausalLM") -> str:
    """fp32, bf16 or fp16: the precision that a model computes in."""
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return names.get(model.dtype, str(model.dtype))


@contextlib.contextmanager
def memory_errors_named(device: str | None, *, cure: str = "use --device cpu") -> Iterator[None]:
    """Turn a GPU's out-of-memory error into a RunError that names the device and the cure."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise RunError(f"--device {device or 'cuda:0'} has too little memory ({_first_line(error)}); {cure}")


def refuse_missing_folder(model_path: str) -> None:
    """Raise a UserError for a path that is neither a folder nor OWNER/NAME of a model on the hub."""
    if not Path(model_path).is_dir() and not is_hub_name(model_path):
        raise UserError(
            f"--model_path {model_path}: {no_folder(model_path)}; give the folder that holds config.json, or "
            f"OWNER/NAME of a model on the Hugging Face hub"
        )


def quiet_libraries() -> None:
    """Keep stderr to our own lines: no hints from transformers, and progress bars only on a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers_logging.disable_progress_bar()


def resolve_device(device: str | None) -> "torch.device":
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


def local_folder(model_path: str) -> Path:
    """`model_path` if it is a folder, else the folder of Hugging Face's cache with the files of that model."""
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    refuse_missing_folder(model_path)

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


def check_files(folder: Path, *, given: str) -> None:
    """Raise a UserError unless the folder has a LLaMA model whose weights can be read without unpickling."""
    if not (folder / "config.json").exists() and (folder / "modeling" / "config.json").is_file():
        raise UserError(f"--model_path {given} has no config.json; its model is {given.rstrip('/')}/modeling")
    check_model(str(folder), "--model_path")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A heading alone is not informative.
    return " ".join(lines[: 2 if lines[0].endswith((":", ";")) else 1]).rstrip(".") if lines else type(error).__name__
