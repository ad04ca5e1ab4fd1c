"""train.py and train_sft.py on one process and on two, and with mistakes."""

import json
import os
import shutil

import datasets
import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.layout.manifest import check_parts_fit
from colossal_llama2.dataset.write.prepare import prepare_pretrain, prepare_sft
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.train import start
from colossal_llama2.train.run_folder import file_names, run_lock
from tests import fork_server, tiny
from tests.conftest import ROOT
from tests.preparing import settings, write_lines

PLACES = ("save_dir", "tensorboard_dir", "config_file")


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer_dir):
    encoder = load_encoder(tokenizer_dir)
    rows = [[1, *ids[:30], 2] for ids in encoder.encode(tiny.english_documents()[:24])]
    folder = tmp_path_factory.mktemp("prepared") / "part-00000"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(folder)
    return folder


@pytest.fixture
def flags(part, model_dir, tmp_path):
    """A small correct run, without its plugin."""
    places = [word for name in PLACES for word in (f"--{name}", str(tmp_path / name))]
    return ["--pretrained", str(model_dir), "--dataset", str(part), "--max_length", "64", *places]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}


def test_one_process_without_a_launcher(run_forked, flags, tmp_path):
    process = run_forked(
        "train.py", *flags, "--plugin", "zero2", "--mixed_precision", "fp32", "-w", "0.01", "-s", "2", env=environment()
    )
    assert process.returncode == 0, process.stderr
    assert "rehearsal" in process.stderr and "24/24 step" in process.stderr
    assert "Warning" not in process.stderr
    assert (tmp_path / "save_dir" / "modeling" / "config.json").is_file()
    assert json.loads((tmp_path / "config_file").read_text())["weight_decay"] == 0.01


@pytest.mark.slow
def test_fine_tuning_on_two_ranks(flags, tmp_path):
    """test_readme.py and test_stopping.py use `colossalai run`."""
    more = "--plugin zero2_cpu --mixed_precision bf16 --accumulation_steps 4 --use_neft".split()
    process = fork_server.run([ROOT / "train_sft.py", *flags, *more], ranks=2)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "save_dir" / "epoch-0_step-3" / "running_states.json").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--pretrained", "nowhere"], ["--pretrained nowhere", "no such folder"]),
        (["--dataset", "nowhere"], ["--dataset nowhere", "part-*"]),
        (["--load_checkpoint", "nowhere"], ["--load_checkpoint nowhere"]),
        (["--plugin", "gemini", "--mixed_precision", "fp32"], ["gemini", "fp32"]),
        (["--plugin", "zero2", "--tp", "2"], ["--tp 2", "3d"]),
        (["--max_length", "16"], ["--max_length 16"]),
        (["--max_length", "8192"], ["8192", "4096"]),
        (["--micro_batch_size", "100"], ["24 samples", "100"]),
        (["--plugin", "zero3"], ["zero3"]),
        (["--save_intervall", "3"], ["--save_interval?"]),
    ],
)
def test_mistakes_end_in_one_line(run_forked, assert_user_error, flags, tmp_path, change, words):
    process = run_forked(
        "train.py", *flags, "--plugin", "zero2", "--mixed_precision", "fp32", *change, env=environment(), cwd=tmp_path
    )
    errors = [line for line in process.stderr.splitlines() if "error:" in line]
    assert process.returncode == 2 and len(errors) == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert not (tmp_path / "save_dir").exists()


def instead(flags, value, other):
    """The flags with another value; for a list that is given twice, the command warns."""
    assert value in flags
    return [other if word == value else word for word in flags]


def test_data_of_another_tokenizer_is_refused_before_anything(run_forked, assert_user_error, flags, tmp_path, part):
    prepared = shutil.copytree(part.parent, tmp_path / "prepared")
    content = {"settings": {"stage": "pretrain"}, "tokenizer": {"sha256": "ab" * 32}, "bins": []}
    (prepared / "manifest.json").write_text(json.dumps(content))
    flags = instead(flags, str(part), str(prepared / "part-00000"))
    process = run_forked("train.py", *flags, "--plugin", "zero2")
    assert_user_error(process, "part-00000: prepared with another tokenizer", "abababababab", "--tokenizer_dir")


