"""The files of a checkpoint without tensors. They are built before step 1, so that no save fails on them later."""

from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.chat.folder_chat import colossal_template_of
from colossal_llama2.chat.templates import template_of_folder
from colossal_llama2.dataset.layout.chat_data import ChatData
from colossal_llama2.encoding.file_names import CONFIG_FILE as TOKENIZER_CONFIG
from colossal_llama2.encoding.file_names import TEMPLATE_FILE, TEMPLATE_JSON_FILE, TEMPLATES_FOLDER
from colossal_llama2.encoding.registry import kind_of
from colossal_llama2.errors import UserError
from colossal_llama2.model.adapter_files import adapter_files
from colossal_llama2.model.exported_configs import ModelConfigs, accepted_generation
from colossal_llama2.model.loading import dtype_of
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.model.purpose import Purpose
from colossal_llama2.model.tied_weights import OUTPUT_EMBEDDING
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.model.training_history import Weights
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import contents_of, to_json
from colossal_llama2.train.settings.model_source import ModelSource


def model_files(
    model_path: StrPath, tokenizer_path: str, precision: str, *, stage: str, chat: ChatData | None = None
) -> dict[str, bytes]:
    """The small files of a saved model, by path inside its folder: both configurations and the tokenizer.

    Logs the differences from the files that the run began with.

    Args:
        stage: pretrain or sft, which config.json records.
        chat: the template of the conversations that the model is trained on; it replaces the tokenizer's own.

    Raises:
        UserError: a configuration is damaged, a file cannot be read, or a name or text is not UTF-8.
    """
    configs = ModelConfigs(model_path)
    changes = configs.set_purpose(Purpose(stage, chat.name if chat else None))
    if chat is not None:
        changes += configs.add_ends(chat.turn_ends)
    configs.generation, accepted = accepted_generation(configs.generation)
    files = contents_of(Path(tokenizer_path), kind_of(tokenizer_path).encoder.files)
    for name in files:
        encoded(name, f"a file of the tokenizer in {tokenizer_path}")
    if chat is not None:
        changes += _replace_template(files, chat, tokenizer_path)
    dtype = str(dtype_of(precision)).removeprefix("torch.")
    for name, content in configs.exported(dtype).items():
        files[name] = encoded(to_json(content), str(Path(model_path, name)))
    for change in [*configs.changes, *changes, *accepted]:
        logs.get_logger().info("In the saved model: %s", change)
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


def _replace_template(files: dict[str, bytes], chat: ChatData, tokenizer_path: str) -> list[str]:
    """Make `chat` the only template among a tokenizer's files, as transformers 5 saves it. Returns what was changed."""
    # Early versions prepared data that records none.
    text = colossal_template_of(tokenizer_path) if chat.text is None else chat.text
    own = template_of_folder(tokenizer_path)
    for name in list(files):
        if name == TEMPLATE_JSON_FILE or Path(name).parts[0] == TEMPLATES_FOLDER:
            del files[name]
    if TOKENIZER_CONFIG in files:
        settings = json_input.parse(files[TOKENIZER_CONFIG])
        if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
            files[TOKENIZER_CONFIG] = encoded(to_json(settings), TOKENIZER_CONFIG)
    files[TEMPLATE_FILE] = encoded(text, TEMPLATE_FILE)
    if own is not None and own[0].strip() == text.strip():
        return []
    instead = f", in place of that of {own[1]}" if own else ""
    return [f"{TEMPLATE_FILE} is the template of the data, {chat.name}{instead}"]


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
