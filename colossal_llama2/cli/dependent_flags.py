"""What the traits of training flags mean for a parsed command line, and for settings of earlier runs."""

import argparse
import functools
from typing import Any

from colossal_llama2.cli.flag_definitions import FlagTraits, Need
from colossal_llama2.cli.train_flags import train_sft_parser


@functools.cache
def train_traits() -> dict[str, FlagTraits]:
    """The traits of the flags of train.py, train_sft.py and selftest.py, by name."""
    # train_sft.py has all flags of the other two.
    return train_sft_parser().traits


def _needs() -> dict[str, Need]:
    return {name: traits.needs for name, traits in train_traits().items() if traits.needs is not None}


def unused_flags(args: argparse.Namespace) -> list[str]:
    """One sentence for each flag that was given and would have no effect."""
    given = {name: getattr(args, name, None) for name in _needs()}
    return [
        f"--{name} {value} {_needs()[name].sentence}; leave it out"
        for name, value in given.items()
        if value is not None and not _needs()[name].is_met(args)
    ]


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags, with the defaults of those that were not given."""
    unset = [name for name in _needs() if getattr(args, name, "not a flag of this command") is None]
    return argparse.Namespace(**{**vars(args), **{name: train_traits()[name].default for name in unset}})


def used_flags(args: argparse.Namespace) -> dict[str, Any]:
    """All flags by name except those without effect beside the others: what the same parser accepts again."""
    is_met = {name: need.is_met for name, need in _needs().items() if hasattr(args, name)}
    return {name: value for name, value in vars(args).items() if name not in is_met or is_met[name](args)}


def changes_numbers(name: str) -> bool:
    """Whether a setting of a training run, by name, changes its numbers. Settings that are not flags do."""
    traits = train_traits().get(name)
    return traits is None or traits.changes_numbers is not False


def is_on_card(name: str) -> bool:
    """Whether the model card lists a setting of a training run. Settings that are not flags are not listed here."""
    traits = train_traits().get(name)
    return traits is not None and traits.on_card is True
