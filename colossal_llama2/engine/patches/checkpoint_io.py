"""ColossalAI's checkpoint files without pickle: safetensors for tensors, JSON for the rest, under the field's names.

ColossalAI writes optimizer states with torch.save and reads them with torch.load, which runs code that a file may
hold. Inside `safetensors_instead_of_pickle` both names stand for the functions of this file instead. A file of ours
is a safetensors file whose metadata entry "structure" is JSON: the saved object with each tensor replaced by its name.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine.patches import patching
from colossal_llama2.errors import UserError
from colossal_llama2.model.model_folder import ADAPTER_WEIGHTS, INDEX_FILE
from colossal_llama2.model.tied_weights import OUTPUT_EMBEDDING
from colossal_llama2.storage.files import open_to_umask, read_json, sync, write_json

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open

OPTIMIZER_INDEX = "pytorch_optim.bin.index.json"
UTILS = "colossalai.checkpoint_io.utils"
# The size of a file of weights or of optimizer states. PEFT reads an adapter from one file.
SHARD_MIB, ONE_SHARD = 4096, 2**40
HYBRID = "colossalai.checkpoint_io.hybrid_parallel_checkpoint_io"


def write_object(value: Any, path: str | os.PathLike[str]) -> None:
    """Write nested dicts and lists of tensors, numbers, strings, booleans and None to a safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    structure = _encode(value, "", tensors)
    save_file(alone_in_memory(tensors), str(path), metadata={"structure": json.dumps(structure)})


