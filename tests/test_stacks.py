"""run_tests.sh chooses versions of packages and an environment of its own for each."""

import os
import subprocess
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

CHOOSE = "source .ci/environment.sh; choose_stack {stack}; chosen_python={python}; find_python"


def bash(command: str, folder, **environment):
    """Run a command in the repository, with only the programs of a folder and of the system's basic tools."""
    path = {"PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin", **environment}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=path, capture_output=True, text=True, timeout=60)


@pytest.fixture
def pythons(tmp_path):
    """A function that makes a folder of programs, each of which claims to be a version of Python."""

    def make(**versions):
        for name, version in versions.items():
            program = tmp_path / name.replace("_", ".")
            program.write_text(f"#!/bin/sh\necho {version}\n")
            program.chmod(0o755)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("stack", "expected"), [("legacy", "python3.11"), ("current", "python3.11"), ("image", "python3.12")]
)
def test_each_stack_prefers_a_python(stack, expected, pythons):
    folder = pythons(python3="3.13", python3_11="3.11", python3_12="3.12", python3_13="3.13")
    assert bash(CHOOSE.format(stack=stack, python=""), folder).stdout.split() == [expected]


def test_another_python_does_where_the_preferred_one_is_missing(pythons):
    folder = pythons(python3="3.13", python3_11="3.10", python3_12="", python3_13="3.9")
    assert bash(CHOOSE.format(stack="current", python=""), folder).stdout.split() == ["python3"]


def test_a_python_that_was_asked_for_is_used(pythons):
    folder = pythons(python3="3.11", python3_11="3.11", other="3.12")
    assert bash(CHOOSE.format(stack="current", python="other"), folder).stdout.split() == ["other"]


@pytest.mark.parametrize(
    ("stack", "python", "message"),
    [
        ("legacy", "", "Python 3.11 is needed, but was not found as python3.11 or python3\n"),
        ("legacy", "python3.12", "Python 3.11 is needed, but python3.12 is 3.12\n"),
        ("current", "python2", "Python 3.11, 3.12 or 3.13 is needed, but python2 cannot be run\n"),
        ("current", "'two words'", "Python 3.11, 3.12 or 3.13 is needed, but two words is 3.9\n"),
        ("newest", "", "--stack newest given; legacy, current and image are allowed\n"),
    ],
)
def test_what_cannot_be_made_is_one_line(stack, python, message, pythons):
    folder = pythons(python3="3.14", python3_11="3.10", python3_12="3.12", python2="", **{"two words": "3.9"})
    done = bash(CHOOSE.format(stack=stack, python=python), folder)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--stack", "--stack needs a value\n"),
        ("--stack legacy --python", "--python needs a value\n"),
        ("--python ''", "--python needs a value\n"),
        ("--stack new", "--stack new given; legacy, current and image are allowed\n"),
        ("--stack=new", "--stack new given; legacy, current and image are allowed\n"),
        ("--stack=legacy -x --stack current", "--stack comes after an argument for pytest; give it first\n"),
        ("tests --python=python3.12", "--python comes after an argument for pytest; give it first\n"),
    ],
)
def test_wrong_flags_of_run_tests_are_one_line(arguments, message, tmp_path):
    done = bash(f"bash run_tests.sh {arguments}", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_run_tests_installs_nothing(flag, tmp_path):
    done = bash(f"bash run_tests.sh {flag}", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Lint, check types and run every test:\n") and "set -" not in done.stdout
    assert "--stack legacy|current|image" in done.stdout.replace("[", "")


def test_the_package_allows_the_python_of_each_stack(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    allowed = SpecifierSet(project["requires-python"])
    versions = set()
    for stack in ("legacy", "current", "image"):
        done = bash(f'source .ci/environment.sh; choose_stack {stack}; echo "${{python_versions[@]}}"', tmp_path)
        versions.update(done.stdout.split())
    assert versions == {version for version in (f"3.{minor}" for minor in range(30)) if version in allowed}


def test_an_environment_of_another_python_is_made_anew_and_one_that_fits_is_kept(pythons, tmp_path):
    """The programs stand for Python: `-m venv --clear FOLDER` makes an environment of the version, and pip installs."""
    folder = pythons(python3_11="3.11", python3_13="3.13")
    for version in ("3.11", "3.13"):
        (folder / f"python{version}").write_text(FAKE_PYTHON.format(version=version, log=tmp_path / "log"))
    (tmp_path / "first.txt").write_text("xxhash==1.0\n")
    script = (
        f"source {ROOT}/.ci/environment.sh; choose_stack current; chosen_python={{python}}; cd {tmp_path}; "
        "install_requirements first.txt"
    )
    installed = "pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r first.txt"
    for python, expected in (
        ("", ["venv 3.11", installed]),
        ("", []),
        ("python3.13", ["venv 3.13", installed]),
        ("python3.13", []),
        # 3.13 fits the stack, and no other version was asked for.
        ("", []),
    ):
        (tmp_path / "log").write_text("")
        done = bash(f"set -e; {script.format(python=python)}", folder)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "log").read_text().splitlines() == expected
    assert (tmp_path / ".venv-current/version").read_text() == "3.13\n"


FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
    "-m venv")
        echo "venv {version}" >>"{log}"
        rm -rf "$4"
        mkdir -p "$4/bin"
        echo "{version}" >"$4/version"
        cp "$0" "$4/bin/python"
        ;;
    "-m pip") echo "${{@:2}}" >>"{log}" ;;
    *) echo "{version}" ;;
esac
"""
