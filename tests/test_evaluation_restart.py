"""What python -m colossal_llama2.evaluation continues, and which files it refuses to continue or to overwrite."""

import json
import shutil

import pytest

from colossal_llama2.cli.evaluation_flags import evaluation_parser
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.icl_task import IclTask
from colossal_llama2.evaluation.run import run, shortest_names
from colossal_llama2.evaluation.settings import EvaluationSettings
from tests import evaluation_files


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model_dir):
    """A function that evaluates two models on some tasks, and the folder of a run that is complete."""
    folder = tmp_path_factory.mktemp("restart")
    for name in ("mmlu", "cmmlu"):
        evaluation_files.WRITERS[name](folder / name)
    models = [shutil.copytree(model_dir, folder / name) for name in ("one", "two")]

    def evaluate(output_file, *tasks, backwards=False, **more):
        flags = {
            "model_path": [str(model) for model in (models[::-1] if backwards else models)],
            "tasks": [(task, None) for task in tasks],
            "data_dir": str(folder),
            "output_file": str(output_file),
            **{"limit": 2, "device": "cpu", "dtype": "auto"},
            **dict.fromkeys(("num_fewshot", "seed", "batch_size", "by_subject", "write_card")),
        }
        run(EvaluationSettings.from_flags({**flags, **more}))

    (folder / "done").mkdir()
    evaluate(folder / "done" / "r.jsonl", "mmlu", "cmmlu")
    return evaluate, folder / "done"


