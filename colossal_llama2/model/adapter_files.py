"""The files of an adapter, in PEFT's format, with a note of the base model that it was trained on.

    adapter_model.safetensors   A and B of each matrix, and the embeddings if they were trained
    adapter_config.json         rank, alpha and targets, as PEFT reads them
    adapter_base.json           its base: {"version": 1, "weights": {FILE: {"bytes": 613, "sha256": "..."}}}
    config.json, tokenizer ...  as a whole model would have them, for the model that merge_lora.py makes

The folder may come from anyone: only JSON and safetensors are opened, and their content is checked. Of PEFT's many
options only those are accepted that this suite writes. Imports neither torch nor PEFT at the top.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.layer_matrices import LAYER_MATRICES, in_order
from colossal_llama2.model import lora
from colossal_llama2.model.loading import FLOAT_DTYPES, StoredWeight, check_shapes, layer_matrices
from colossal_llama2.model.lora import PEFT_PREFIX, LoraShape
from colossal_llama2.model.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, StrPath, shard_names
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING
from colossal_llama2.model.training_history import Weights
from colossal_llama2.storage import json_input
from colossal_llama2.storage.input_files import ANY_SIZE, check_regular, read_settings
from colossal_llama2.storage.json_input import shown

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from colossal_llama2.model.trainable import Trainable

BASE_NOTE = "adapter_base.json"
VERSION = 1
MAX_RANK = 2**16
# Entries of adapter_config.json with which an adapter computes something else, and the values without effect.
NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": (),
    "layers_pattern": ([], ""),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "exclude_modules": ([],),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "corda_config": (),
    "eva_config": (),
    "loftq_config": ({},),
    "megatron_config": (),
}
# Those that are read here, and those that do not change what an adapter computes.
OTHER_OPTIONS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "init_lora_weights"),
    *("peft_version", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
EMBEDDING_MODULES = ("embed_tokens", "lm_head")
FROM_PEFT = "merge it with PEFT's own merge_and_unload"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, as its JSON files describe it.

    Attributes:
        shape: rank, alpha, dropout and targets; its seed is not recorded.
        base: bytes and hash of each file of the base's weights; None if the folder has no note of it.
    """

    folder: Path
    shape: LoraShape
    base: Weights | None

    @property
    def weights_file(self) -> Path:
        return self.folder / ADAPTER_WEIGHTS


def is_adapter(folder: StrPath) -> bool:
    """Whether a folder holds an adapter, by the name of its configuration."""
    return os.path.lexists(Path(folder, ADAPTER_CONFIG))


def adapter_files(shape: LoraShape, *, base_path: str, base: Weights, saves_embeddings: bool) -> dict[str, Any]:
    """The content of the adapter's JSON files, by name.

    Args:
        base_path: the folder of the base, from which PEFT's AutoPeftModel loads it.
        base: what `weights_hashes` returned for it.
        saves_embeddings: the file has both embeddings, which PEFT is to load. Tied ones it finds by their name.
    """
    alpha = int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": os.path.abspath(base_path),
        "revision": None,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": alpha,
        "lora_dropout": shape.dropout,
        "target_modules": list(shape.targets),
        "modules_to_save": list(EMBEDDING_MODULES) if saves_embeddings else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    return {ADAPTER_CONFIG: config, BASE_NOTE: {"version": VERSION, "weights": base}}


def weights_hashes(folder: StrPath, *, share: int = 0, shares: int = 1) -> Weights:
    """Bytes and SHA-256 of one share of the files of a model's weights, by name; two files are read at a time."""
    names = shard_names(folder)[share::shares]
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(Path(folder, name)), names), strict=True))


def _hash(path: Path) -> dict[str, Any]:
    check_regular(path, max_bytes=ANY_SIZE)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": sha256}


