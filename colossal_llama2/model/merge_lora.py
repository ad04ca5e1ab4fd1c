"""Merge a LoRA adapter of train.py or train_sft.py into its base model.

    python -m colossal_llama2.model.merge_lora --base_model_path llama-2-7b-zh \\
        --adapter_path checkpoint_dir/modeling --target_model_path llama-2-7b-zh-chat

A matrix W of the base becomes W + alpha / rank x B A, computed in float32 and rounded to the dtype of W. Embeddings
that were trained replace those of the base. All other tensors are copied as bytes, so memory is needed for the adapter
and a few rows. Configuration, tokenizer and training history are those of the adapter's folder.

The base must be the model that the adapter was trained on: the hash of each file of its weights is compared.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.registry import kind_of, load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.layer_matrices import module_of
from colossal_llama2.model import adapter_files, training_history
from colossal_llama2.model.adapter_files import Adapter
from colossal_llama2.model.config_fields import CONFIG_FILE, TOKEN_ID_FIELDS, fields_of, read_fields
from colossal_llama2.model.exported_configs import CODE_KEYS
from colossal_llama2.model.loading import check_model
from colossal_llama2.model.lora import PEFT_PREFIX
from colossal_llama2.model.model_folder import (
    ADAPTER_CONFIG,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_model_files,
)
from colossal_llama2.model.safetensors_stream import FLOATS, Rewrite, Shard, read_shards, rewrite_shard
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import (
    check_can_create,
    contents_of,
    sync,
    temporary_folder,
    write_contents,
    write_json,
)
from colossal_llama2.storage.given_paths import check_is_folder
from colossal_llama2.storage.input_files import read_settings
from colossal_llama2.storage.json_input import shown
from colossal_llama2.storage.publishing import check_space, claimed, publish, remove_leftovers
from colossal_llama2.terminal_text import show_line

if TYPE_CHECKING:
    import torch

# The fields of config.json that may differ between the base and what was trained on it.
FREE_FIELDS = ("torch_dtype", "use_cache", *TOKEN_ID_FIELDS)


@dataclass(frozen=True)
class MergeSettings:
    """The flags of merge_lora.py."""

    base_model_path: str
    adapter_path: str
    target_model_path: str


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's) and merge."""
    args = tokenizer_flags.merge_lora_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("merge_lora.py"):
        merge_lora(MergeSettings(**vars(args)))


def merge_lora(settings: MergeSettings) -> None:
    """Write the base with the adapter merged into it to a new folder.

    Raises:
        UserError: something is wrong with the folders, or they do not belong together. Nothing was written.
        RunError: there is too little space on the disk. Nothing was written.
    """
    base, target = Path(settings.base_model_path), Path(os.path.abspath(settings.target_model_path))
    check_is_folder(settings.base_model_path, "--base_model_path", "give the model that the adapter was trained on")
    check_is_folder(settings.adapter_path, "--adapter_path", "give the modeling/ folder of a run with --lora_rank")
    remove_leftovers(target)
    _check_target(target)
    adapter = _read_adapter(settings.adapter_path)
    check_model_files(base)
    check_model(base, "--base_model_path")
    config = _merged_config(adapter, base)
    stored = adapter_files.check_adapter_weights(adapter, read_fields(base))
    kind = kind_of(adapter.folder)
    adapter_files.check_base(adapter, base, adapter_files.weights_hashes(base), flag="--base_model_path")
    check_numbers(str(base), None)
    rewrites = _rewrites(adapter, set(stored))
    # Before the weights, which take long.
    load_encoder(adapter.folder)
    check_tokenizer_files(adapter.folder)
    small = contents_of(adapter.folder, (*kind.encoder.files, GENERATION_CONFIG_FILE))
    shards = read_shards(base)
    check_space(target.parent, sum(shard.path.stat().st_size for shard in shards))
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder, claimed(folder):
        _write_weights(base, folder, shards, rewrites)
        write_json(folder / CONFIG_FILE, {**config, **_dtype_entry(config, shards)})
        write_contents(folder, small)
        _write_history(adapter, folder)
        publish(folder, target, replace=False)
    show_line(f"written to {target}: {counted(len(rewrites), 'tensor')} of {base} changed by {adapter.folder}")


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(f"--target_model_path {target} already exists; give a new folder")
    check_can_create(target, "--target_model_path")


def _read_adapter(path: str) -> Adapter:
    if not adapter_files.is_adapter(path):
        inside = Path(path, "modeling")
        cure = f"give {inside}" if adapter_files.is_adapter(inside) else "give the modeling/ of a run with --lora_rank"
        raise UserError(f"--adapter_path {path}: has no {ADAPTER_CONFIG}; {cure}")
    return adapter_files.read_adapter(path)


