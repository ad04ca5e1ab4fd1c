"""The files of a checkpoint without tensors. They are built before step 1, so that no save fails on them later."""

from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.encoding.registry import kind_of
from colossal_llama2.errors import UserError
from colossal_llama2.model.adapter_files import adapter_files
from colossal_llama2.model.exported_configs import ModelConfigs, accepted_generation
from colossal_llama2.model.loading import dtype_of
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.model.tied_weights import OUTPUT_EMBEDDING
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.model.training_history import Weights
from colossal_llama2.storage.files import contents_of, to_json
from colossal_llama2.train.settings.model_source import ModelSource


def model_files(model_path: StrPath, tokenizer_path: str, precision: str) -> dict[str, bytes]:
    """The small files of a saved model, by path inside its folder: both configurations and the tokenizer.

    Logs the differences of the configurations from those that the run began with.

    Raises:
        UserError: a configuration is damaged, a file cannot be read, or a name or text is not UTF-8.
    """
    configs = ModelConfigs(model_path)
    configs.generation, changes = accepted_generation(configs.generation)
    for change in [*configs.changes, *changes]:
        logs.get_logger().info("In the saved model: %s", change)
    files = contents_of(Path(tokenizer_path), kind_of(tokenizer_path).encoder.files)
    for name in files:
        encoded(name, f"a file of the tokenizer in {tokenizer_path}")
    dtype = str(dtype_of(precision)).removeprefix("torch.")
    for name, content in configs.exported(dtype).items():
        files[name] = encoded(to_json(content), str(Path(model_path, name)))
    return files


def files_of_adapter(trainable: Trainable, source: ModelSource, base: Weights) -> dict[str, bytes]:
    """The small files of an adapter besides those of `model_files`, by name; none if the run trains no adapter.

    Args:
        base: the hashes of the weights that it is trained on.
    """
    if trainable.adapter is None:
        return {}
    saves_embeddings = trainable.saved_name(OUTPUT_EMBEDDING) is not None
    # Of tied embeddings only the first is saved. PEFT finds it by its name; as a module of its own it would untie it.
    saves_embeddings = saves_embeddings and not source.weights_folder.fields["tie_word_embeddings"]
    contents = adapter_files(trainable.adapter, base_path=source.weights, base=base, saves_embeddings=saves_embeddings)
    return {name: encoded(to_json(content), name) for name, content in contents.items()}


def json_bytes(content: Any, what: str) -> bytes:
    """The bytes that `write_json` writes. Raises UserError if the content cannot be written as JSON in UTF-8."""
    try:
        return encoded(to_json(content), what)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} cannot be saved as JSON ({error})")


def encoded(text: str, what: str) -> bytes:
    """The text in UTF-8. Raises UserError, with `what` it is part of, if it is not valid Unicode."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        broken = ascii(text[max(error.start - 20, 0) : error.start + 20])
        raise UserError(f"{what}: {broken} is not UTF-8; rename it, or write it again")
