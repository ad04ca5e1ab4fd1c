"""--eval_tasks: a model that loses in-context learning while it trains, the alarm, and what is refused before torch.

test_evaluation.py compares the figures with the command under all plugins, and tests that training stays as it is.
"""

import json
import math
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama2.cli import train_flags
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.compute import records_of
from colossal_llama2.evaluation.icl_task import IclTask
from colossal_llama2.evaluation.results import result_of
from colossal_llama2.evaluation.task import task_fingerprint
from colossal_llama2.inference.loading import load_model
from colossal_llama2.train.checkpointing.evaluation_history import EvaluationHistory
from colossal_llama2.train.evaluation.alarm import Alarm
from colossal_llama2.train.report import train_log
from colossal_llama2.train.settings.from_flags import resolve
from tests import evaluation_files, fork_server, layouts, training_jobs
from tests.conftest import ROOT
from tests.launching import launch
from tests.test_evaluation_probe import copying_model

ITEMS = 30


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer_dir):
    """24 short documents: three steps of 2 ranks with 4 samples each."""
    return training_jobs.write_short_documents(tmp_path_factory.mktemp("data"), tokenizer_dir)


@pytest.fixture(scope="module")
def flags(part, model_dir):
    """The flags of a run of which nothing else is wrong."""
    return ["--pretrained", str(model_dir), "--dataset", part, "--max_length", "128", "--plugin", "zero2"]


@pytest.fixture(scope="module")
def copier(tmp_path_factory, tokenizer_dir):
    """A model that can copy, with a second head that does nothing, so that two ranks can share its heads."""
    one = copying_model(len(AutoTokenizer.from_pretrained(tokenizer_dir)))
    config = LlamaConfig.from_dict(
        {**one.config.to_dict(), "num_attention_heads": 2, "num_key_value_heads": 2}, torch_dtype="float32"
    )
    two = LlamaForCausalLM(config)
    with torch.no_grad():
        for (name, weight), own in zip(two.named_parameters(), one.parameters(), strict=True):
            weight.zero_()
            rows, columns = own.shape if "_proj" in name else (None, None)
            weight[(slice(rows), slice(columns)) if rows else ...] = own
    folder = tmp_path_factory.mktemp("copier")
    two.save_pretrained(folder)
    return shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)


def figures_of_command(folder, dtype: str, items: int = ITEMS) -> dict:
    """The figures of python -m colossal_llama2.evaluation."""
    model, tokenizer = load_model(str(folder), "cpu", dtype=dtype)
    task = IclTask(seed=0, limit=items)
    records = [record for some in records_of(model, tokenizer, str(folder), task, batch_size=None) for record in some]
    score = result_of("m", task, records).score
    errors = {} if score.error is None else {"standard_error": score.error}
    return {"accuracy": score.value, **errors, "items": score.items}