def read_adapter(folder: StrPath) -> Adapter:
    """Read and check the JSON files of an adapter.

    Raises:
        UserError: they are missing or damaged, or the adapter is of a kind that this suite does not train.
    """
    path = Path(folder, ADAPTER_CONFIG)
    content = read_settings(path)
    try:
        shape = _shape_of(content)
    except KeyError as error:
        raise UserError(f"{path}: has no {error}; {FROM_PEFT}")
    except ValueError as error:
        raise UserError(f"{path}: {error}; {FROM_PEFT}")
    note = Path(folder, BASE_NOTE)
    return Adapter(Path(folder), shape, _read_note(note) if os.path.lexists(note) else None)


def _shape_of(content: dict[str, Any]) -> LoraShape:
    """Raises KeyError and ValueError."""
    if json_input.typed(content, "peft_type", str) != "LORA":
        raise ValueError(f"peft_type is {shown(content['peft_type'])}, LORA is allowed")
    for name, values in NO_EFFECT.items():
        if content.get(name) is not None and content[name] not in values:
            raise ValueError(f"{name} is {shown(content[name])}, which is not supported here")
    # An option of a later version of PEFT could compute something else too.
    for name in content.keys() - NO_EFFECT.keys() - OTHER_OPTIONS:
        if content[name] not in (None, False, "", [], {}):
            raise ValueError(f"{name} is {shown(content[name])}, which is not known here")
    targets, modules = content["target_modules"], content.get("modules_to_save") or []
    if not _is_list_of(targets, LAYER_MATRICES) or not targets:
        raise ValueError(f"target_modules is {shown(targets)}, a list of {', '.join(LAYER_MATRICES)} is allowed")
    if not _is_list_of(modules, EMBEDDING_MODULES):
        raise ValueError(f"modules_to_save is {shown(modules)}, a list of {', '.join(EMBEDDING_MODULES)} is allowed")
    dropout = json_input.number({"lora_dropout": 0.0, **content}, "lora_dropout")
    return LoraShape(
        rank=json_input.whole_number(content, "r", least=1, most=MAX_RANK),
        alpha=json_input.number(content, "lora_alpha"),
        dropout=dropout,
        targets=in_order(targets),
    )


def _is_list_of(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item in names for item in value)


