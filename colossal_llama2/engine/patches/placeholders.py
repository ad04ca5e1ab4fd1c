"""Import ColossalAI without the packages that it imports at the top of its files and that the suite never uses.

galore-torch and bitsandbytes are optimizers, peft is LoRA. While ColossalAI is imported, a placeholder stands for each
of them, even where one is installed: that saves time, memory and bitsandbytes' message about kernels. ColossalAI keeps
what it has imported from a placeholder, and such a thing raises an error when it is called. For all other code the
packages are what they were.
"""

import contextlib
import importlib.abc
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from colossal_llama2.errors import RunError


@dataclass(frozen=True)
class Placeholder:
    """A package that ColossalAI imports for nothing.

    Attributes:
        package: its name in an import.
        upstream: FILE:LINE inside the colossalai package, an import of it that is not inside a function.
        mentions: text of that line.
    """

    package: str
    upstream: str
    mentions: str


PLACEHOLDERS = (
    Placeholder("bitsandbytes", "nn/optimizer/galore.py:7", "from bitsandbytes.optim.optimizer import Optimizer2State"),
    Placeholder("galore_torch", "nn/optimizer/__init__.py:1", "from galore_torch import GaLoreAdafactor, GaLoreAdamW"),
    Placeholder("peft", "interface/model.py:6", "from peft import PeftModel, PeftType"),
)


def import_colossalai() -> None:
    """Import ColossalAI's plugins, and with them every file of it that needs a placeholder. May be called again."""
    with _standing_in([placeholder.package for placeholder in PLACEHOLDERS]):
        import colossalai.booster.plugin  # noqa: F401


@contextlib.contextmanager
def _standing_in(packages: list[str]) -> Iterator[None]:
    """Within it, an import of one of these packages, or of a part of it, gives a placeholder."""
    finder = _Finder(packages)
    hidden = finder.take_modules()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.take_modules()
        sys.modules.update(hidden)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: list[str]):
        self._packages = packages

    def _stands_for(self, name: str) -> bool:
        return name.partition(".")[0] in self._packages

    def take_modules(self) -> dict[str, ModuleType]:
        """Remove these packages from sys.modules, and return what was there."""
        return {name: sys.modules.pop(name) for name in list(sys.modules) if self._stands_for(name)}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of a placeholder; None for all other packages."""
        return ModuleSpec(name, self, is_package=True) if self._stands_for(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module, any name of which can be imported."""
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is to be executed."""


class _PlaceholderModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """A class, since ColossalAI derives classes from some, and asks whether a model is an instance of others."""
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise RunError(f"ColossalAI called {full_name}, for which the suite has only a placeholder")

        return type(name, (), {"__new__": refuse, "__module__": self.__name__})