@pytest.mark.parametrize("layout", ["fp32 ddp", "bf16 gemini", "fp32 3d tp2", "fp32 3d pp2"])
def test_a_model_that_copies_is_right_under_every_plugin(layout, copier, part, tmp_path):
    """Far above chance, so the logits are those of the right tokens at the right place; before and after a step."""
    flags = [*training_jobs.common_flags(tmp_path, copier, [part]), *layouts.flags(layout), "--max_length", 128]
    flags += ["--micro_batch_size", 4, "--lr", "1e-4", "--max_steps", 1, "--eval_tasks", "icl", "--eval_limit", ITEMS]
    spec = {"name": "job", "script": "train.py", "flags": [*map(str, flags)]}
    launch(tmp_path, [spec])
    job = training_jobs.finished(tmp_path, spec)
    assert job.error is None
    records = train_log.read(tmp_path / "ckpt" / "train_log.jsonl")
    first, last = (record["evaluation"]["icl"] for record in records if "evaluation" in record)
    dtype = layout.split()[0]
    assert first == figures_of_command(copier, dtype) and first["accuracy"] > 0.6
    assert last == figures_of_command(job.model, dtype)


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory, copier, part):
    """Runs of one or two steps on two ranks: name -> job."""
    folder = tmp_path_factory.mktemp("short")
    broken = folder / "broken"
    shutil.copytree(copier, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = 3e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    specs = []

    def add(name, model, *flags, limit=9):
        words = [*training_jobs.common_flags(folder / name, model, [part]), "--plugin", "zero2", "--max_length", 128]
        words += ["--micro_batch_size", 4, "--lr", "1e-4", "--mixed_precision", "fp32", "--max_steps", 1, *flags]
        tasks = ["--eval_tasks", "icl", "--eval_limit", limit] if limit else []
        specs.append({"name": name, "script": "train.py", "flags": [*map(str, [*words, *tasks])]})

    add("first", copier)
    checkpoint = folder / "first" / "ckpt" / "epoch-0_step-1"
    add("other limit", copier, "--load_checkpoint", checkpoint, "--max_steps", 2, limit=12)
    add("no tasks", copier, "--load_checkpoint", checkpoint, "--max_steps", 2, limit=None)
    add("one item", copier, limit=1)
    add("bf16", copier, "--mixed_precision", "bf16", "--plugin", "3d")
    add("overflowing", broken)
    launch(folder, specs)
    return {spec["name"]: training_jobs.finished(folder, spec) for spec in specs}


def evaluations(job) -> list:
    """What the last checkpoint records: the step and the figures of each evaluation."""
    last = (job.folder / "ckpt" / "latest").read_text().strip()
    found = json.loads((job.folder / "ckpt" / last / "running_states.json").read_text())["evaluations"]
    return [(entry["step"], entry["figures"]) for entry in found]


def test_a_resumed_run_with_other_items_is_compared_from_there(short_runs):
    """Its first figures are those of other items."""
    first, other, without = (short_runs[name] for name in ("first", "other limit", "no tasks"))
    assert (first.error, other.error, without.error) == (None, None, None)
    assert [(step, figures["icl"]["items"]) for step, figures in evaluations(first)] == [(0, 9), (1, 9)]
    assert [(step, figures["icl"]["items"]) for step, figures in evaluations(other)] == [(1, 12), (2, 12)]
    # Nothing is forgotten by a run that does not ask.
    assert evaluations(without) == evaluations(first)


@pytest.mark.parametrize("name, dtype, items", [("one item", "fp32", 1), ("bf16", "bf16", 9)])
def test_fewer_items_than_ranks_and_half_precision(name, dtype, items, short_runs, copier):
    job = short_runs[name]
    assert job.error is None
    (_, first), (_, last) = evaluations(job)
    assert first["icl"] == figures_of_command(copier, dtype, items)
    assert last["icl"] == figures_of_command(job.model, dtype, items)


def test_logits_that_are_not_finite_have_no_accuracy(short_runs):
    """An item that is not answered is not a wrong answer."""
    records = train_log.read(short_runs["overflowing"].folder / "ckpt" / "train_log.jsonl")
    figures = next(record["evaluation"]["icl"] for record in records if "evaluation" in record)
    assert figures["accuracy"] is None or math.isnan(figures["accuracy"])
    assert figures["items"] == 9


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory, part, copier):
    """A run that damages a model that can copy, and that ends where the alarm stops it: its folder and its output."""
    folder = tmp_path_factory.mktemp("forgetting")
    words = ["--pretrained", copier, "--dataset", part, "--max_length", 128, "--mixed_precision", "fp32"]
    words += ["--plugin", "zero2", "--lr", "0.05", "--micro_batch_size", 4, "--warmup_steps", 0]
    words += ["--eval_tasks", "icl", "--eval_limit", ITEMS, "--eval_interval", 1]
    words += ["--forgetting_alarm", "icl=0.2", "--on_forgetting", "stop"]
    words += ["--save_dir", "ckpt", "--tensorboard_dir", "tb", "--config_file", "config.json"]
    return folder, fork_server.run([ROOT / "train.py", *map(str, words)], ranks=2, cwd=folder)


def test_a_loss_of_in_context_learning_ends_the_run(forgetting):
    folder, process = forgetting
    assert process.returncode == 1
    said = (
        r"--forgetting_alarm icl=0.2: accuracy on icl fell from (\S+)% to (\S+)%, by (\S+) points; the run ends, step"
    )
    fell = re.search(said, process.stderr)
    before, after, points = map(float, fell.groups())
    assert before > 60 and before - after == pytest.approx(points, abs=0.15) and points > 20
    assert "and another --forgetting_alarm, or mix in more of the data that the model had before" in process.stderr
    steps = [record for record in train_log.read(folder / "ckpt" / "train_log.jsonl") if "evaluation" in record]
    accuracies = [record["evaluation"]["icl"]["accuracy"] for record in steps]
    assert [record["step"] for record in steps] == list(range(len(steps)))
    assert accuracies[0] == pytest.approx(before / 100, abs=6e-4) and accuracies[-1] == pytest.approx(
        after / 100, abs=6e-4
    )
    # The alarm is not raised before.
    assert all(accuracies[0] - accuracy <= 0.2 + 1e-9 for accuracy in accuracies[:-1])
    states = json.loads((folder / "ckpt" / f"epoch-0_step-{len(steps) - 1}" / "running_states.json").read_text())
    assert [entry["figures"]["icl"]["accuracy"] for entry in states["evaluations"]] == accuracies