def _read_note(path: Path) -> Weights:
    content = read_settings(path)
    try:
        json_input.whole_number(content, "version", least=VERSION, most=VERSION)
        weights = json_input.typed(content, "weights", dict)
        for name, entry in weights.items():
            if not isinstance(entry, dict) or not name.endswith(".safetensors"):
                raise ValueError(f"it lists {shown(name)}, which is not a file of weights")
            json_input.whole_number(entry, "bytes")
            json_input.typed(entry, "sha256", str)
        if not weights:
            raise ValueError("it lists no file")
    except (KeyError, ValueError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: does not name the base of the adapter ({problem}); take the adapter again")
    return weights


def check_base(adapter: Adapter, base_path: StrPath, base: Weights, *, flag: str) -> None:
    """Raise a UserError unless these are the weights that the adapter was trained on.

    Args:
        base: what `weights_hashes` returned for the folder that `flag` names.
    """
    if adapter.base is None:
        raise UserError(
            f"{adapter.folder}: has no {BASE_NOTE}, so it is unknown which weights it was trained on; {FROM_PEFT}"
        )
    for name in sorted(adapter.base.keys() | base.keys()):
        if name not in base or name not in adapter.base:
            where = flag if name not in base else "the base of the adapter"
            problem = f"{where} has no {name}"
        elif base[name]["sha256"] != adapter.base[name]["sha256"]:
            problem = f"{name} differs (sha256)"
        else:
            continue
        raise UserError(
            f"{flag} {base_path}: is not the model that {adapter.folder} was trained on, {problem}; give the model "
            f"that its run had as --pretrained"
        )


def check_adapter_weights(adapter: Adapter, fields: dict[str, Any]) -> dict[str, StoredWeight]:
    """Compare the tensors of an adapter's file with its configuration and its base's. Reads only the file's header.

    Args:
        fields: what `read_fields` returns for the base.

    Returns:
        The tensors by name.

    Raises:
        UserError: one is missing, unknown, of another shape, or not of floats.
    """
    stored = _stored(adapter)
    expected: dict[str, tuple[int, ...]] = dict(
        lora.adapter_shapes(adapter.shape, layer_matrices(fields), fields["num_hidden_layers"])
    )
    embeddings = [INPUT_EMBEDDING] if fields["tie_word_embeddings"] else [INPUT_EMBEDDING, OUTPUT_EMBEDDING]
    if any(PEFT_PREFIX + name in stored for name in embeddings):
        rows = fields["vocab_size"], fields["hidden_size"]
        expected.update({PEFT_PREFIX + name: rows for name in embeddings})
    path = adapter.weights_file
    cure = f"it does not fit its {ADAPTER_CONFIG} and its base"
    check_shapes(stored, expected, str(path), needed="which should be", cure=cure)
    packed = sorted(name for name in stored if stored[name].dtype not in FLOAT_DTYPES)
    if packed:
        raise UserError(f"{path}: has {packed[0]} of {stored[packed[0]].dtype}; {cure}")
    return stored


def _stored(adapter: Adapter) -> dict[str, StoredWeight]:
    from safetensors import SafetensorError, safe_open

    path = adapter.weights_file
    if not os.path.lexists(path):
        pickled = sorted(found.name for found in adapter.folder.glob("adapter_model*"))
        more = f", only {pickled[0]}, which is never unpickled here; save it as safetensors" if pickled else ""
        raise UserError(f"{adapter.folder}: has no {ADAPTER_WEIGHTS}{more or '; take the adapter again'}")
    check_regular(path, max_bytes=ANY_SIZE)
    try:
        with safe_open(str(path), framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: StoredWeight(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); take the adapter again")


def check_same_adapter(adapter: Adapter, trainable: "Trainable", *, flag: str) -> None:
    """Raise a UserError unless the flags of a run are those of the adapter that it loads."""
    wanted = trainable.adapter
    assert wanted is not None, "the run trains an adapter"
    for option, found, given in (
        ("--lora_rank", adapter.shape.rank, wanted.rank),
        ("--lora_alpha", adapter.shape.alpha, wanted.alpha),
        ("--lora_targets", ",".join(adapter.shape.targets), ",".join(wanted.targets)),
    ):
        if found != given:
            raise UserError(f"{flag} {adapter.folder}: was trained with {option} {found}, not {given}; give {found}")


def load_adapter(model: "LlamaForCausalLM", adapter: Adapter, trainable: "Trainable") -> None:
    """Read an adapter into a model that `Trainable.prepare` has prepared.

    Raises:
        UserError: the file lacks a tensor, or has others, or a number is NaN or infinite.
    """
    import torch
    from safetensors.torch import load_file

    stored = _stored(adapter)
    targets = {trainable.saved_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    different = sorted(targets.keys() ^ stored.keys(), key=str)
    if different:
        whose = "lacks" if different[0] in targets else "has, unlike this run,"
        raise UserError(
            f"{adapter.weights_file}: {whose} {different[0]}; load an adapter of the same settings and base"
        )
    for name, tensor in load_file(adapter.weights_file).items():
        param = targets[name]
        if tensor.shape != param.shape:
            shapes = f"{tuple(tensor.shape)}, this model needs {tuple(param.shape)}"
            raise UserError(f"{adapter.weights_file}: {name} is {shapes}; load an adapter of the same base")
        check_finite(tensor, name, adapter.weights_file)
        with torch.no_grad():
            param.copy_(tensor)


def check_finite(tensor: Any, name: str, path: Path) -> None:
    """Raise a UserError if a number of a tensor of that file is NaN or infinite."""
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise UserError(f"{path}: {name} has {wrong:,} numbers that are NaN or infinite; take an earlier adapter")
