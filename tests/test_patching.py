"""The table of patches against the installed packages, and against unknown versions of packages."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from colossal_llama2.engine.patches import (
    adam_kernels,
    batched_operations,
    bug_fixes,
    checkpoint_io,
    chunk_loading,
    cpu_device,
    document_attention,
    gathered_states,
    lazy_loading,
    patching,
)
from colossal_llama2.engine.patches.patching import PATCHES, Patch
from colossal_llama2.errors import UserError
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("with_colossalai")
TARGET = "lib:Thing.size"


@pytest.fixture
def lib(monkeypatch):
    """A library of version 1.2.3 with one patch in the table."""
    module = types.ModuleType("lib")
    module.__version__ = "1.2.3"

    class Thing:
        @staticmethod
        def size(number):
            return number

    module.Thing = Thing
    monkeypatch.setitem(sys.modules, "lib", module)
    monkeypatch.setitem(PATCHES, TARGET, Patch(TARGET, "too small", "lib.py:1", "size", ("1.2.3",)))
    monkeypatch.setattr(patching, "_installed", {})
    return module


def doubled(size):
    return lambda number: 2 * size(number)


def test_the_original_is_patched_however_often(lib):
    for _ in range(3):
        patching.install(TARGET, doubled)
    assert lib.Thing.size(3) == lib.Thing().size(3) == 6 and patching.original_of(TARGET)(3) == 3
    patching.install(TARGET, lambda size: lambda number: size(number) + 1)
    assert lib.Thing.size(3) == 4
    with patching.replaced({TARGET: patching.original_of(TARGET)}):
        assert lib.Thing.size(3) == 3
    assert lib.Thing.size(3) == 4


def test_another_version_is_not_patched(lib):
    lib.__version__ = "1.3.0"
    original = lib.Thing.size
    for change in (lambda: patching.install(TARGET, doubled), patching.replaced({TARGET: None}).__enter__):
        with pytest.raises(UserError, match=r"lib 1\.3\.0 is installed.*Thing\.size.*install --no-deps 'lib==1\.2\.3'"):
            change()
    assert lib.Thing.size is original


def test_a_missing_attribute_is_not_made(lib):
    del lib.Thing.size
    with pytest.raises(UserError, match=r"lib has no lib\.Thing\.size.*1\.2\.3.*reinstall.* 'lib==1\.2\.3'"):
        patching.install(TARGET, doubled)
    del lib.Thing
    with pytest.raises(UserError, match="lib has no"):
        patching.install(TARGET, doubled)


def test_what_is_not_in_the_table_is_not_patched():
    with pytest.raises(KeyError):
        patching.install("colossalai.zero:GeminiDDP.forward", lambda forward: forward)


@pytest.mark.parametrize("target", PATCHES)
def test_the_table_fits_the_installed_packages(target):
    """The attribute exists, and the line that the table names has the quoted text."""
    patch = patching.require(target)
    assert hasattr(patch.owner(), patch.name)
    file, _, line = patch.upstream.rpartition(":")
    colossalai = Path(importlib.import_module("colossalai").__file__).parent
    assert patch.mentions in (colossalai / file).read_text().splitlines()[int(line) - 1]


def test_every_patch_is_used_and_nothing_else_replaces_attributes():
    """Each target is named in one of the files of patches, and none of them sets attributes of modules itself."""
    folder = ROOT / "colossal_llama2" / "engine" / "patches"
    text = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "patching.py")
    assert "setattr(" not in text
    unused = [target for target in PATCHES if PATCHES[target].name not in text]
    assert [target for target in unused if not target.startswith("colossalai.logging")] == []


@pytest.mark.parametrize(
    "change",
    [
        bug_fixes.install,
        bug_fixes.install_for_gemini,
        bug_fixes.install_for_3d,
        adam_kernels.install,
        batched_operations.install,
        chunk_loading.install,
        gathered_states.install_for_zero2,
        gathered_states.install_for_3d,
        gathered_states.install_for_gemini,
        lazy_loading.install,
        cpu_device.install,
        lambda: document_attention.install(use_flash_attn=False),
        lambda: checkpoint_io.safetensors_instead_of_pickle().__enter__(),
        lambda: checkpoint_io.weights_alone(ties_embeddings=True, saved_name=str).__enter__(),
        lambda: bug_fixes.clip_in_bf16(None),
        lambda: bug_fixes.fill_buckets(None),
    ],
)
def test_every_file_of_patches_refuses_another_colossalai(monkeypatch, change):
    import colossalai

    monkeypatch.setattr(colossalai, "__version__", "0.6.0")
    with pytest.raises(
        UserError, match=r"colossalai 0\.6\.0 is installed.*pip install --no-deps 'colossalai==0\.5\.0'"
    ):
        change()


def test_patches_can_be_listed():
    """As documentation does: target, versions, upstream and reason of each exist, and can be written as JSON."""
    rows = [[patch.target, *patch.versions, patch.upstream, patch.reason] for patch in PATCHES.values()]
    assert json.loads(json.dumps(rows)) == rows and all(all(row) for row in rows)
    assert {importlib.import_module(patch.package).__name__ for patch in PATCHES.values()} == {
        "colossalai",
        "torch",
        "safetensors",
    }
