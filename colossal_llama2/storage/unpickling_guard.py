"""While a model is loaded: nothing is unpickled, no adapter is searched for, nothing is downloaded.

The folders were checked before (model/model_folder.py). This is a second safeguard: if a library opens a file that it
should not, it fails instead of running the file's content. It does not apply to the whole process, because ColossalAI's
ranks exchange pickled objects of their own while they train and save.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from colossal_llama2.errors import RunError

# Functions that can run code from a file, by module; those of torch.jit call the two of torch._C.
REFUSED: list[tuple[str, str]] = [
    ("torch", "load"),
    ("torch.serialization", "load"),
    ("torch.jit", "load"),
    ("torch.jit._serialization", "load"),
    ("torch._C", "import_ir_module"),
    ("torch._C", "import_ir_module_from_buffer"),
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
]
# Each of these modules holds its own reference to is_peft_available.
PEFT_ASKED_BY = (
    "transformers.utils",
    "transformers.utils.import_utils",
    "transformers.modeling_utils",
    "transformers.models.auto.auto_factory",
    "transformers.integrations.peft",
    "transformers.utils.peft_utils",
)


# Number of loads in progress.
_loads = 0


@contextlib.contextmanager
def unpickling_refused(*, offline: bool = True) -> Iterator[None]:
    """Inside, unpickling raises RunError, peft counts as not installed, and with `offline` nothing is downloaded."""
    global _loads
    changes = [(module, name, _refusing) for module, name in REFUSED]
    changes += [(module, "is_peft_available", lambda *_: _no_peft) for module in PEFT_ASKED_BY]
    if offline:
        changes += [("huggingface_hub.constants", "HF_HUB_OFFLINE", lambda *_: True)]
        changes += [("transformers.utils.hub", "_is_offline_mode", lambda *_: True)]
    with contextlib.ExitStack() as around:
        for module, name, change in changes:
            around.enter_context(_replaced(module, name, change))
        around.enter_context(_no_generation_config())
        around.enter_context(_importing(lambda module: _refuse_in(module, around)))
        _loads += 1
        around.callback(_end_load)
        yield


@contextlib.contextmanager
def _no_generation_config() -> Iterator[None]:
    """Let transformers make the generation settings from the model's, because a bad file raises arbitrary errors.

    The file is copied into every saved model, as it is or as the checks before a run have corrected it.
    """
    settings = sys.modules.get("transformers.generation.configuration_utils")
    if settings is None:
        yield
        return

    def not_read(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError("generation_config.json is not read by transformers here")

    kind = settings.GenerationConfig
    original = kind.__dict__["from_pretrained"]
    kind.from_pretrained = not_read
    try:
        with _no_second_generation_config():
            yield
    finally:
        kind.from_pretrained = original


@contextlib.contextmanager
def _no_second_generation_config() -> Iterator[None]:
    """Keep transformers 5 from reading generation settings in config.json where generation_config.json is missing.

    Without it too a new model has settings that are made of its own config.
    """
    generation = sys.modules.get("transformers.generation.utils")
    adjust = None if generation is None else generation.GenerationMixin.__dict__.get("adjust_generation_fn")
    if generation is None or adjust is None:
        yield
        return
    generation.GenerationMixin.adjust_generation_fn = lambda *args, **kwargs: None
    try:
        yield
    finally:
        generation.GenerationMixin.adjust_generation_fn = adjust


def _end_load() -> None:
    global _loads
    _loads -= 1


def _no_peft(*args: Any, **kwargs: Any) -> bool:
    return False


def _refusing(original: Any, name: str) -> Any:
    """The replacement of a function or class while a model is loaded. It also works later, as a module may keep it."""

    def refuse() -> None:
        if _loads:
            raise RunError(f"{name} was called while a model was being loaded; nothing is ever unpickled here")

    if isinstance(original, type):

        class Refused(original):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                refuse()
                super().__init__(*args, **kwargs)

        return Refused

    def refused(*args: Any, **kwargs: Any) -> Any:
        refuse()
        return original(*args, **kwargs)

    return refused


def _refuse_in(module: str, around: contextlib.ExitStack) -> None:
    """Change a module of REFUSED that was just imported, until the load ends."""
    for _, name in [entry for entry in REFUSED if entry[0] == module]:
        around.enter_context(_replaced(module, name, _refusing))


@contextlib.contextmanager
def _importing(do: Callable[[str], None]) -> Iterator[None]:
    """Within it, call `do` with the name of each module of REFUSED right after it is imported."""
    # A tokenizer may be loaded before torch is imported, which takes seconds: it is not imported just to be changed.
    finder = _Finder(do)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, do: Callable[[str], None]):
        self._do = do

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual spec of a module of REFUSED, whose loader calls `do` at its end; None for all others."""
        if all(name != module for module, _ in REFUSED):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self._do(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _replaced(module: str, name: str, change: Any) -> Iterator[None]:
    """A change of a module's attribute; none if the module is not in use, or has no such name in this version."""
    owner = sys.modules.get(module)
    if owner is None or not hasattr(owner, name):
        yield
        return
    original = getattr(owner, name)
    setattr(owner, name, change(original, f"{module}.{name}"))
    try:
        yield
    finally:
        setattr(owner, name, original)