def _merged_config(adapter: Adapter, base: Path) -> dict[str, Any]:
    """The config.json of the adapter's folder. Raises UserError if it is that of another model than the base."""
    path = adapter.folder / CONFIG_FILE
    config = {key: value for key, value in read_settings(path, allows_mark=True).items() if key not in CODE_KEYS}
    for key, allowed in (("model_type", ("llama",)), ("quantization_config", (None, {}))):
        if config.get(key) not in allowed:
            raise UserError(f"{path}: {key} is {shown(config.get(key))}; give an adapter of an unquantized LLaMA")
    found, expected = fields_of(config, path), read_fields(base)
    for name, value in expected.items():
        if name not in FREE_FIELDS and found.get(name) != value:
            raise UserError(
                f"{path}: {name} is {found.get(name)!r:.80}, that of --base_model_path {base} is {value!r:.80}; give "
                f"the model that the adapter was trained on"
            )
    return config


def _dtype_entry(config: dict[str, Any], shards: Sequence[Shard]) -> dict[str, str]:
    """The entry of config.json for the dtype of the weights: that of the base, whatever the adapter was trained in."""
    stored = next(shard.tensors[INPUT_EMBEDDING]["dtype"] for shard in shards if INPUT_EMBEDDING in shard.tensors)
    # transformers 5 writes "dtype", 4 writes "torch_dtype".
    key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
    return {key: FLOATS[stored][0]}


def _rewrites(adapter: Adapter, names: set[str]) -> dict[str, Rewrite]:
    """How each tensor of the base that the adapter changes is computed, by name.

    Raises UserError if a number of the adapter is NaN or infinite.
    """
    from safetensors.torch import load_file

    tensors = load_file(adapter.weights_file)
    for name, tensor in tensors.items():
        adapter_files.check_finite(tensor, name, adapter.weights_file)
    rewrites: dict[str, Rewrite] = {}
    for matrix in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
        if PEFT_PREFIX + matrix in names:
            rewrites[matrix] = _replacing(tensors[PEFT_PREFIX + matrix])
    if INPUT_EMBEDDING in rewrites and OUTPUT_EMBEDDING not in rewrites:
        # Tied embeddings, which a folder may store under both of their names.
        rewrites[OUTPUT_EMBEDDING] = rewrites[INPUT_EMBEDDING]
    scale = adapter.shape.alpha / adapter.shape.rank
    layers = {name.split(".")[4] for name in names if ".lora_A." in name}
    for layer in layers:
        for target in adapter.shape.targets:
            name = f"model.layers.{layer}.{module_of(target)}.{target}"
            a, b = (tensors[f"{PEFT_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
            rewrites[f"{name}.weight"] = _adding(f"{name}.weight", a, b * scale, adapter)
    return rewrites


def _replacing(values: "torch.Tensor") -> Rewrite:
    return lambda first, rows: values[first : first + len(rows)].float()


def _adding(name: str, a: "torch.Tensor", b: "torch.Tensor", adapter: Adapter) -> Rewrite:
    def add(first: int, rows: "torch.Tensor") -> "torch.Tensor":
        values = rows.float() + b[first : first + len(rows)] @ a
        if not values.isfinite().all():
            raise UserError(
                f"{adapter.folder}: with this adapter {name} is NaN or infinite (lora_alpha {adapter.shape.alpha:g}); "
                "take another adapter"
            )
        return values

    return add


def _write_weights(base: Path, folder: Path, shards: Sequence[Shard], rewrites: dict[str, Rewrite]) -> None:
    total = sum(shard.path.stat().st_size for shard in shards)
    with logs.progress(total=total, description="weights", unit="B", unit_scale=True) as bar:
        advance: Callable[[int], None] = bar.update
        for shard in shards:
            path = folder / shard.path.name
            rewrite_shard(shard, path, rewrites, advance)
            sync(path)
    if shards[0].path.name != WEIGHTS_FILE:
        write_json(folder / INDEX_FILE, read_settings(base / INDEX_FILE))


def _write_history(adapter: Adapter, folder: Path) -> None:
    """Write the adapter's history, whose last stage now made these weights."""
    history = training_history.read_history(adapter.folder)
    training_history.log_problem(history)
    if not history.stages or history.base_model is None:
        return
    *before, last = history.stages
    stage = {**last, "weights": training_history.weights_of(str(folder), {})}
    content = history._replace(stages=before).followed_by(stage, base_model=history.base_model)
    write_json(folder / training_history.HISTORY_FILE, content)


if __name__ == "__main__":
    main()
