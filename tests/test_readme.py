"""The README's commands are run as they stand there, one after the other; its tables are compared with the parsers."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from colossal_llama2.cli import data_flags, dependent_flags, inference_flags, tokenizer_flags, train_flags
from tests import tiny
from tests.conftest import ROOT
from tests.launching import free_port

README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {
    "init_tokenizer.py": tokenizer_flags.init_tokenizer_parser,
    "init_model.py": tokenizer_flags.init_model_parser,
    "prepare_pretrain_dataset.py": data_flags.prepare_pretrain_parser,
    "prepare_sft_dataset.py": data_flags.prepare_sft_parser,
    "train.py": train_flags.train_parser,
    "train_sft.py": train_flags.train_sft_parser,
    "inference_example.py": inference_flags.inference_parser,
    "colossal_llama2.tokenizer.mine_tokens": tokenizer_flags.mine_tokens_parser,
    "colossal_llama2.tokenizer.compare": tokenizer_flags.compare_parser,
    "colossal_llama2.dataset.inspect_data": data_flags.inspect_data_parser,
    "colossal_llama2.train.verify": train_flags.verify_parser,
    "colossal_llama2.train.selftest": train_flags.selftest_parser,
}


def commands():
    """Every command of the README's bash blocks, in order, line continuations joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.join(shlex.split(line, comments=True)).split()) for line in lines if line.strip()]


def script_commands():
    """(script, its arguments) of every command that starts one of the seven scripts."""
    found = []
    for command in commands():
        words = shlex.split(command)
        script = next((word for word in words if word in PARSERS), None)
        if script:
            found.append((script, words[words.index(script) + 1 :]))
    return found


def table_rows():
    """(flags, default or None, line) of every row of the README's flag tables."""
    rows = []
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        flags = re.findall(r"`(-[-\w]*)`", cells[0])
        if line.startswith("| `-") and flags:
            rows.append((flags, cells[1] if len(cells) == 3 else None, line))
    return rows


def test_every_script_has_a_command():
    assert {script for script, _ in script_commands()} == PARSERS.keys()


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_in_a_table_with_its_default(script):
    defaults = {}
    for flags, default, _ in table_rows():
        defaults.setdefault(frozenset(flags), []).append(default)
    for action in PARSERS[script]().actions:
        told = defaults.get(frozenset(action.option_strings), [])
        if action.dest == "accumulation_steps":
            assert told == ["`1`, SFT `8`"]
        elif isinstance(action.default, bool) and action.nargs == 0:
            assert set(told) == {"off"}, action.option_strings
        elif action.option_strings and action.dest != "help":
            assert told, action.option_strings
            traits = dependent_flags.train_traits().get(action.dest)
            default = traits.default if traits and traits.needs else action.default
            assert default is None or f"`{default}`" in told, action.option_strings


def test_no_table_names_an_unknown_flag():
    known = {option for parser in PARSERS.values() for option in parser().by_spelling}
    assert {flag for flags, _, _ in table_rows() for flag in flags} <= known


def test_no_place_is_left_to_fill_in():
    assert not re.findall(r"@[A-Z_]{3,}@", README)


def test_the_file_map_is_the_repository():
    for path in (ROOT / "colossal_llama2").rglob("*.py"):
        if path.stat().st_size and path.name != "__init__.py":
            assert path.name in README, path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as the README's reader has it: the repository's scripts, a source model, text, a hostfile."""
    folder = tmp_path_factory.mktemp("reader")
    scripts = [name for name in PARSERS if name.endswith(".py")]
    for name in [*scripts, "colossal_llama2", "train.example.sh", "hostfile.example"]:
        os.symlink(ROOT / name, folder / name)
    tiny.make_model(folder / "llama-2-7b", tiny.make_tokenizer(folder / "tokenizer"))
    pieces = ["你好", "人工智能", "明月", "天气"]
    write_jsonl(folder / "new_tokens.jsonl", ({"piece": piece} for piece in pieces))
    english = tiny.english_documents()[:150]
    write_jsonl(folder / "data" / "en" / "a.jsonl", ({"target": text, "category": "docs"} for text in english))
    write_jsonl(folder / "data" / "zh" / "a.jsonl", ({"target": f"{tiny.CHINESE}{n}" * 20} for n in range(20)))
    messages = [{"from": "human", "content": "你好"}, {"from": "assistant", "content": tiny.CHINESE}]
    write_jsonl(folder / "data" / "chat" / "a.jsonl", ({"messages": messages} for _ in range(20)))
    return folder


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def run(command, folder):
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    environment["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, f"{command}\n{process.stderr[-3000:]}"
    return process.stdout


def test_the_pipeline_runs_as_it_is_written(workplace):
    """Only the number of processes changes, from 8 to 2, and the answer's length."""
    (workplace / "hostfile").write_text("localhost\n")
    outputs = {}
    for command in commands():
        words = shlex.split(command)
        script = next((word for word in words if word in PARSERS), None)
        if script:
            command = command.replace("--nproc_per_node 8", f"--nproc_per_node 2 --master_port {free_port()}")
            outputs[script] = run(command.replace("--max_new_tokens 512", "--max_new_tokens 8"), workplace)
    assert outputs["init_tokenizer.py"].splitlines()[-1].startswith("asked 4, added ")
    assert (workplace / "mined_tokens.jsonl").is_file()
    assert "tokenizer-zh" in outputs["colossal_llama2.tokenizer.compare"]
    assert "tokens per bin" in outputs["prepare_pretrain_dataset.py"]
    assert "trained | " in outputs["colossal_llama2.dataset.inspect_data"]
    assert (workplace / "charts" / "categories.png").is_file()
    assert "all as they were written" in outputs["colossal_llama2.train.verify"]
    assert (workplace / "checkpoint_dir_sft" / "modeling" / "tokenizer.model").is_file()
    assert "Answer:" in outputs["inference_example.py"]


def test_the_example_script_runs_here_as_it_is(workplace):
    """cp, bash train.sh: on two processes of this machine, by the real launcher."""
    for command in ("cp hostfile.example hostfile", "cp train.example.sh train.sh", "bash train.sh"):
        assert command in commands()
    run("cp train.example.sh train.sh && echo localhost > hostfile", workplace)
    dataset = "spliced_tokenized_output_arrow/part-00000 spliced_tokenized_output_arrow/part-00001"
    settings = f"NPROC_PER_NODE=2 MASTER_PORT={free_port()} DATASET='{dataset}'"
    run(f"{settings} bash train.sh --micro_batch_size 1 --max_length 4096", workplace)
    (run_folder,) = (workplace / "runs" / "checkpoints").iterdir()
    assert (run_folder / "modeling" / "config.json").is_file()
    assert json.loads(next((workplace / "runs" / "configs").iterdir()).read_text())["warmup_steps"] == 100