def test_data_of_another_stage_is_reported(caplog, model_dir, tokenizer_dir, tmp_path):
    """The bins of each command, against each stage."""
    rows = {
        "pretrain": [{"target": "One."}],
        "sft": [{"messages": [{"from": "human", "content": "Two?"}, {"from": "assistant", "content": "Yes."}]}],
    }
    for stage, command in (("pretrain", prepare_pretrain), ("sft", prepare_sft)):
        write_lines(tmp_path / stage / "in" / "rows.jsonl", rows[stage])
        command(**settings([tmp_path / stage / "in"], tokenizer_dir, tmp_path / stage))
    parts = {stage: str(tmp_path / stage / "arrow" / "part-00000") for stage in rows}
    for stage, script in (("pretrain", "train_sft.py"), ("sft", "train.py")):
        caplog.clear()
        check_parts_fit([parts[stage]], stage=stage, tokenizer_dir=str(model_dir))
        assert not caplog.messages
        other = next(name for name in rows if name != stage)
        check_parts_fit(list(parts.values()), stage=other, tokenizer_dir=str(model_dir))
        (message,) = caplog.messages
        assert message.startswith(f"--dataset {parts[stage]}: prepared by prepare_{stage}_dataset.py")
        assert f"but this is {script} (1 of 2 folders); unless this mix is intended, stop and run train" in message


def test_several_mistakes_are_reported_at_once(run_forked, assert_user_error, flags, part):
    flags = instead(flags, str(part), "elsewhere")
    process = run_forked("train.py", *flags, "--pretrained", "nowhere", "--tp", "3")
    assert_user_error(process, "nowhere", "elsewhere", "--tp 3")


def test_a_used_save_dir_is_refused(run_forked, assert_user_error, flags, tmp_path):
    (tmp_path / "save_dir" / "epoch-0_step-5").mkdir(parents=True)
    process = run_forked("train.py", *flags, "--plugin", "zero2")
    assert_user_error(process, "already holds epoch-0_step-5", "give a new folder")


def test_a_folder_that_was_written_to_between_check_and_lock_is_refused(flags, tmp_path, monkeypatch):
    """Another run may hold it, save and end at that moment."""
    locked = run_lock.locked
    other = tmp_path / "save_dir" / "epoch-0_step-5"

    def locked_later(save_dir):
        other.mkdir(parents=True)
        return locked(save_dir)

    monkeypatch.setattr(run_lock, "locked", locked_later)
    with pytest.raises(UserError, match="already holds epoch-0_step-5 of another run"):
        start.train(train_flags.train_parser().parse_args([*flags, "--plugin", "zero2"]))
    assert other.is_dir() and not other.with_name(".lock").exists()


def test_flags_that_would_change_nothing_are_refused_at_once(run_forked, assert_user_error, flags):
    unused = {"zero": 1, "microbatch_size": 1, "sp_mode": "ring", "neft_alpha": 5.0, "num_samples": 9, "keep_every": 2}
    words = [word for name, value in unused.items() for word in (f"--{name}", str(value))]
    process = run_forked("train_sft.py", *flags, "--plugin", "zero2", *words)
    assert_user_error(process, *(f"--{name} {value} needs --" for name, value in unused.items()))
    loading = ["--load_checkpoint", "somewhere", "--resume", "auto"]
    process = run_forked("train.py", *flags, "--plugin", "3d", "--zero", "0", "--benchmark", *loading)
    assert_user_error(process, "--load_checkpoint somewhere is not for --benchmark", "--resume auto is not for")
    assert "--zero" not in process.stderr


# train.py where no file can have more than a million bytes.
LIMITED = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_line_and_leaves_no_half_checkpoint(flags, tmp_path):
    """The limit stands for the disk: the model fits, the optimizer's state does not."""
    (tmp_path / "limited.py").write_text(LIMITED)
    command = [tmp_path / "limited.py", *flags, "--plugin", "zero2", "--mixed_precision", "fp32"]
    process = fork_server.run(command)
    assert process.returncode == 1, process.stderr
    assert process.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "cannot be written" in process.stderr and "Traceback" not in process.stderr
    # The output of the steps remains.
    left = {path.name for path in (tmp_path / "save_dir").iterdir()}
    assert left == {"plan.json", file_names.LOG_NAME, *file_names.REPORT_NAMES}
