"""Corrupt numbers of one rank in all passes of one step, as from a faulty device or an outlier.

loss        loss and gradients are NaN
gradient    the gradients are infinite, the loss is not
report      the loss is infinite, the gradients are not
"""

import contextlib
import math
from collections.abc import Iterator

from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.train import loop


@contextlib.contextmanager
def poisoned(rank: int, step: int, kind: str) -> Iterator[None]:
    """Corrupt the input of `Engine.backward` on a rank in the given optimizer step, counted from 1."""
    backward, train_step = Engine.backward, loop.train_step
    done = 0

    def spoiling(engine, loss):
        is_hit = done == step - 1 and collectives.place()[0] == rank
        spoilt = {"loss": loss * math.nan, "gradient": infinite_gradient(loss)}.get(kind, loss) if is_hit else loss
        backward(engine, spoilt)
        if is_hit and kind != "gradient":
            loss.data.fill_(math.nan if kind == "loss" else math.inf)

    def counting(*args, **keywords):
        nonlocal done
        result = train_step(*args, **keywords)
        done += 1
        return result

    Engine.backward, loop.train_step = spoiling, counting
    try:
        yield
    finally:
        Engine.backward, loop.train_step = backward, train_step


def infinite_gradient(loss):
    """The same loss, with an infinite gradient."""
    same = loss * 1.0
    same.register_hook(lambda gradient: gradient * math.inf)
    return same
