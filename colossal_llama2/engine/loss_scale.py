"""The dynamic loss scale of fp16. Each of ColossalAI's optimizers keeps it under another name.

The rules are those of ColossalAI's DynamicGradScaler with one exception, its hysteresis of 2. That would keep the scale
after the first overflow, and the same samples, which are repeated here (`train_step`), would overflow again.
"""

from typing import Any

# Overflows that lower the scale.
HYSTERESIS = 1
INITIAL_SCALE = 2**16
MIXIN_NAMES = ("mix_precision_mixin", "mixed_precision_mixin", "mixed_precision")

ScalerState = tuple[Any, int, int]


def scaler_of(optimizer) -> Any | None:
    """The DynamicGradScaler of a boosted optimizer; None in other precisions than fp16."""
    for name in MIXIN_NAMES:
        scaler = getattr(getattr(optimizer, name, None), "grad_scaler", None)
        if scaler is not None:
            return scaler
    return None


def scale_of(optimizer) -> float:
    """The factor of the loss before the backward pass; 1 in other precisions than fp16."""
    scaler = scaler_of(optimizer)
    return 1.0 if scaler is None else float(scaler.scale)


def remember(optimizer) -> ScalerState | None:
    """The scaler's state, for `put_back`. The host does not wait for a GPU: a changed scale is a new tensor."""
    scaler = scaler_of(optimizer)
    return None if scaler is None else (scaler._scale, scaler._growth_step, scaler._hysteresis_step)


def put_back(optimizer, state: ScalerState | None) -> None:
    """Restore the state that `remember` returned."""
    if state is not None:
        scaler: Any = scaler_of(optimizer)
        scaler._scale, scaler._growth_step, scaler._hysteresis_step = state