def test_the_log_has_a_short_line_for_each_evaluation(forgetting):
    lines = [line for line in forgetting[1].stderr.splitlines() if re.search(r"\| step \d+: icl", line)]
    assert re.search(r"step 0: icl: accuracy \d+\.\d%, error \d\.\d% \(\d+\.\d s\)$", lines[0])
    assert re.search(r"step 1: icl: accuracy \d+\.\d%, error \d\.\d%, [+-]\d+\.\d points \(\d+\.\d s\)$", lines[1])
    assert max(map(len, lines)) <= 80
    assert "icl: 30 items of up to " in forgetting[1].stderr


def test_the_alarm_is_about_more_than_the_limit():
    history = EvaluationHistory()
    history.add(0, {"icl": {"accuracy": 0.4, "standard_error": 0.1}, "en": {"loss": 2.0}})
    alarm = Alarm({"icl": 0.1, "en": 0.1})

    def beyond(accuracy: float, loss: float = 2.0) -> dict:
        return alarm.sentences({"icl": {"accuracy": accuracy}, "en": {"loss": loss}}, history)

    # In float64, 0.4 - 0.3 is more than 0.1.
    assert beyond(0.3) == beyond(0.9) == {}
    assert beyond(0.29)["icl"].endswith("accuracy on icl fell from 40.0% to 29.0%, by 11.0 points")
    assert "fell from 40.0% to nan%" in beyond(math.nan)["icl"]
    assert list(beyond(0.4, 3.0)) == ["en"]
    assert alarm.sentences({"icl": {"accuracy": 0.0}, "en": {"loss": 2.0}}, EvaluationHistory()) == {}


def test_an_alarm_that_cannot_be_raised_is_reported():
    alarm = Alarm({"icl": 0.3, "mmlu": 0.2, "en": 0.3})
    figures = {"icl": {"accuracy": 0.26}, "mmlu": {"accuracy": 0.26}, "en": {"loss": 0.1}}
    (sentence,) = alarm.unreachable(figures)
    assert "accuracy on icl is 26.0% at first, so it cannot fall by more than 30 points" in sentence


def test_an_accuracy_is_compared_with_the_first_that_is_a_number():
    history = EvaluationHistory()
    for step, accuracy in enumerate((math.nan, 0.4, 0.5)):
        history.add(step, {"icl": {"accuracy": accuracy}})
    assert history.first("icl", {"accuracy": 0.5}) == ("accuracy", 0.4)


def test_other_items_are_another_measurement():
    kinds = [IclTask(seed=0, limit=9), IclTask(seed=0, limit=10), IclTask(seed=1, limit=9)]
    assert len({task_fingerprint(task) for task in kinds}) == 3
    assert task_fingerprint(IclTask(seed=0, limit=9)) == task_fingerprint(kinds[0])


