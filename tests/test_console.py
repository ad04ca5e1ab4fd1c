"""A user's console shows only our lines, even where libraries would print theirs."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colossal_llama2.engine import process_group
from tests.conftest import ROOT
from tests.launching import free_port

LOG_LINE = re.compile(r"\d\d:\d\d:\d\d \| \S")
# torchrun's own output, besides which only our one line appears: its log and its traceback.
OF_TORCHRUN = re.compile(
    r"[WE]\d{4} \d\d:\d\d:|Traceback|  |torch\.distributed|Failures:|Root Cause|={9}|-{9}|\S+ FAILED|\[0\]:|$"
)


def environment(toolkit: Path, **others: str) -> dict[str, str]:
    """The environment of a machine without a GPU that has a CUDA toolkit, for which PyTorch prints a line at import."""
    toolkit.mkdir(exist_ok=True)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "CUDA_HOME": str(toolkit), "OMP_NUM_THREADS": "1", **others}


# The second is forked: what libraries print when they are imported is the same for all plugins.
@pytest.mark.parametrize(("plugin", "runner"), [("zero2", "run_script"), ("3d", "run_forked")])
def test_training_shows_only_log_lines(plugin, runner, two_sources, model_dir, tmp_path, request):
    words = f"--pretrained {model_dir} --dataset {two_sources / 'new' / 'arrow'} --plugin {plugin} --max_steps 1"
    words += (
        f" --mixed_precision bf16 --max_length 128 --save_dir {tmp_path / 'ckpt'} --tensorboard_dir {tmp_path}/logs"
    )
    words += f" --config_file {tmp_path / 'settings.json'}"
    run = request.getfixturevalue(runner)
    process = run("train.py", *words.split(), env=environment(tmp_path / "cuda"), timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    assert [line for line in process.stderr.splitlines() if not LOG_LINE.match(line)] == []


def test_colossalai_still_gives_the_advice_that_is_filtered_out():
    """And only that: the text must remain the one that ColossalAI logs."""
    folder = Path(next(iter(importlib.util.find_spec("colossalai").submodule_search_locations)))
    text = (folder / "checkpoint_io" / "hybrid_parallel_checkpoint_io.py").read_text()
    assert f'logging.warning("{process_group.UNSHARDED_ADVICE}")' in text
    record = logging.LogRecord("root", logging.WARNING, "file", 1, process_group.UNSHARDED_ADVICE, (), None)
    other = logging.LogRecord("root", logging.WARNING, "file", 1, "something else", (), None)
    assert not process_group._is_not_advice(record) and process_group._is_not_advice(other)


def test_inference_shows_only_its_answer_and_log_lines(model_dir, tmp_path, run_script):
    words = ("--model_path", model_dir, "--input_txt", "the", "--max_new_tokens", "2", "--device", "cpu")
    process = run_script("inference_example.py", *words, env=environment(tmp_path / "cuda"), timeout=300)
    assert process.returncode == 0 and process.stdout.startswith("Prompt: the\nAnswer: ")
    assert [line for line in process.stderr.splitlines() if not LOG_LINE.match(line)] == []


def test_a_vocabulary_command_shows_only_its_report_and_log_lines(tokenizer_dir, tmp_path, run_script):
    (tmp_path / "new.jsonl").write_text(json.dumps({"piece": "你好"}) + "\n")
    words = ("--source_tokenizer_dir", tokenizer_dir, "--target_tokenizer_dir", tmp_path / "zh")
    words += ("--expand_tokens_file", tmp_path / "new.jsonl")
    process = run_script("init_tokenizer.py", *words, env=environment(tmp_path / "cuda"))
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == "requested 1, added 3"
    assert [line for line in process.stderr.splitlines() if not LOG_LINE.match(line)] == []


def test_an_error_below_torchrun_is_one_line_before_the_launcher_s_own_report(model_dir, tmp_path):
    words = ["--pretrained", str(model_dir), "--dataset", str(tmp_path / "missing"), "--save_dir", str(tmp_path / "c")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [*launcher, str(ROOT / "train.py"), *words]
    process = subprocess.run(
        command, env=environment(tmp_path / "cuda"), capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    lines = process.stderr.splitlines()
    ours = [line for line in lines if line.startswith("train.py: error: --dataset")]
    assert process.returncode == 1 and process.stdout == "" and len(ours) == 1
    assert [line for line in lines if line not in ours and not OF_TORCHRUN.match(line)] == []
    before = lines[: lines.index(ours[0])]
    assert not any(line.startswith(("Traceback", "E")) for line in before)
