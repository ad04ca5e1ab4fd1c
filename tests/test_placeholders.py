"""ColossalAI without packages that it imports for nothing: they need not be installed, and are not used if they are."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

from colossal_llama2.engine.patches import placeholders
from colossal_llama2.engine.patches.placeholders import PLACEHOLDERS
from colossal_llama2.errors import RunError
from tests.conftest import ROOT

# Required by ColossalAI, and not in requirements.txt.
LEFT_OUT = ("accelerate", "bitsandbytes", "diffusers", "fastapi", "galore_torch", "peft", "pydantic", "ray", "rpyc")
WITHOUT_THEM = f"""
import importlib.abc, sys, warnings

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {LEFT_OUT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
warnings.simplefilter("ignore")
"""


@pytest.mark.parametrize("placeholder", PLACEHOLDERS, ids=lambda placeholder: placeholder.package)
@pytest.mark.usefixtures("with_colossalai")
def test_colossalai_imports_each_at_the_top_of_a_file(placeholder):
    file, _, line = placeholder.upstream.rpartition(":")
    folder = Path(importlib.import_module("colossalai").__file__).parent
    assert (folder / file).read_text().splitlines()[int(line) - 1] == placeholder.mentions


@pytest.mark.usefixtures("with_colossalai")
def test_what_colossalai_has_of_them_raises_when_it_is_called():
    from colossalai.checkpoint_io import utils
    from colossalai.interface import model
    from colossalai.nn.optimizer import DistGaloreAwamW, GaLoreAdamW8bit
    from torch import nn

    for call in (DistGaloreAwamW, GaLoreAdamW8bit, utils.check_file_exists_on_hf_hub):
        with pytest.raises(RunError, match="ColossalAI called .*, for which the suite has only a placeholder"):
            call([])
    assert not isinstance(nn.Linear(1, 1), model.PeftModel)


def test_other_code_sees_the_packages_as_they_are(monkeypatch):
    """A package that is loaded stays loaded, and one that is not can be imported later."""
    loaded = types.ModuleType("loaded_package")
    monkeypatch.setitem(sys.modules, "loaded_package", loaded)
    with placeholders._standing_in(["loaded_package", "absent_package"]):
        from absent_package.optim.optimizer import Thing  # type: ignore[import-not-found]
        from loaded_package import Thing as Other  # type: ignore[import-not-found]
    assert isinstance(Thing, type) and isinstance(Other, type) and sys.modules["loaded_package"] is loaded
    assert not [name for name in sys.modules if name.startswith("absent_package")]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent_package")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imported",
    [
        "from colossal_llama2.engine.patches import placeholders; placeholders.import_colossalai()",
        # `colossalai run`, which starts the ranks.
        "import colossalai.cli.cli",
    ],
)
def test_none_of_them_has_to_be_installed(imported):
    shown = f"print([name for name in {LEFT_OUT} if name in sys.modules])"
    code = f"{WITHOUT_THEM}\n{imported}\n{shown}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr
