"""python -m colossal_llama2.evaluation: its figures against plain transformers, restarts, ranks, files and mistakes."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from colossal_llama2.errors import RunError, UserError
from colossal_llama2.evaluation.batching import Room, batches_of
from colossal_llama2.evaluation.compute import records_of
from colossal_llama2.evaluation.icl_task import IclTask
from colossal_llama2.evaluation.question_task import QuestionTask, letter_of
from colossal_llama2.evaluation.results import result_of
from colossal_llama2.evaluation.sets.registry import SETS
from colossal_llama2.evaluation.task import Row
from colossal_llama2.evaluation.text_task import TextTask
from colossal_llama2.inference.loading import load_model
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.task_names import SET_NAMES
from tests import evaluation_files, fork_server, tiny
from tests.byte_level import make_byte_level
from tests.conftest import ROOT
from tests.test_byte_level_run import make_model

COMMAND = ["-m", "colossal_llama2.evaluation"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A --data_dir with every set, and a jsonl file of texts."""
    folder = evaluation_files.write_all(tmp_path_factory.mktemp("sets"))
    texts = [{"text": text} for text in tiny.english_documents()[:6]]
    evaluation_files.write_lines(folder / "held_out.jsonl", [*texts, {"source": "The", "target": " end."}])
    return folder


@pytest.fixture(scope="module")
def byte_level_dir(tmp_path_factory):
    """A model with llama3's tokenizer, positions and fewer key-value heads."""
    return make_model(make_byte_level(tmp_path_factory.mktemp("llama3") / "model", "llama3"))


@pytest.fixture(scope="module", params=["sentencepiece", "llama3"])
def loaded(request, model_dir):
    """A model, its tokenizer and its folder."""
    folder = model_dir if request.param == "sentencepiece" else request.getfixturevalue("byte_level_dir")
    return *load_model(str(folder), "cpu", dtype="fp32"), folder


def read(name: str, sets, shots: int | None = None) -> QuestionTask:
    """The task of a set."""
    kind = SETS[name]
    shots = kind.num_fewshot if shots is None else shots
    return QuestionTask(name, kind, kind.read(sets / name, shots), shots)


def records(loaded, task, **options) -> list[dict]:
    """The records of all items, by item."""
    model, tokenizer, folder = loaded
    found = [
        record
        for some in records_of(model, tokenizer, str(folder), task, **{"batch_size": None, **options})
        for record in some
    ]
    return sorted(found, key=lambda record: record["item"])


def plain_ids(tokenizer, text: str) -> list[int]:
    """Ids by transformers alone, with the mark that training puts before a document."""
    ids = tokenizer(text)["input_ids"]
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def plain_logits(model, ids: list[int]) -> torch.Tensor:
    """(vocabulary,): of what follows, by one forward pass of transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("shots", [5, 0])
def test_logits_are_those_of_plain_transformers(loaded, sets, tmp_path, shots):
    """20 questions: batched and after a shared beginning, against one at a time.

    The second model has a context of 512 tokens, where some prompts lose examples.
    """
    model, tokenizer, _ = loaded
    evaluation_files.write_cmmlu(tmp_path / "cmmlu", questions=10)
    task = read("cmmlu", tmp_path, shots)
    found = records(loaded, task)
    assert len(found) == 20
    for record, question in zip(found, task._questions, strict=True):
        examples = task._examples[question.subject][record["dropped_examples"] :]
        assert (len(examples), record["cut_tokens"]) == (record["examples"], 0)
        prompt = SETS["cmmlu"].form.prompt(question, examples)
        ids = plain_ids(tokenizer, prompt)
        letters = [plain_ids(tokenizer, prompt + letter) for letter in "ABCD"]
        assert all(len(row) == len(ids) + 1 for row in letters)
        expected = plain_logits(model, ids)[[row[-1] for row in letters]].tolist()
        assert record["logits"] == pytest.approx(expected, abs=1e-4)
        assert record["choice"] == "ABCD"[expected.index(max(expected))]
        assert record["is_correct"] == (record["choice"] == question.answer)


@pytest.mark.parametrize("name", ["agieval", "gsm8k"])
def test_answers_are_those_of_plain_greedy_search(loaded, sets, name):
    """An answer ends where the rest cannot change it, so ours is a beginning of the plain one."""
    model, tokenizer, _ = loaded
    task = read(name, sets)
    for record, question in zip(records(loaded, task), task._questions, strict=True):
        ids = plain_ids(tokenizer, SETS[name].form.prompt(question, task._examples[question.subject]))
        stream, plain = TextStream(tokenizer), ""
        for _ in range(8):
            ids.append(int(plain_logits(model, ids).argmax()))
            plain += stream.push(ids[-1])
        assert plain.startswith(record["text"]) or record["text"].startswith(plain)


def test_batches_and_shared_beginnings_change_nothing(loaded, sets):
    task = read("mmlu", sets)
    together, alone = records(loaded, task), records(loaded, task, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert one["logits"] == pytest.approx(other["logits"], abs=1e-4)
        assert one["choice"] == other["choice"]


@pytest.mark.parametrize("shots", [3, 0])
def test_the_questions_of_a_subject_share_what_they_begin_with(loaded, sets, shots):
    """Without examples, the introduction."""
    model, tokenizer, folder = loaded
    task = read("cmmlu", sets, shots)
    batches = batches_of(task.prepare(model, tokenizer, str(folder)).rows, Room(None, 10**6, 10**6), new_tokens=1)
    assert len(batches) == 2
    for batch in batches:
        text = tokenizer.decode(batch.shared, skip_special_tokens=True)
        assert "的单项选择题，请直接给出正确答案的选项。" in text and text.count("答案：") == shots


def test_examples_are_dropped_from_the_front_where_the_context_is_full(loaded, sets):
    model, _, _ = loaded
    task = read("mmlu", sets)
    whole = records(loaded, task)
    before = model.config.max_position_embeddings
    # One token less than the longest prompt needs.
    model.config.max_position_embeddings = max(record["tokens"] for record in whole)
    try:
        found = records(loaded, task)
    finally:
        model.config.max_position_embeddings = before
    dropped = [record for record in found if record["dropped_examples"]]
    assert dropped and all(record["examples"] == 4 for record in dropped)
    assert result_of("m", task, found).notes == {"prompts with fewer examples": len(dropped)}


@pytest.mark.parametrize("name, context", [("gsm8k", 256), ("agieval", 20), ("mmlu", 1)])
def test_a_context_without_room_for_a_question_is_refused(loaded, sets, name, context, monkeypatch):
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", context)
    with pytest.raises(UserError, match=f"{name}: an answer has up to .* and the model's context {context}, so no"):
        records(loaded, read(name, sets))


def test_random_weights_are_at_chance_in_the_probe(loaded):
    task = IclTask(seed=1, limit=90)
    score = result_of("m", task, records(loaded, task))
    assert score.score.value < 0.2 and score.chance == pytest.approx((1 / 32 + 1 / 64 + 1 / 16) / 3)
    assert list(score.subjects) == ["copy", "induction", "retrieval"]


def test_probes_have_one_right_answer():
    from colossal_llama2.evaluation.icl_task import KINDS, make_probe

    tokens = range(1000, 1200)
    for number in range(30):
        for kind in KINDS:
            probe = make_probe(kind, tokens, f"{number}", (7, 8))
            assert make_probe(kind, tokens, f"{number}", (7, 8)) == probe
            *context, last = probe.context
            right = probe.candidates[probe.answer]
            if kind == "retrieval":
                asked = probe.context[-2]
                place = context.index(asked)
                assert context[place + 1] == last and context[place + 2] == right
                assert len(probe.candidates) == 16
            else:
                places = [place for place, token in enumerate(context) if token == last]
                assert len(places) == {"copy": 1, "induction": 4}[kind]
                assert all(context[place + 1] == right for place in places)
            assert len(set(probe.candidates)) == len(probe.candidates)


def test_bits_per_byte_are_the_sum_over_plain_logits(loaded, sets):
    model, tokenizer, _ = loaded
    task = TextTask(sets / "held_out.jsonl", limit=6)
    found = records(loaded, task)
    total, size = 0.0, 0
    for record, text in zip(found, tiny.english_documents()[:6], strict=True):
        ids = [*plain_ids(tokenizer, text), tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        nats = -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum()
        assert record["bits"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
        assert (record["bytes"], record["predicted"]) == (len(text.encode()), len(ids) - 1)
        total, size = total + record["bits"], size + len(text.encode())
    assert result_of("m", task, found).score.value == pytest.approx(total / size)


def test_a_text_that_is_longer_than_the_context_is_divided(loaded, sets):
    model, _, _ = loaded
    task = TextTask(sets / "held_out.jsonl", limit=None)
    before, whole = model.config.max_position_embeddings, records(loaded, task)
    model.config.max_position_embeddings = 16
    try:
        found = records(loaded, task)
    finally:
        model.config.max_position_embeddings = before
    # Nothing predicts the first token of a later piece. A source is not predicted at all.
    predicted, size = (sum(record[name] for record in found) for name in ("predicted", "bytes"))
    assert predicted < sum(record["predicted"] for record in whole)
    assert size < sum(record["bytes"] for record in whole)
    assert (whole[6]["bytes"], found[6]["bytes"]) == (len(" end."), len(" end."))


def test_a_tokenizer_that_ends_each_text_has_the_same_items(model_dir, sets, tmp_path):
    """Some have add_eos_token. A prompt goes on."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_eos_token": True}))
    model, ending = load_model(str(folder), "cpu", dtype="fp32")
    _, plain = load_model(str(model_dir), "cpu", dtype="fp32")
    assert ending("a")["input_ids"] == [*plain("a")["input_ids"], ending.eos_token_id]
    for task in (IclTask(seed=0, limit=9), read("mmlu", sets)):
        rows = [task.prepare(model, tokenizer, str(folder)).rows for tokenizer in (ending, plain)]
        assert [row.ids for row in rows[0]] == [row.ids for row in rows[1]]


def test_numbers_that_overflow_are_a_fault(loaded, sets):
    model, _, _ = loaded
    weight = model.get_output_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(float("inf"))
    try:
        for task in (read("mmlu", sets), IclTask(seed=0, limit=3), TextTask(sets / "held_out.jsonl", limit=2)):
            with pytest.raises(RunError, match="computes NaN/Inf"):
                records(loaded, task)
    finally:
        weight.data.copy_(before)


def test_batches_hold_what_there_is_room_for():
    rows = [Row(n, [1] * 40 + [n + 2] * (n + 1), "a", {}) for n in range(4)] + [Row(4, [7, 8], "b", {})]
    shared, alone = batches_of(rows, Room(None, 1000, 1000), new_tokens=1)
    assert (shared.shared, [row.item for row in shared.rows]) == ((1,) * 40, [3, 2, 1, 0])
    assert (alone.shared, [row.item for row in alone.rows]) == ((), [4])
    assert [len(batch.rows) for batch in batches_of(rows, Room(3, 1, 1), new_tokens=1)] == [3, 1, 1]
    assert [len(batch.rows) for batch in batches_of(rows, Room(None, 8, 1000), new_tokens=1)] == [2, 2, 1]
    assert [len(batch.rows) for batch in batches_of(rows, Room(None, 1000, 90), new_tokens=1)] == [2, 2, 1]
    # The longest row has three tokens more than the shortest.
    for padding, counts in ((0, [1, 1, 1, 1, 1]), (1, [2, 2, 1]), (2, [3, 1, 1]), (3, [4, 1])):
        for most in (None, 8):
            batches = batches_of(rows, Room(most, 1000, 1000, padding), new_tokens=1)
            assert [len(batch.rows) for batch in batches] == counts, (padding, most)


@pytest.mark.parametrize(
    "text, letter",
    [
        (" B", "B"),
        ("(C).", "C"),
        ("答案是D。", "D"),
        ("Because of DNA, the USA and CO2, B3 is no letter, but A is.", "A"),
        ("ABCD", None),
        ("iPadB", None),
    ],
)
def test_the_letter_of_an_answer_is_no_part_of_a_word(text, letter):
    assert letter_of(text) == letter


# The command.


@pytest.fixture(scope="module")
def evaluate(sets, model_dir, byte_level_dir):
    """Run the command in a fork."""

    def run(*arguments, **options) -> subprocess.CompletedProcess:
        command = [*COMMAND, "--model_path", model_dir, byte_level_dir, *arguments]
        tasks = command[command.index("--tasks") + 1].split(",")
        command += ["--data_dir", sets] if not set(tasks).isdisjoint(SET_NAMES) else []
        return fork_server.run(command, timeout=240, **options)

    return run


TASKS = "mmlu,cmmlu,ceval,agieval,gaokao,gsm8k,icl"


def without_times(path) -> list[dict]:
    """The records of a file of items, without how long each took."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in found]


@pytest.fixture(scope="module")
def finished(evaluate, sets, tmp_path_factory):
    """A complete run over all tasks: the process and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    tasks = f"{TASKS},bits_per_byte={sets / 'held_out.jsonl'}"
    done = evaluate("--tasks", tasks, "--limit", "9", "--output_file", folder / "r.jsonl", "--by_subject")
    assert done.returncode == 0, done.stderr
    return done, folder


@pytest.mark.slow
def test_the_table_has_a_line_for_each_model_and_task(finished):
    process, folder = finished
    lines = [line.split() for line in process.stdout.splitlines()]
    assert lines[0] == ["model", "task", "examples", "items", "metric", "score", "error", "tokens/s"]
    of_tasks = [line for line in lines[1:] if len(line) > 6 and line[1] in TASKS.split(",")]
    assert [line[1] for line in of_tasks] == TASKS.split(",") * 1 + TASKS.split(",")
    assert sum("bits" in line for line in lines) >= 2 and ["agronomy" in line for line in lines].count(True) == 4
    written = json.loads((folder / "r.json").read_text())
    assert [result["task"] for result in written["results"][:8]] == [*TASKS.split(","), "bits_per_byte held_out"]
    mmlu = written["results"][0]
    assert (mmlu["score"]["items"], mmlu["num_fewshot"], mmlu["chance"]) == (9, 5, 0.25)
    share = mmlu["score"]["value"]
    assert mmlu["score"]["error"] == pytest.approx(math.sqrt(share * (1 - share) / 8))
    agieval = written["results"][3]
    assert agieval["parts"].keys() == {"by_logits", "by_text"} and agieval["notes"]["items with 5 choices"] == 1
    assert (folder / "r.png").read_bytes()[:4] == b"\x89PNG"
    for words in ('logits over "', "items with several questions left out", "fewer than 5 examples"):
        assert words.replace("items", "item") in process.stderr.replace("items", "item"), words


