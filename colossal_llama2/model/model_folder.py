"""Which files of a model folder are opened, and which make the folder unusable. The folder may come from anyone.

These are opened: config.json, generation_config.json, the safetensors file or the index with the files it names, and
the tokenizer's files. All of them must be regular files. Pickles and code beside them (*.bin, *.pt, *.py) are never
opened and never a reason to refuse: Meta's own LLaMA-2 folders have both kinds of weights.

An adapter is refused. With one, transformers would look for peft, load the base model that adapter_config.json names
instead of the weights beside it, and let peft unpickle the adapter, which runs code (CVE-2025-32434).
"""

import os
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import is_regular, read_settings
from colossal_llama2.storage.json_input import shown

# A path, or what stands for one, such as `config_fields.ModelFolder`.
StrPath = str | os.PathLike[str]

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PATTERNS = (ADAPTER_CONFIG, "adapter_model*")


def check_no_adapter(folder: Path) -> None:
    """Raise a UserError if there is an adapter in a model folder."""
    found = sorted(path.name for pattern in ADAPTER_PATTERNS for path in folder.glob(pattern))
    # glob does not find a dangling link by a pattern without wildcards.
    if not found and os.path.lexists(folder / ADAPTER_PATTERNS[0]):
        found = [ADAPTER_PATTERNS[0]]
    if found:
        merged = "; if the weights beside it are merged already, remove it" if has_weights(folder) else ""
        raise UserError(
            f"{folder} has {', '.join(found)}, an adapter, which is not loaded here; first merge it into its base: "
            f"python -m colossal_llama2.model.merge_lora --base_model_path BASE --adapter_path {folder} "
            f"--target_model_path NEW{merged}"
        )


def check_model_files(folder: Path) -> None:
    """Check the names and types of the files that a model is read from. Opens only JSON.

    Raises:
        UserError: there is an adapter, or a file that would be opened is not a regular file.
    """
    check_no_adapter(folder)
    for name in (CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE):
        is_regular(folder / name)
    if is_regular(folder / GENERATION_CONFIG_FILE):
        read_settings(folder / GENERATION_CONFIG_FILE, allows_mark=True)


def has_weights(folder: Path) -> bool:
    """Whether the folder has a safetensors file or an index of several, under their usual names."""
    return any(is_regular(folder / name) for name in (WEIGHTS_FILE, INDEX_FILE))


def shard_names(path: StrPath) -> tuple[str, ...]:
    """File names of a checkpoint's safetensors, in order.

    Raises:
        UserError: the index is damaged, or names a file outside the folder.
    """
    folder = Path(path)
    # If both exist, transformers and ColossalAI load the single file.
    if is_regular(folder / WEIGHTS_FILE):
        return (WEIGHTS_FILE,)
    return tuple(sorted(set(weight_map(folder).values())))


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the index. Raises UserError if it names anything but files of the folder."""
    path = folder / INDEX_FILE
    try:
        names = read_settings(path).get("weight_map")
    except UserError as error:
        raise UserError(f"{error}; it is not an index of weights")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path}: not an index of weights (no weight_map); copy it again from its source")
    for name in names.values():
        # A path could lead out of the folder: out of the source when reading, out of the target when copying.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names {shown(name)}; only plain *.safetensors file names are allowed")
    return names