@pytest.mark.parametrize(
    "given, named",
    [
        (
            "--eval_tasks mmmlu=SETS/mmlu",
            "'mmmlu' given, a comma-separated list of mmlu, cmmlu, ceval, agieval, gaokao",
        ),
        ("--eval_tasks gsm8k=SETS/gsm8k", "'gsm8k' given, whose answers are generated; leave it out"),
        ("--eval_tasks bits_per_byte=a.jsonl", "'bits_per_byte' given, give --eval_dataset for it"),
        ("--eval_tasks mmlu", "'mmlu' given, mmlu=DIR allowed"),
        ("--eval_tasks icl,icl", "has icl twice; keep one"),
        ("--eval_limit 5", "--eval_limit 5 needs --eval_tasks"),
        ("--eval_tasks icl --eval_num_fewshot 2", "--eval_num_fewshot 2 needs --eval_tasks with one of mmlu, cmmlu"),
        ("--eval_tasks mmlu=nowhere", "--eval_tasks mmlu: there is no folder nowhere; give mmlu=PATH"),
        ("--eval_tasks mmlu=SETS/cmmlu", "has no file *_test.csv; give the folder as the set's authors publish it"),
        ("--eval_tasks cmmlu=NO_DEV", "examples are read from it; give --eval_num_fewshot 0"),
        ("--eval_tasks cmmlu=COLUMNS", "agronomy.csv:1: the columns are a, b, and Question, A, B, C, D, Answer"),
        ("--eval_tasks icl --forgetting_alarm mmlu=0.1", "--forgetting_alarm mmlu: there is no --eval_dataset or task"),
        ("--eval_tasks icl --forgetting_alarm icl=2", "--forgetting_alarm icl=2: an accuracy cannot fall by that much"),
        ("--eval_tasks icl --forgetting_alarm icl=.1 icl=.2", "icl is named 2 times"),
        ("--eval_tasks icl --eval_dataset icl=PART", "--eval_dataset icl: --eval_tasks has a task of this name"),
        ("--eval_tasks icl --benchmark", "--eval_tasks has no effect with --benchmark"),
        ("--eval_interval 3", "--eval_interval needs --eval_dataset or --eval_tasks"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_mistakes_are_one_line(given, named, more, flags, part, sets, capsys):
    words = given.replace("SETS", str(sets)).replace("PART", str(part)).replace("NO_DEV", str(sets / "no_dev"))
    words = words.replace("COLUMNS", str(sets / "columns"))
    with pytest.raises((UserError, SystemExit)) as error:
        resolve(train_flags.train_parser().parse_args([*flags, *words.split(), *more]))
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
    message = capsys.readouterr().err.strip() if isinstance(error.value, SystemExit) else str(error.value)
    assert named in message and "\n" not in message


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Every set; and one without examples, and one with other columns."""
    folder = evaluation_files.write_all(tmp_path_factory.mktemp("sets"))
    evaluation_files.write_cmmlu(folder / "no_dev")
    shutil.rmtree(folder / "no_dev" / "dev")
    (folder / "no_dev" / "dev").mkdir()
    evaluation_files.write_cmmlu(folder / "columns")
    evaluation_files.write_rows(folder / "columns" / "test" / "agronomy.csv", [["a", "b"], ["1", "2"]])
    return folder


def assert_refused(process, *words):
    """After the warning that the data has no manifest."""
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 2 and all(word in last for word in words), process.stderr


def test_mistakes_need_no_torch(flags, sets, run_script, assert_user_error, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    words = [*flags, "--eval_tasks", f"icl,cmmlu={sets / 'columns'}", "--forgetting_alarm", "zh=0.1"]
    process = run_script("train.py", *words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert_user_error(process, "agronomy.csv:1: the columns are a, b", "--forgetting_alarm zh: there is no")
    assert not (tmp_path / "checkpoint_dir").exists()


def test_a_model_without_a_tokenizer_has_no_tasks(flags, run_forked, tmp_path, model_dir):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, bare)
    for also in ([], ["--dry_run"]):
        process = run_forked("train.py", *flags, "--eval_tasks", "icl", "--pretrained", bare, *also, cwd=tmp_path)
        assert_refused(process, f"--eval_tasks needs the tokenizer of the model, and {bare} has none; copy its files")


def test_long_prompts_are_refused_before_the_weights_are_read(flags, sets, run_forked, tmp_path):
    words = [*flags, "--eval_tasks", f"icl,mmlu={sets / 'mmlu'}", "--dry_run"]
    process = run_forked("train.py", *words, "--max_length", 64, cwd=tmp_path)
    assert_refused(
        process, "--eval_tasks icl: 133 of 200 prompts exceed --max_length 64, the longest with 70 tokens; give a"
    )
    process = run_forked("train.py", *words, cwd=tmp_path)
    cure = "give fewer examples with --eval_num_fewshot, or a larger --max_length, or leave mmlu out"
    assert_refused(process, "--eval_tasks mmlu: 12 of 12 prompts exceed --max_length 128, the longest with ", cure)
    process = run_forked("train.py", *words, "--eval_num_fewshot", 0, "--eval_limit", 7, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "icl: 7 items of up to 70 tokens" in process.stderr and "mmlu: 7 items of up to " in process.stderr
