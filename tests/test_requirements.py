"""The requirements files: pinned, hashed, complete without pip's resolver, and without what nothing uses."""

import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterable

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from colossal_llama2.storage.given_paths import hub_cure
from tests.conftest import ROOT

BASE = "requirements.txt"
# Of programs that read a saved model. They leave out what is compiled against PyTorch.
CLIENTS = [f"requirements/clients/{path.name}" for path in sorted((ROOT / "requirements/clients").glob("*.txt"))]
COMPILED = ("torch", "torchaudio", "torchcodec", "torchvision")
# Each with the files that are installed before it.
FILES: dict[str, list[str]] = {
    BASE: [],
    "requirements-current.txt": [],
    "requirements-image.txt": [],
    "requirements-ray.txt": [BASE],
    "requirements-dev.txt": [BASE],
}
# ColossalAI allows only old versions of these.
NEWER = {"peft", "torch", "transformers"}
# What ColossalAI 0.5.0 requires and the suite does not use, by what imports it there.
LEFT_OUT = {
    "bitsandbytes": "a placeholder stands for it",
    "contexttimer": "legacy/nn/parallel/layers/cache_embedding",
    "diffusers": "inference",
    "fastapi": "inference/server",
    "galore-torch": "a placeholder stands for it",
    "google": "nothing",
    "pre-commit": "nothing",
    "pydantic": "inference/server",
    "ray": "inference",
    "rpyc": "inference/executor",
    "uvicorn": "inference/server",
}


def locked(name: str) -> list[str]:
    """The requirements of a file as pip reads them, each with its options on one line."""
    text = (ROOT / name).read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def requirements(name: str) -> list[Requirement]:
    """The requirements of a file, without their hashes."""
    return [Requirement(line.partition(" --hash")[0]) for line in locked(name)]


def specifiers(listed: Iterable[Requirement]) -> dict[str, str]:
    """The versions that requirements allow, by the normalized names of their packages."""
    return {canonicalize_name(one.name): str(one.specifier) for one in listed}


def pins(name: str, machine: str | None = None) -> dict[str, str]:
    """The versions of a file's packages, by their names.

    Args:
        machine: only what is installed on this `platform.machine()`; None for all lines.
    """
    listed = requirements(name)
    found = {package: version.removeprefix("==") for package, version in specifiers(listed).items()}
    assert len(found) == len(listed)
    if machine is None:
        return found
    here = {canonicalize_name(one.name) for one in listed if holds(one, machine)}
    return {name: version for name, version in found.items() if name in here}


def installed_version(name: str) -> str | None:
    """None if the package is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def holds(requirement: Requirement, machine: str) -> bool:
    """True if the marker is true on this `platform.machine()`, without extras, or if there is none."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", "platform_machine": machine})


def required_by(name: str, machine: str) -> list[Requirement]:
    """What an installed package requires on this `platform.machine()`, without extras."""
    return [one for one in map(Requirement, importlib.metadata.requires(name) or []) if holds(one, machine)]


@pytest.mark.parametrize("name", [*(path.name for path in sorted(ROOT.glob("requirements*.txt"))), *CLIENTS])
def test_every_package_is_pinned_with_hashes(name):
    """And nothing else is in the files: no address, no option, no path of the machine that wrote them."""
    lines, pin = locked(name), r"[a-z0-9.-]+==[\w.]+( ; [^-#/]+)?(\s+--hash=sha256:[0-9a-f]{64})+"
    assert lines and [line for line in lines if not re.fullmatch(pin, line)] == []
    text = (ROOT / name).read_text()
    assert "Written by: bash requirements/lock.sh" in text and "://" not in text


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        (BASE, ["suite", "legacy"]),
        ("requirements-current.txt", ["suite", "current"]),
        ("requirements-image.txt", ["suite", "image"]),
        *((f"requirements-{name}.txt", [name]) for name in ("ray", "dev", "real", "llama-cpp", "gpu", "trackers")),
        *((name, [name.removeprefix("requirements/").removesuffix(".txt")]) for name in CLIENTS),
    ],
)
def test_the_files_have_what_their_sources_ask_for(name, sources):
    """A change of an .in file without `bash requirements/lock.sh` fails here."""
    versions = {package: version.removeprefix("==") for package, version in specifiers(requirements(name)).items()}
    text = "".join((ROOT / "requirements" / f"{source}.in").read_text() for source in sources)
    asked = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert asked and [one for one in asked if not one.specifier.contains(versions[canonicalize_name(one.name)])] == []


def test_the_programs_of_users_get_their_own_build_of_pytorch():
    assert len(CLIENTS) == 5
    found = {name: set(COMPILED).intersection(specifiers(requirements(name))) for name in CLIENTS}
    assert not any(found.values()), found


@pytest.mark.parametrize("name", ["requirements-current.txt", "requirements-image.txt"])
def test_the_newer_sets_have_what_other_files_leave_out(name):
    """The files that are installed in addition leave out what `BASE` has, on all three sets."""
    missing = pins(BASE).keys() - pins(name).keys()
    # CUDA 12, which PyTorch alone needs.
    assert {package for package in missing if not package.startswith("nvidia-")} == set()


# GPUs are found in machines of both kinds.
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("name", "before"), FILES.items())
def test_what_a_package_requires_is_there_too(name, before, machine):
    """As `pip install --no-deps` needs it. Other versions than the pinned ones, of another stack, are left out."""
    listed = {package: version for file in (name, *before) for package, version in pins(file, machine).items()}
    checked = 0
    for package, version in pins(name, machine).items():
        if installed_version(package) != version:
            continue
        checked += 1
        for one in required_by(package, machine):
            other = canonicalize_name(one.name)
            if package == "colossalai" and other in LEFT_OUT.keys() | NEWER:
                continue
            assert other in listed, f"{package} requires {one}"
            assert one.specifier.contains(listed[other], prereleases=True), f"{package} requires {one}"
    assert checked > len(pins(name)) // 2


def test_what_colossalai_requires_for_nothing_is_left_out():
    required = {canonicalize_name(one.name) for one in required_by("colossalai", platform.machine())}
    assert LEFT_OUT.keys() <= required and not LEFT_OUT.keys() & pins(BASE).keys()


def test_the_rest_of_what_colossalai_requires_is_what_uv_resolves():
    """In pyproject.toml, with any versions of what it allows only old ones of."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (colossalai,) = settings["tool"]["uv"]["dependency-metadata"]
    assert colossalai["version"] == pins(BASE)["colossalai"]
    required = specifiers(required_by("colossalai", "x86_64"))
    expected = {name: "" if name in NEWER else version for name, version in required.items() if name not in LEFT_OUT}
    assert specifiers(map(Requirement, colossalai["requires-dist"])) == expected


@pytest.mark.parametrize("base", [BASE, "requirements-current.txt", "requirements-image.txt"])
def test_versions_agree_between_files_that_go_together(base):
    versions: dict[str, set[str]] = {}
    for name in [base, *(name for name, before in FILES.items() if before)]:
        for package, version in pins(name).items():
            versions.setdefault(package, set()).add(version)
    assert {package: found for package, found in versions.items() if len(found) > 1} == {}


def test_the_command_that_downloads_models_is_installed_with_them():
    """huggingface-cli, its name before, does nothing since huggingface_hub 1."""
    command = re.search(r"download it first \(([\w-]+) download", hub_cure("owner-nobody-has/name"))
    scripts = importlib.metadata.distribution("huggingface_hub").entry_points.select(group="console_scripts")
    assert command and command[1] in scripts.names and command[1] != "huggingface-cli"
