"""Fixtures that several test files share: one small tokenizer and one small model per test run."""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from colossal_llama2 import launcher, logs
from tests import fork_server, preparing, tiny
from tests.cluster import hosts

ROOT = Path(__file__).resolve().parents[1]
# Fixtures that launch training or start processes which import PyTorch: a test that uses one is slow.
SLOW_FIXTURES = {
    "run_forked",
    "jobs",
    "ends",
    "workplace",
    "table",
    "cluster",
    "start",
    "start_forked",
    "make_cluster",
    "launch",
}
# Files that run complete commands, or kill them repeatedly.
SLOW_FILES = {"test_console", "test_earlier_checkpoints", "test_prepare_restart"}
# Two files run at a time, so the longest start first.
LONGEST_FIRST = (
    "test_training",
    "test_resume",
    "test_stopping",
    "test_readme",
    "test_faults",
    "test_evaluation",
    "test_prepare_ray",
    "test_loss",
    "test_console",
    "test_reporting",
    "test_selftest",
    "test_benchmarks",
    "test_plugin_matrix",
    "test_train_commands",
    "test_one_rank",
    "test_prepare_restart",
    "test_earlier_checkpoints",
)
# What commands import only after they have read their flags.
HEAVY_MODULES = (
    "torch",
    "transformers",
    "colossalai",
    "datasets",
    "numpy",
    "pyarrow",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "tensorboard",
    "tqdm",
    "flash_attn",
)
# Of this process and of all that tests start, unless they are set already. Two test files share the cores, and threads
# would wait for each other. Inductor would start a pool of compiler processes in every process that imports it.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def pytest_configure(config: pytest.Config) -> None:
    """Set ENVIRONMENT, and the default action of SIGINT, which shells turn off for background jobs."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow by their fixtures, and run the files of LONGEST_FIRST first."""
    for item in items:
        if item.path.stem in SLOW_FILES or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture
def make_cluster():
    """A function that starts a number of hosts, which end with the test. Skips where this machine can make none."""
    if reason := hosts.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        yield lambda count: stack.enter_context(hosts.Cluster(count))


@pytest.fixture(scope="session")
def with_colossalai():
    """ColossalAI is imported as commands do it, so that tests can import parts of it."""
    from colossal_llama2.engine.patches import placeholders

    with warnings.catch_warnings(record=True):
        placeholders.import_colossalai()


@pytest.fixture(autouse=True)
def unconfigured_logging():
    """A command that runs inside a test binds the logger to that test's stderr; the next test must not inherit that."""
    yield
    logger = logs.get_logger()
    logger.handlers.clear()
    logger.propagate = True


@pytest.fixture(autouse=True)
def launcher_variables_as_found():
    """A variable that a test leaves behind would make every later command wait for a job that does not exist."""
    before = {name: os.environ.get(name) for name in launcher.NAMES}
    yield
    assert {name: os.environ.get(name) for name in launcher.NAMES} == before


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A LLaMA tokenizer folder with 600 English pieces. Read only: copy it before changing anything."""
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tokenizer_dir) -> Path:
    """A 2-layer float32 LLaMA with the tokenizer of `tokenizer_dir`. Read only."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny_model") / "model", tokenizer_dir)


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory, tokenizer_dir) -> Path:
    """Two prepared sources, as `preparing.write_two_sources` writes them. Read only."""
    return preparing.write_two_sources(tmp_path_factory.mktemp("two_sources"), tokenizer_dir)


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory) -> dict:
    """An environment in which importing any of HEAVY_MODULES fails."""
    folder = tmp_path_factory.mktemp("unimportable")
    for name in HEAVY_MODULES:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="session")
def run_script():
    """Run one of the repository's scripts as a user would; returns the finished process with its text output."""

    def run(script: str, *arguments, cwd: Path = ROOT, timeout: float = 120, env=None) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture(scope="session")
def run_forked():
    """The same in a fork of a process that has imported the libraries, for tests that do not depend on the imports."""

    def run(script: str, *arguments, cwd: Path = ROOT, timeout: float = 120, env=None) -> subprocess.CompletedProcess:
        return fork_server.run([ROOT / script, *arguments], cwd=cwd, timeout=timeout, env=env)

    return run


@pytest.fixture(scope="session")
def assert_user_error():
    """Check that a process ended with a user error: exit code 2, one line on stderr with these words."""

    def check(process: subprocess.CompletedProcess, *words: str) -> None:
        lines = process.stderr.strip().splitlines()
        assert process.returncode == 2, process.stderr
        assert len(lines) == 1, process.stderr
        assert all(word in lines[0] for word in words), lines[0]

    return check
