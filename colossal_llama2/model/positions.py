"""How many positions a model has: its config.json's max_position_embeddings, and what rope_scaling makes of it.

By transformers 4.51 (configuration_llama.py: "a `factor` of x will enable the model to handle sequences of length x *
original maximum pre-trained length"; modeling_rope_utils.py) and as vLLM derives a model's length from the same file:

    linear, dynamic    max_position_embeddings is the length of pre-training: times `factor`
    yarn               the same; where rope_scaling has original_max_position_embeddings, that times `factor`
    llama3, longrope   max_position_embeddings is the extended length already
"""

import math
from typing import Any, Optional

EXTENDED_BY_FACTOR = ("linear", "dynamic", "yarn")


def positions_of(config: Any) -> int:
    """The longest sample, in tokens, of a transformers LlamaConfig. Never below its max_position_embeddings."""
    positions = config.max_position_embeddings
    scaling = getattr(config, "rope_scaling", None)
    if scaling_type(config) not in EXTENDED_BY_FACTOR:
        return positions
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if not _is_number(factor):
        return positions
    return max(positions, int((original if _is_number(original) else positions) * factor))


def scaling_type(config: Any) -> Optional[str]:
    """What rope_scaling says in either spelling, `rope_type` or the older `type`; None if there is none."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, dict):
        return None
    name = scaling.get("rope_type", scaling.get("type"))
    return name if isinstance(name, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
