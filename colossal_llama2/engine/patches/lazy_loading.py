"""Make a model without weights, which each rank reads once the model is split.

ColossalAI replaces `from_pretrained` for that while a model is initialized lazily, by a copy of that of an old version
of transformers (lazy/pretrained.py). It imports functions that later versions of transformers no longer have, and
searches hubs for files. Here a model has a config and lies in a folder that was checked before.
"""

from pathlib import Path
from typing import Any

from colossal_llama2.engine.patches import patching
from colossal_llama2.model.model_folder import INDEX_FILE, WEIGHTS_FILE


def install() -> None:
    """Let lazy initialization make models without weights by `without_weights`. May be called again.

    Raises:
        UserError: ColossalAI is of a version that is not known here.
    """
    patching.install("colossalai.lazy.pretrained:new_from_pretrained", lambda _: classmethod(without_weights))


def without_weights(cls: type, path: str, *, config: Any, torch_dtype: Any, **of_hubs: Any) -> Any:
    """The model of a config, and a note for ColossalAI of where its weights are. Called as `cls.from_pretrained`.

    Args:
        path: folder of safetensors, in one file or with an index.
        torch_dtype: of the weights.
        of_hubs: arguments that change nothing for a folder of safetensors.
    """
    import torch
    from colossalai.interface import pretrained

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype)
    try:
        with _no_init_weights()():
            model = cls(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    model.eval()
    folder = Path(path)
    file = folder / WEIGHTS_FILE
    pretrained.set_pretrained_path(model, str(file if file.is_file() else folder / INDEX_FILE))
    return model


def _no_init_weights() -> Any:
    """transformers' context in which a new model's weights are not initialized."""
    try:
        from transformers.initialization import no_init_weights  # since version 5
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    return no_init_weights
