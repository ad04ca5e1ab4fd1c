"""How a flag is defined: once, with everything that other code needs to know about it.

    group = parser.flag_group("checkpoints and logs", changes_numbers=False)
    group.add("--keep_last", type=positive_int, default=None, help="keep the K newest checkpoints")
    group.add("--keep_every", ..., needs=Need("needs --keep_last", lambda args: args.keep_last is not None))

Besides the keywords of argparse's `add_argument`, `add` accepts those of `FlagTraits`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Need:
    """Without what a flag would change nothing.

    Attributes:
        sentence: follows the flag in an error message, such as "needs --plugin 3d".
        is_met: whether the other flags make this one count.
    """

    sentence: str
    is_met: Callable[[argparse.Namespace], bool]


@dataclass(frozen=True)
class FlagTraits:
    """What a flag is, beyond what argparse knows.

    Attributes:
        default: the value of a flag that is not given. A flag with `needs` is None in argparse until
            `dependent_flags.with_defaults` fills this in, so that a flag that was given can be told from one that was
            not.
        needs: without which other flag it changes nothing, or None.
        changes_numbers: whether training with another value computes other numbers. A run that resumes with such a
            change warns that it will not repeat the uninterrupted run bit for bit. None: not a flag of training.
        on_card: whether the model card lists it: whether it has a part in the model, and names no place on a disk.
            By default, the flags that change the numbers.
    """

    default: Any = None
    needs: Need | None = None
    changes_numbers: bool | None = None
    on_card: bool | None = None


class FlagGroup:
    """A titled group of flags in `--help`.

    Attributes:
        title: the heading; None for argparse's own headings.
        actions: argparse's objects of its flags, in the order of `--help`.
    """

    def __init__(self, parser: "FlagParser", title: str | None, changes_numbers: bool | None):
        self.title = title
        self.actions: list[argparse.Action] = []
        self._parser = parser
        self._group = parser if title is None else parser.add_argument_group(title)
        self._changes_numbers = changes_numbers

    def add(
        self,
        *names: str,
        default: Any = None,
        needs: Need | None = None,
        changes_numbers: bool | None = None,
        on_card: bool | None = None,
        help: str,
        **settings: Any,
    ) -> None:
        """Define a flag. `changes_numbers` is that of the group unless given; the others are as in `FlagTraits`."""
        if changes_numbers is None:
            changes_numbers = self._changes_numbers
        if settings.get("action") == "store_true":
            default = False
        traits = FlagTraits(default, needs, changes_numbers, changes_numbers if on_card is None else on_card)
        if needs is not None:
            help += f" (default: {default})" if default is not None else ""
            default = None
        action = self._group.add_argument(*names, default=default, help=help, **settings)
        self.actions.append(action)
        self._parser.list_flag(action, traits)


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that lists its flags and keeps their traits.

    Attributes:
        groups: those of `flag_group`, in the order of `--help`.
        actions: argparse's objects of all flags, in the order of `--help`.
        traits: by destination, such as "save_dir".
    """

    def __init__(self, **settings: Any):
        super().__init__(add_help=False, **settings)
        self.groups: list[FlagGroup] = []
        self.actions: list[argparse.Action] = []
        self.traits: dict[str, FlagTraits] = {}
        self.add_argument("-h", "--help", action="help", help="show this help message and exit")

    def flag_group(self, title: str | None = None, *, changes_numbers: bool | None = None) -> FlagGroup:
        """A new group, whose flags change the numbers of training or not, unless one says otherwise."""
        group = FlagGroup(self, title, changes_numbers)
        self.groups.append(group)
        return group

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Define a flag without traits and outside of groups, as with argparse."""
        action = super().add_argument(*names, **settings)
        self.actions.append(action)
        return action

    def list_flag(self, action: argparse.Action, traits: FlagTraits) -> None:
        """List a flag that a group has defined."""
        if action not in self.actions:
            self.actions.append(action)
        self.traits[action.dest] = traits

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of flags that are not given, by destination, without those that must be given."""
        return {name: traits.default for name, traits in self.traits.items() if name not in self._required}

    @property
    def _required(self) -> set[str]:
        return {action.dest for action in self.actions if action.required}

    @property
    def by_spelling(self) -> dict[str, argparse.Action]:
        """Flags by each of their spellings, such as "--micro_batch_size" and "--batch_size"."""
        return {spelling: action for action in self.actions for spelling in action.option_strings}
