"""The self-test of training passes if training is right, and fails if it is not."""

import pytest

from colossal_llama2.train import plain_loop, selftest
from tests import fork_server


def run(tmp_path, *flags, code=None):
    command = ["-m", "colossal_llama2.train.selftest"]
    if code is not None:
        (tmp_path / "changed.py").write_text(code)
        command = [tmp_path / "changed.py"]
    command += ["--work_dir", tmp_path / "work", "--steps", "4", *flags]
    return fork_server.run(command, ranks=2, cwd=tmp_path, timeout=600)


@pytest.mark.slow
def test_training_is_proven_and_nothing_is_left(tmp_path):
    flags = ["--plugin", "3d", "--tp", "2", "--zero", "0", "--mixed_precision", "fp32", "--accumulation_steps", "2"]
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" equal\n") == 6 and "3d in fp32 trains here as a plain loop does" in done.stdout
    assert not (tmp_path / "work").exists()


# Clipping that has no effect, as ColossalAI's under Gemini in bf16 on a CPU.
BROKEN = """
from colossal_llama2.train import selftest
from colossal_llama2.train.settings import from_flags
settings = from_flags.engine_settings
from_flags.engine_settings = lambda args: __import__("dataclasses").replace(settings(args), max_norm=0.0)
selftest.main()
"""


@pytest.mark.slow
def test_a_fault_of_training_is_found(tmp_path):
    done = run(tmp_path, "--plugin", "zero2", "--mixed_precision", "fp32", "--gradient_clipping", "0.1", code=BROKEN)
    assert done.returncode != 0 and "final weights, norm of the difference" in done.stderr
    assert "DIFFERENT" in done.stdout and "resumed: loss" not in done.stderr
    assert (tmp_path / "work" / "whole").is_dir()


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(tmp_path, assert_user_error):
    def alone(*flags):
        return fork_server.run(["-m", "colossal_llama2.train.selftest", *flags])

    assert_user_error(alone("--work_dir", str(tmp_path)), f"--work_dir {tmp_path} already exists")
    assert_user_error(alone("--mixed_precision", "fp16", "--work_dir", str(tmp_path / "a")), "fp16 is not compared")
    assert_user_error(alone("--steps", "1"), "a whole number of at least 2")


@pytest.mark.parametrize("values, gap", [([1.0, 2.0], 0.5), ([1.0, float("nan")], float("inf")), ([1.0], float("inf"))])
def test_gaps(values, gap):
    assert selftest.largest(values, [1.0, 4.0]) == gap


def test_the_plain_loop_pads_without_a_difference(model_dir):
    from transformers import LlamaForCausalLM

    documents = [([1, 5, 9, 7, 2], [-100, 5, 9, 7, 2]), ([1, 4, 2], [1, 4, 2]), ([1, 30, 31, 2], [1, 30, 31, 2])]
    traces = []
    for together in (1, 3):
        model = LlamaForCausalLM.from_pretrained(model_dir)
        settings = {"learning_rate": lambda step: 1e-3, "max_norm": 1.0, "weight_decay": 0.1}
        traces.append(plain_loop.train(model, [documents, documents], together=together, **settings))
    one, three = traces
    assert one.losses == pytest.approx(three.losses, rel=1e-6) and one.losses[1] < one.losses[0]
    assert one.grad_norms == pytest.approx(three.grad_norms, rel=1e-5)
