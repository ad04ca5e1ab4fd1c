"""--benchmark of the training commands: what it prints, what it does not change, what it refuses."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from colossal_llama2.train import benchmark
from colossal_llama2.train.stepping.step_timer import StepTimer
from tests.conftest import ROOT


def flags(model_dir, *more):
    common = ["--pretrained", str(model_dir), "--benchmark", "--plugin", "zero2", "--mixed_precision", "fp32"]
    return [*common, "--max_length", "64", *map(str, more)]


@pytest.mark.parametrize("script", ["train.py", "train_sft.py"])
def test_it_prints_figures_and_writes_only_a_trace(script, run_forked, model_dir, tmp_path):
    more = ["--num_samples", 10, "--profile", tmp_path / "trace", "--peak_tflops", 1, "--accumulation_steps", 1]
    done = run_forked(script, *flags(model_dir, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = dict(re.findall(r"^ *(\S.*?) {2,}(\S+)", done.stdout, re.MULTILINE))
    shares = [float(printed[name].rstrip("%")) for name in ("data", "forward", "backward", "optimizer", "rest")]
    assert sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert float(printed["tokens/s"].replace(",", "")) > 0
    assert printed["padding"] == "0.0%" and printed["MFU"].endswith("%")
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    assert json.loads((tmp_path / "trace" / "rank-00000.json").read_text())["traceEvents"]


def test_what_cannot_be_measured_is_refused(run_forked, assert_user_error, model_dir, tmp_path):
    few = run_forked("train.py", *flags(model_dir, "--num_samples", 3, "--micro_batch_size", 2), cwd=tmp_path)
    assert_user_error(few, "--num_samples 3: only 1 step; give at least 12")
    alone = ["--pretrained", str(model_dir), "--profile", "x", "--plugin", "zero2", "--mixed_precision", "fp32"]
    assert_user_error(run_forked("train.py", *alone, "--dataset", "y", cwd=tmp_path), "--profile needs --benchmark")
    assert_user_error(run_forked("train.py", *alone, cwd=tmp_path), "required: --dataset")
    assert not list(tmp_path.iterdir())


def test_the_parts_of_a_step_are_added_up():
    timer = StepTimer()
    for _ in range(3):
        with timer.part("forward"):
            pass
    assert list(timer.each("data", "abc")) == ["a", "b", "c"]
    seconds = timer.seconds()
    assert set(seconds) == {"forward", "data"} and all(0 <= value < 1 for value in seconds.values())
    assert timer.seconds() == {}


def test_overlapping_collectives_count_once():
    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))

    events = [event("gloo:all_reduce", 0, 10e6), event("gloo:all_gather", 5e6, 12e6), event("aten::mm", 0, 90e6)]
    profiler = SimpleNamespace(events=lambda: [*events, event("ncclDevKernel_AllReduce", 20e6, 21e6)])
    assert benchmark.communication_seconds(profiler) == 13


def test_flops_are_those_of_a_llama_7b():
    config = SimpleNamespace(tie_word_embeddings=False, vocab_size=32000, hidden_size=4096, num_hidden_layers=32)
    # 6.74 billion parameters, 131 million of them in the input embeddings, 4,096 tokens.
    assert benchmark.flops_per_token(config, 6_738_415_616, 4096) == pytest.approx(46.1e9, rel=0.01)
    adapter = benchmark.flops_per_token(config, 6_738_415_616, 4096, trains_weights=False)
    assert adapter == pytest.approx(46.1e9 - 2 * 6.6e9, rel=0.01)


@pytest.mark.slow
def test_no_compiler_process_is_started(model_dir):
    """In a user's environment, and with --use_flash_attn, whose check imports parts of PyTorch before the rest."""
    words = ["--pretrained", str(model_dir), "--benchmark", "--plugin", "zero2", "--mixed_precision", "fp32"]
    words += ["--max_length", "32", "--num_samples", "6", "--use_flash_attn"]
    code = (
        "import os, sys, train\n"
        "train.main(sys.argv[1:])\n"
        "children = open(f'/proc/self/task/{os.getpid()}/children').read().split()\n"
        "print('children:', *children, 'torch._inductor.async_compile' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    # The module that starts the pool was imported, and started none.
    assert done.stdout.splitlines()[-1] == "children: True", (done.stdout, done.stderr)