@pytest.mark.slow
def test_a_stopped_command_continues(finished, evaluate, sets, tmp_path):
    """With half of its lines, and a line that was not written to its end."""
    lines = (finished[1] / "r.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "r.jsonl"
    (tmp_path / "r.jsonl.settings.json").write_bytes((finished[1] / "r.jsonl.settings.json").read_bytes())
    path.write_text("".join(lines[:43]) + lines[43][:20], encoding="utf-8")
    tasks = f"{TASKS},bits_per_byte={sets / 'held_out.jsonl'}"
    flags = ["--tasks", tasks, "--limit", "9", "--output_file", path]
    done = evaluate(*flags)
    assert done.returncode == 0, done.stderr
    assert "continuing after 43 answered items" in done.stderr
    assert without_times(path) == without_times(finished[1] / "r.jsonl")
    again = evaluate(*flags)
    assert again.returncode == 0 and "loading" not in again.stderr
    assert again.stdout == done.stdout
    other = evaluate("--tasks", "icl", "--limit", "9", "--output_file", path)
    assert other.returncode == 2 and "was begun with the tasks " in other.stderr and "now icl; give" in other.stderr
    assert without_times(path) == without_times(finished[1] / "r.jsonl")


@pytest.mark.slow
def test_two_ranks_have_the_numbers_of_one(finished, evaluate, sets, tmp_path):
    tasks = f"{TASKS},bits_per_byte={sets / 'held_out.jsonl'}"
    flags = ["--tasks", tasks, "--limit", "9", "--output_file", tmp_path / "r.jsonl"]
    done = evaluate(*flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert without_times(tmp_path / "r.jsonl") == without_times(finished[1] / "r.jsonl")
    assert done.stdout.count("bits_per_byte held_out") == 2


@pytest.mark.slow
def test_a_file_that_another_process_writes_ends_all_ranks_with_one_line(evaluate, tmp_path):
    """Rank 0 alone opens it."""
    path = tmp_path / "r.jsonl"
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = evaluate("--tasks", "icl", "--limit", "3", "--output_file", path, ranks=2)
    assert done.returncode != 0 and done.stderr.count("r.jsonl: another process is writing it") == 1, done.stderr
    assert "Traceback" not in done.stderr and "gloo" not in done.stderr.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tasks", "mlu"], "'mlu' given, a comma-separated list of mmlu, cmmlu"),
        (["--tasks", "icl,icl"], "has icl twice; keep one"),
        (["--tasks", "icl=here"], "but icl reads no files; give icl"),
        (["--tasks", "bits_per_byte"], "bits_per_byte=FILE.jsonl allowed"),
        (["--tasks", "bits_per_byte=no.jsonl"], "no.jsonl: there is no such file"),
        (["--tasks", "mmlu=nowhere"], "there is no folder nowhere; give mmlu=PATH"),
        (["--tasks", "mmlu,gaokao", "--batch_size", "0"], "auto, or a whole number of at least 1, allowed"),
        (["--tasks", "icl", "--output_file", "r.json"], "a name that ends with .jsonl is needed"),
        (["--tasks", "bits_per_byte=."], "bits_per_byte=.: is a folder; give a jsonl file of texts"),
        (["--tasks", "icl", "--device", "tpu"], "cpu, cuda or cuda:N allowed"),
    ],
)
def test_wrong_flags_are_one_line(flags, words, evaluate, assert_user_error):
    process = evaluate(*flags)
    assert process.returncode == 2 and words in process.stderr.strip().splitlines()[-1], process.stderr


@pytest.mark.slow
def test_a_mistake_in_a_set_is_reported_before_torch_is_imported(model_dir, tmp_path, assert_user_error):
    evaluation_files.write_mmlu(tmp_path / "mmlu")
    path = tmp_path / "mmlu" / "test" / "agronomy_test.csv"
    path.write_text(path.read_text().replace("4,A", "4,E", 1))
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "torch.py").write_text("raise ImportError('torch was imported')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'hidden'}:{ROOT}"}
    command = [sys.executable, *COMMAND, "--model_path", model_dir, "--tasks", "mmlu", "--data_dir", tmp_path]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert_user_error(process, f"{path}:1: the answer is 'E', one of A, B, C, D allowed")
