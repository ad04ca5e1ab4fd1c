"""Every command answers --help and refuses unknown flags at once, with nothing but the standard library importable."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Script, and one of its flags with the last letter doubled.
SCRIPTS = {
    "init_tokenizer.py": "--source_tokenizer_dirr",
    "colossal_llama2/tokenizer/init_tokenizer.py": "--expand_tokens_filee",
    "colossal_llama2/tokenizer/mine_tokens.py": "--num_new_tokenss",
    "colossal_llama2/tokenizer/compare.py": "--tokenizer_dirss",
    "colossal_llama2/tokenizer/convert_tiktoken.py": "--source_filee",
    "init_model.py": "--target_model_pathh",
    "colossal_llama2/model/init_model.py": "--target_tokenizer_pathh",
    "prepare_pretrain_dataset.py": "--max_lengthh",
    "prepare_sft_dataset.py": "--data_cache_dirr",
    "train.py": "--save_intervall",
    "train_sft.py": "--use_neftt",
    "inference_example.py": "--input_txtt",
}


def test_the_bare_environment_is_bare(bare_environment):
    process = subprocess.run(
        [sys.executable, "-c", "import torch"], env=bare_environment, capture_output=True, text=True, timeout=30
    )
    assert "torch was imported" in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the root", "in another folder"])
def test_help_needs_no_package(script, elsewhere, run_script, bare_environment, tmp_path):
    process = run_script(script, "--help", cwd=tmp_path if elsewhere else ROOT, env=bare_environment, timeout=30)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout.startswith(f"usage: {Path(script).name}")
    assert "example:" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script, misspelt", SCRIPTS.items())
def test_an_unknown_flag_is_one_line_with_a_suggestion(
    script, misspelt, run_script, bare_environment, assert_user_error
):
    process = run_script(script, misspelt, "x", env=bare_environment, timeout=30)
    assert_user_error(process, f"{Path(script).name}: error:", f"did you mean {misspelt[:-1]}?")


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "inference_example.py"])
def test_a_missing_required_flag_is_one_line(script, run_script, bare_environment, assert_user_error):
    assert_user_error(run_script(script, env=bare_environment, timeout=30), "required")


@pytest.mark.parametrize("module", ["cli.train_flags", "errors", "logs", "inference.generation"])
def test_light_modules_import_no_package(module, bare_environment):
    process = subprocess.run(
        [sys.executable, "-c", f"import colossal_llama2.{module}"],
        cwd=ROOT,
        env=bare_environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


IMPORT_EVERYTHING = """
import importlib, logging, os, pkgutil, signal, sys, warnings
import datasets, torch, transformers  # what they do at import is theirs
before = (dict(os.environ), list(sys.path), torch.get_default_dtype(), torch.random.initial_seed(),
          signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
sys.argv = ["import", "--unknown_flag"]
import colossal_llama2
for module in pkgutil.walk_packages(colossal_llama2.__path__, "colossal_llama2."):
    importlib.import_module(module.name)
after = (dict(os.environ), list(sys.path), torch.get_default_dtype(), torch.random.initial_seed(),
         signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(logging.getLogger().handlers))
assert before == after, (before, after)
assert not logging.getLogger("colossal_llama2").handlers
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
late = [name for name in ("colossalai", "flash_attn", "tensorboard") if name in sys.modules]
assert not late, late
"""


@pytest.mark.slow
def test_importing_the_whole_package_does_nothing():
    process = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


@pytest.mark.parametrize("script", [path.stem for path in sorted(ROOT.glob("*.py"))])
def test_root_scripts_can_be_imported_without_running(script):
    assert callable(importlib.import_module(script).main)
