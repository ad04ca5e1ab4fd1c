"""The number of positions of a model: its config.json's max_position_embeddings, scaled by rope_scaling.

As in transformers 4.51 (configuration_llama.py: "a `factor` of x will enable the model to handle sequences of length x
* original maximum pre-trained length"; modeling_rope_utils.py) and in vLLM, which reads the same file:

    linear, dynamic    max_position_embeddings is the length of pre-training: times `factor`
    yarn               the same; where rope_scaling has original_max_position_embeddings, that times `factor`
    llama3, longrope   max_position_embeddings is already the extended length
"""

from typing import Any

from colossal_llama2.storage.json_input import is_finite

EXTENDED_BY_FACTOR = ("linear", "dynamic", "yarn")


def positions_of(config: Any) -> int:
    """The longest possible sample, in tokens, of a transformers LlamaConfig, or another object with its attributes.

    Never below its max_position_embeddings.
    """
    positions = config.max_position_embeddings
    scaling: Any = getattr(config, "rope_scaling", None)
    if scaling_type(config) not in EXTENDED_BY_FACTOR:
        return positions
    factor = scaling.get("factor")
    if not is_finite(factor):
        return positions
    # The functions of the other two read only max_position_embeddings.
    original = scaling.get("original_max_position_embeddings") if scaling_type(config) == "yarn" else None
    return max(positions, int((original if is_finite(original) else positions) * factor))


def scaling_type(config: Any) -> str | None:
    """The type of rope_scaling, spelled `rope_type` or, in older files, `type`; None if there is none."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, dict):
        return None
    name = scaling.get("rope_type", scaling.get("type"))
    return name if isinstance(name, str) else None


def described(positions: int, scaling: str | None) -> str:
    """For messages: the number of positions of a model, and its source. `scaling` is its `scaling_type`."""
    scaled = f", and rope_scaling of type {scaling}" if scaling else ""
    return f"the model has {positions} positions (max_position_embeddings of its config.json{scaled})"


def cure_of_long_samples(positions: int) -> str:
    """For messages: the fix for samples that are longer than the model has positions."""
    return (
        f"prepare the data with --max_length {positions} or less, or give a model with more positions, as rope_scaling "
        "in its config.json makes"
    )