def alone_in_memory(tensors: dict[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
    """The tensors in the host's memory, each in memory of its own, as safetensors requires.

    A tensor is copied only if it is elsewhere, not contiguous, or begins where another one does: a copy of each would
    double the memory that a save needs.
    """
    taken: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        if here.untyped_storage().nbytes() > here.nbytes:
            here = _cut_out(here)
        if here.untyped_storage().data_ptr() in taken:
            here = here.clone()
        taken.add(here.untyped_storage().data_ptr())
        found[name] = here
    return found


def _cut_out(part: "torch.Tensor") -> "torch.Tensor":
    """The same numbers at the same place, without the rest of the memory that `part` is a part of."""
    import torch

    if not part.numel():
        return part.clone()
    content = part.reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(content).view(part.dtype).view(part.shape)


def read_object(path: str | os.PathLike[str], *, step_as_tensor: bool = False) -> Any:
    """Read what `write_object` wrote.

    Args:
        step_as_tensor: return each state's "step" as a tensor, as Gemini needs it; other plugins save a number.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            structure = json.loads(file.metadata()["structure"])
            return _decode(structure, file, step_as_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a state file of this suite ({error}); resume from another checkpoint")


def _encode(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        # Pairs, since JSON would turn the integer keys of optimizer states into strings. Sorted, since a resume changes
        # the order of the keys, and equal states must give equal files.
        items = sorted(value.items(), key=lambda item: (str(type(item[0])), item[0]))
        return {"dict": [[key, _encode(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{name}.{index}".lstrip("."), tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot store a {type(value).__name__} ({name})")


def _decode(structure: Any, file: "safe_open", step_as_tensor: bool, key: Any = None) -> Any:
    import torch

    if not isinstance(structure, dict):
        return torch.tensor(float(structure)) if key == "step" and step_as_tensor else structure
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "dict":
        return {name: _decode(item, file, step_as_tensor, name) for name, item in content}
    return {"list": list, "tuple": tuple}[kind](_decode(item, file, step_as_tensor) for item in content)


@contextlib.contextmanager
def safetensors_instead_of_pickle(*, step_as_tensor: bool = False) -> Iterator[None]:
    """Let ColossalAI's optimizer checkpoint code write and read the files of this module.

    checkpoint_io/utils.py:492,504,685,748, hybrid_parallel_checkpoint_io.py:697 and gemini_plugin.py:272,345 call
    torch.save and torch.load; for a name that ends in .safetensors they call `load_flat`, which unpickles its metadata.
    A write error is raised at the end.
    """
    save_by_pickle, load_by_pickle = patching.current("torch:save"), patching.current("torch:load")

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        # Ranks also exchange objects with these functions, through buffers in memory instead of files.
        if not isinstance(path, (str, os.PathLike)):
            save_by_pickle(value, path, *args, **kwargs)
        else:
            _write_or_record_error(errors, path, lambda: write_object(value, path))

    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(path, (str, os.PathLike)):
            return load_by_pickle(path, *args, **kwargs)
        return read_object(path, step_as_tensor=step_as_tensor)

    replacements = {"torch:save": save, "torch:load": load, f"{UTILS}:load_flat": load, f"{HYBRID}:load_flat": load}
    replacements.update(_freeing_shards())
    with _errors_at_the_end() as errors, patching.replaced(replacements):
        yield


def _freeing_shards() -> dict[str, Any]:
    """Let ColossalAI free a file's tensors when they are written.

    checkpoint_io/utils.py:252: a variable of the loop over files still has them while those of the next file are
    gathered, so that a rank would hold two files.
    """
    write = patching.current(f"{UTILS}:save_state_dict")

    def write_and_free(state_dict: dict[Any, Any], *args: Any, **kwargs: Any) -> None:
        write(state_dict, *args, **kwargs)
        state_dict.clear()

    return {f"{UTILS}:save_state_dict": write_and_free}


@contextlib.contextmanager
def _errors_at_the_end() -> Iterator[list[Exception]]:
    """Collect write errors in the list that it yields, and raise the first one at the end.

    With --plugin 3d each stage of a pipeline also makes a folder and writes its part of the index
    (hybrid_parallel_checkpoint_io.py:242,301,334,499,575,611) before a barrier; those errors are collected too.
    """
    from colossalai.checkpoint_io import CheckpointIndexFile
    from safetensors import SafetensorError

    errors: list[Exception] = []
    write_index = CheckpointIndexFile.write_index_file

    class ErrorRecordingPath(PosixPath):
        def mkdir(self, *args: Any, **kwargs: Any) -> None:
            _record_error(errors, lambda: Path(self).mkdir(*args, **kwargs))

    def write_index_or_record_error(index: CheckpointIndexFile, name: str) -> None:
        _record_error(errors, lambda: write_index(index, name))

    index_writer = "colossalai.checkpoint_io:CheckpointIndexFile.write_index_file"
    try:
        with patching.replaced({index_writer: write_index_or_record_error, f"{HYBRID}:Path": ErrorRecordingPath}):
            yield errors
    except (OSError, SafetensorError):
        # This error may be a consequence of an earlier one, which is raised below.
        if not errors:
            raise
    if errors:
        raise errors[0]


def _write_or_record_error(errors: list[Exception], path: str | os.PathLike[str], write: Callable[[], None]) -> None:
    """Write a file and wait until it is on the disk. An error goes to `errors`."""

    def write_and_sync() -> None:
        write()
        sync(Path(path))

    _record_error(errors, write_and_sync)


def _record_error(errors: list[Exception], write: Callable[[], None]) -> None:
    """Call `write` unless there has been an error. An error goes to `errors`.

    ColossalAI's ranks exchange tensors between writes, so a rank that raised there would leave the others waiting.
    """
    from safetensors import SafetensorError

    if errors:
        return
    try:
        write()
    except (OSError, SafetensorError) as error:
        errors.append(error)


@contextlib.contextmanager
def weights_alone(*, ties_embeddings: bool, saved_name: Callable[[str], str | None]) -> Iterator[None]:
    """Let ColossalAI write a model's tensors, each once, and no configuration.

    `saved_name` returns the name under which a tensor is written, None for one that is left out.

    checkpoint_io/utils.py:576 saves generation_config.json with a method that raises an error for values that only
    cause a warning when they are read. The caller writes both configurations instead (model/exported_configs.py).
    Tied embeddings are written only under the first of their names, as transformers does. ColossalAI writes both names:
    ZeRO (general_checkpoint_io.py:231), Gemini (gemini_ddp.py:934) and the last stage of a pipeline.
    """
    import safetensors.torch
    from colossalai.checkpoint_io.utils import StateDictSharder

    save_file, append_param = safetensors.torch.save_file, StateDictSharder.append_param

    def save_and_sync(tensors: dict[str, "torch.Tensor"], path: str, *args: Any, **kwargs: Any) -> None:
        _write_or_record_error(errors, path, lambda: save_file(tensors, path, *args, **kwargs))

    def append_once(sharder: StateDictSharder, name: str, tensor: "torch.Tensor") -> tuple[Any, int]:
        if ties_embeddings and name == OUTPUT_EMBEDDING:
            return None, 0
        written_as = saved_name(name)
        return (None, 0) if written_as is None else append_param(sharder, written_as, tensor)

    replacements = {"safetensors.torch:save_file": save_and_sync, f"{UTILS}:StateDictSharder.append_param": append_once}
    for module in ("colossalai.booster.plugin.gemini_plugin", "colossalai.checkpoint_io.general_checkpoint_io", HYBRID):
        replacements[f"{module}:save_config_file"] = lambda *args, **kwargs: None
    replacements.update(_freeing_shards())
    with _errors_at_the_end() as errors, patching.replaced(replacements):
        yield


def read_optimizer_index(folder: Path) -> tuple[dict[str, str], str]:
    """The file of each parameter's state in an optimizer folder, by parameter, and the file of the parameter groups.

    Raises:
        UserError: the index is damaged, or names a file outside the folder.
    """
    path = folder / OPTIMIZER_INDEX
    index = read_json(path)
    try:
        weight_map, groups_name = dict(index["weight_map"]), index["metadata"]["param_groups"]
        names = sorted({*weight_map.values(), groups_name}, key=str)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not an index of optimizer states ({error!r}); use another checkpoint")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{path} names {name!r}; only plain *.safetensors file names are allowed")
    return weight_map, groups_name


def rename_model_shards(folder: str) -> None:
    """Rename model-00001.safetensors to model-00001-of-0000N.safetensors, as other tools expect it."""
    index_path = Path(folder, INDEX_FILE)
    index = json.loads(index_path.read_text(encoding="utf-8"))
    shards = sorted(set(index["weight_map"].values()))
    new_names = {name: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, name in enumerate(shards, start=1)}
    _rename(index_path, index, new_names)


def rename_adapter(folder: str) -> None:
    """Rename the one file of an adapter's weights as PEFT expects it, and remove its index."""
    index_path = Path(folder, INDEX_FILE)
    (name,) = set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values())
    path = Path(folder, ADAPTER_WEIGHTS)
    Path(folder, name).rename(path)
    # safetensors creates files that only their owner can read.
    open_to_umask(path)
    index_path.unlink()


def rename_optimizer_shards(folder: str) -> None:
    """Rename the optimizer's files from .bin to .safetensors, which is their format."""
    index_path = Path(folder, OPTIMIZER_INDEX)
    index = json.loads(index_path.read_text(encoding="utf-8"))
    old_names = {*index["weight_map"].values(), index["metadata"]["param_groups"]}
    new_names = {name: re.sub(r"\.bin$", ".safetensors", name) for name in old_names}
    index["metadata"]["param_groups"] = new_names[index["metadata"]["param_groups"]]
    _rename(index_path, index, new_names)


def _rename(index_path: Path, index: dict[str, Any], new_names: dict[str, str]) -> None:
    for old, new in new_names.items():
        (index_path.parent / old).rename(index_path.parent / new)
        # safetensors creates files that only their owner can read.
        open_to_umask(index_path.parent / new)
    index["weight_map"] = {key: new_names[name] for key, name in index["weight_map"].items()}
    write_json(index_path, index)
