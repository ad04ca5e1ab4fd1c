"""State that ColossalAI does not checkpoint but bit-exact resume needs.

master weights   the float32 copies of fp16 or bf16 weights: a safetensors file per rank, for the same layout only;
                 of a plugin whose ranks all hold the same, that of the first rank
loss scale       of fp16
random states    of Python, NumPy and PyTorch, as data
"""

import base64
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from colossal_llama2.engine import loss_scale
from colossal_llama2.engine.patches.checkpoint_io import alone_in_memory
from colossal_llama2.engine.plugins import PLUGINS, Plugin, plugin_of
from colossal_llama2.engine.settings import Ranks
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import open_to_umask, sync

if TYPE_CHECKING:
    import numpy as np

MASTERS_NAME = "master_weights"
# The settings that decide how the weights are split over the ranks. If others change, the exact state stays usable.
LAYOUT_SETTINGS = (
    "plugin",
    "precision",
    "tp_size",
    "zero_stage",
    "pp_size",
    "sp_size",
    "sp_mode",
)


class Resumable(Ranks, Protocol):
    """The parts of an Engine that are saved here."""

    plugin: Plugin
    optimizer: Any


def layout(ranks: Ranks) -> dict[str, Any]:
    """What decides which part of the master weights a rank holds, as JSON values."""
    settings = {name: getattr(ranks.settings, name) for name in LAYOUT_SETTINGS}
    parts = {**plugin_of(ranks.settings).layout(), **ranks.settings.trainable.layout()}
    return {**settings, "world_size": ranks.world_size, **parts}


def has_masters(ranks: Ranks) -> bool:
    """True if weights are in half precision, with float32 copies."""
    return ranks.settings.precision != "fp32"


def masters_ranks(plugin: str, world_size: int) -> range:
    """The ranks of a job that write master weights."""
    return range(1 if plugin in PLUGINS and PLUGINS[plugin].is_replicated else world_size)


def save_masters(engine: Resumable, folder: str) -> None:
    """Write this rank's float32 weights, if the working weights are in half precision. Called on all ranks."""
    from safetensors.torch import save_file

    if has_masters(engine) and engine.rank in masters_ranks(engine.plugin.name, engine.world_size):
        Path(folder).mkdir(exist_ok=True)
        weights = engine.plugin.master_weights(engine.optimizer)
        path = _masters_path(folder, engine.rank)
        save_file(alone_in_memory({f"{i:05d}": weight for i, weight in enumerate(weights)}), path)
        open_to_umask(Path(path))
        sync(Path(path))


def load_masters(engine: Resumable, folder: str) -> None:
    """Restore what `save_masters` wrote on the same layout, after the rounded weights are loaded.

    Raises:
        UserError: the file is missing or of another layout.
    """
    from safetensors import SafetensorError, safe_open

    path = _masters_path(folder, 0 if engine.plugin.is_replicated else engine.rank)
    targets = engine.plugin.master_weights(engine.optimizer)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if len(list(file.keys())) != len(targets):
                raise ValueError(f"{counted(len(list(file.keys())), 'tensor')}, this rank has {len(targets)}")
            for i, target in enumerate(targets):
                tensor = file.get_tensor(f"{i:05d}")
                if tensor.shape != target.shape:
                    raise ValueError(f"tensor {i} is {tuple(tensor.shape)}, this rank's is {tuple(target.shape)}")
                target.copy_(tensor)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be restored ({error}); resume from another checkpoint")


def _masters_path(folder: str, rank: int) -> str:
    return str(Path(folder, f"rank-{rank:05d}.safetensors"))


def rank_states(engine: Resumable) -> dict[str, Any]:
    """Random states and loss scale of this rank, as JSON values."""
    import numpy as np
    import torch

    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [name, _text(np.asarray(keys)), int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state().numpy()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state().numpy())
    scaler = loss_scale.scaler_of(engine.optimizer)
    if scaler is not None:
        counters = {"growth_step": scaler._growth_step, "hysteresis_step": scaler._hysteresis_step}
        states["loss_scale"] = {"scale": float(scaler._scale), **counters}
    return states


def restore_rank_states(engine: Resumable, states: dict[str, Any]) -> None:
    """Restore what `rank_states` returned. Raises KeyError, TypeError or ValueError for anything else."""
    import numpy as np
    import torch

    version, words, gauss = states["python"]
    random.setstate((version, tuple(_array(words, np.uint32).tolist()), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, _array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(_array(states["torch"], np.uint8)))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(_array(states["cuda"], np.uint8)))
    scaler = loss_scale.scaler_of(engine.optimizer)
    if scaler is not None and "loss_scale" in states:
        saved = states["loss_scale"]
        scaler._scale.fill_(saved["scale"])
        scaler._growth_step, scaler._hysteresis_step = int(saved["growth_step"]), int(saved["hysteresis_step"])


def _text(array: "np.ndarray") -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: "type[np.generic]") -> "np.ndarray":
    import numpy as np

    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