def half_done(done, folder):
    """The first half of the lines of a complete run."""
    path = folder / "r.jsonl"
    lines = (done / "r.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]), encoding="utf-8")
    shutil.copy(done / "r.jsonl.settings.json", folder)
    return path


@pytest.mark.parametrize(
    "tasks, backwards, message",
    [
        (("cmmlu", "mmlu"), False, "was begun with the tasks mmlu, cmmlu, now cmmlu, mmlu; give"),
        (("cmmlu",), False, "was begun with the tasks mmlu, cmmlu, now cmmlu; give"),
        (("mmlu", "cmmlu"), True, "was begun with the models one, two, now two, one; give"),
    ],
)
def test_another_order_of_tasks_or_models_is_refused(evaluated, tasks, backwards, message, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        evaluate(path, *tasks, backwards=backwards)
    assert path.read_bytes() == before


def test_other_items_of_the_same_tasks_are_refused(evaluated, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    with pytest.raises(UserError, match=r"was begun with other items or examples of mmlu, cmmlu \(another --limit, "):
        evaluate(path, "mmlu", "cmmlu", limit=3)


def test_other_files_of_a_model_are_refused(evaluated, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    config = done.parent / "two" / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    with pytest.raises(UserError, match="was begun with other files of two; give a new file, or the same input"):
        evaluate(path, "mmlu", "cmmlu")
    config.write_bytes(before)


def test_a_line_of_another_task_is_refused(evaluated, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace('"mmlu"', '"cmmlu"'), *lines[2:]]), encoding="utf-8")
    with pytest.raises(UserError, match=r"r.jsonl:2: is an item of one and cmmlu, and one of one and mmlu belongs"):
        evaluate(path, "mmlu", "cmmlu")


@pytest.mark.parametrize(
    "items, message",
    [
        ((1, 0), "the items of mmlu are not in the order in which this version computes them"),
        ((0, 1, 0), "r.jsonl:3: has an item of one and mmlu a second time; give a new file"),
    ],
)
def test_items_in_another_order_are_refused(evaluated, items, message, tmp_path):
    """As of a version that makes other batches: some would be missing, and others twice."""
    evaluate, _ = evaluated
    path = tmp_path / "r.jsonl"
    evaluate(path, "mmlu", limit=3)
    lines = path.read_text(encoding="utf-8").splitlines()
    records = [json.loads(lines[number]) for number in range(len(items))]
    order = [record["item"] for record in map(json.loads, lines[:3])]
    for record, place in zip(records, items, strict=True):
        record["item"] = order[place]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        evaluate(path, "mmlu", limit=3)


@pytest.mark.parametrize(
    "name, value",
    [("is_correct", None), ("item", None), ("item", 777), ("item", True), ("logits", ["x"]), ("seconds", "1")],
)
def test_a_damaged_line_is_refused(evaluated, name, value, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    first, *others = path.read_text(encoding="utf-8").splitlines()
    record = {**json.loads(first), name: value}
    path.write_text("\n".join([json.dumps(record), *others, ""]), encoding="utf-8")
    with pytest.raises(UserError, match="r.jsonl:1: is not an item of mmlu; give a new file"):
        evaluate(path, "mmlu", "cmmlu")


def test_another_precision_is_refused_for_a_file_that_is_complete_too(evaluated):
    evaluate, done = evaluated
    with pytest.raises(UserError, match="was begun with --dtype auto on cpu, now bf16 on cpu"):
        evaluate(done / "r.jsonl", "mmlu", "cmmlu", dtype="bf16")
    with pytest.raises(UserError, match="was begun with --dtype auto on cpu, now auto on cuda"):
        evaluate(done / "r.jsonl", "mmlu", "cmmlu", device="cuda:1")


@pytest.mark.parametrize(
    "tasks, more, message",
    [
        ([("icl", None)], {"data_dir": "sets"}, "--data_dir sets has no effect, since no task of --tasks reads files"),
        ([("icl", None)], {"num_fewshot": 0}, "--num_fewshot 0 has no effect, since only mmlu, cmmlu"),
        ([("gaokao", "sets")], {"num_fewshot": 3}, "--num_fewshot 3 has no effect, since only mmlu, cmmlu"),
        ([("mmlu", "sets")], {"seed": 0}, "--seed 0 has no effect, since only icl has a seed"),
        ([("mmlu", "sets")], {"data_dir": "other"}, "--data_dir other has no effect, since no task of --tasks reads"),
    ],
)
def test_a_flag_without_effect_is_refused(tasks, more, message, model_dir):
    flags = dict.fromkeys(("data_dir", "num_fewshot", "seed", "output_file", "write_card"))
    with pytest.raises(UserError, match=message):
        EvaluationSettings.from_flags({**flags, "model_path": [str(model_dir)], "tasks": tasks, **more})


def test_the_help_has_each_default_once():
    words = " ".join(evaluation_parser().format_help().split())
    assert "memory allow (default: auto) --output_file" in words and "items of icl (default: 0) how:" in words


def test_the_probe_has_as_many_items_as_the_limit():
    assert [len(IclTask(seed=0, limit=limit).subjects) for limit in (None, 7, 1000)] == [300, 7, 1000]


@pytest.mark.parametrize("name", ["r.json", "r.png"])
def test_a_file_of_something_else_is_not_overwritten(evaluated, name, tmp_path):
    evaluate, _ = evaluated
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} would be overwritten, and no earlier evaluation has written it"):
        evaluate(tmp_path / "r.jsonl", "mmlu")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_a_file_that_is_half_done_is_continued(evaluated, tmp_path):
    evaluate, done = evaluated
    path = half_done(done, tmp_path)
    evaluate(path, "mmlu", "cmmlu")
    ours, whole = (
        [{**json.loads(line), "seconds": 0} for line in file.read_text(encoding="utf-8").splitlines()]
        for file in (path, done / "r.jsonl")
    )
    assert ours == whole and len(ours) == 8


def test_a_model_is_evaluated_once(evaluated, tmp_path):
    evaluate, done = evaluated
    one = done.parent / "one"
    (tmp_path / "link").symlink_to(one)
    for again in (f"{one}/", tmp_path / "link"):
        with pytest.raises(UserError, match=f"--model_path {one} and {again} are one folder; keep one"):
            evaluate(tmp_path / "r.jsonl", "mmlu", model_path=[str(one), str(again)])


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/one", "a/two"], ["one", "two"]),
        (["runs/a/modeling", "runs/b/modeling", "base"], ["a/modeling", "b/modeling", "base"]),
        (["a/x/m", "b/x/m", "b/y/m"], ["a/x/m", "b/x/m", "y/m"]),
    ],
)
def test_models_of_equal_names_have_as_much_of_their_paths_as_needed(paths, names):
    assert shortest_names(paths) == names
