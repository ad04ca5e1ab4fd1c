"""Flags that change nothing unless another flag is given, and their defaults."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from colossal_llama2.plugin_names import HYBRID_3D


class DependentFlag(NamedTuple):
    """A flag's default, what it needs, in words, and whether the other flags have that."""

    default: Any
    needs: str
    is_used: Callable[[argparse.Namespace], bool]


DEPENDENT_FLAGS: dict[str, DependentFlag] = {
    "zero": DependentFlag(1, f"needs --plugin {HYBRID_3D}", lambda args: args.plugin == HYBRID_3D),
    "microbatch_size": DependentFlag(1, "needs --pp of at least 2", lambda args: args.pp > 1),
    "sp_mode": DependentFlag(
        "split_gather", "needs --enable_sequence_parallelism", lambda args: args.enable_sequence_parallelism
    ),
    "mixture_end": DependentFlag("repeat", "needs --mixture", lambda args: args.mixture is not None),
    "on_forgetting": DependentFlag("warn", "needs --forgetting_alarm", lambda args: bool(args.forgetting_alarm)),
    "neft_alpha": DependentFlag(5.0, "needs --use_neft", lambda args: args.use_neft),
    "keep_every": DependentFlag(None, "needs --keep_last", lambda args: args.keep_last is not None),
    "num_samples": DependentFlag(500, "needs --benchmark", lambda args: args.benchmark),
    "load_checkpoint": DependentFlag(None, "is not for --benchmark, which loads none", lambda args: not args.benchmark),
    "resume": DependentFlag(None, "is not for --benchmark, which saves nothing", lambda args: not args.benchmark),
}


def unused_flags(args: argparse.Namespace) -> list[str]:
    """One sentence for each flag that was given and would change nothing."""
    given = {name: getattr(args, name, None) for name in DEPENDENT_FLAGS}
    return [
        f"--{name} {value} {DEPENDENT_FLAGS[name].needs}; leave it out"
        for name, value in given.items()
        if value is not None and not DEPENDENT_FLAGS[name].is_used(args)
    ]


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags, with the defaults of those that were not given."""
    unset = [name for name in DEPENDENT_FLAGS if getattr(args, name, "not a flag of this command") is None]
    return argparse.Namespace(**{**vars(args), **{name: DEPENDENT_FLAGS[name].default for name in unset}})


def used_flags(args: argparse.Namespace) -> dict[str, Any]:
    """All flags by name but those that change nothing beside the others: what the same parser takes again."""
    is_used = {name: flag.is_used for name, flag in DEPENDENT_FLAGS.items() if hasattr(args, name)}
    return {name: value for name, value in vars(args).items() if name not in is_used or is_used[name](args)}


def default_of(name: str) -> str:
    """The default of a dependent flag, as help texts end with it."""
    return f"(default: {DEPENDENT_FLAGS[name].default})"
