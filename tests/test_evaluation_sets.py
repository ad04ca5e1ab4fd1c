"""The files of evaluation sets: what is read of each, how it is asked, and the error for what cannot be used."""

import contextlib
import json
import os
import re
import shutil

import pytest

from colossal_llama2.errors import PERMISSION_CURE, UserError, one_line_errors
from colossal_llama2.evaluation.card import with_results
from colossal_llama2.evaluation.question_task import QuestionTask
from colossal_llama2.evaluation.report import print_results
from colossal_llama2.evaluation.results import result_of
from colossal_llama2.evaluation.sets.gsm8k import final_number
from colossal_llama2.evaluation.sets.registry import SETS
from colossal_llama2.evaluation.tasks import by_turns, read_tasks
from colossal_llama2.evaluation.text_task import TextTask
from colossal_llama2.task_names import SET_NAMES
from tests import evaluation_files

PROMPTS = {
    "mmlu": (
        "The following are multiple choice questions (with answers) about  agronomy.\n\n"
        "Which of these numbers follows 50 in agronomy when one counts on when one counts on?\n"
        "A. 51\nB. 52\nC. 53\nD. 54\nAnswer: C\n\n"
        "Which of these numbers follows 0 in agronomy?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    ),
    "cmmlu": (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：Which of these numbers follows 50 in agronomy when one counts on when one counts on?\n"
        "A. 51\nB. 52\nC. 53\nD. 54\n答案：C\n\n"
        "题目：Which of these numbers follows 0 in agronomy?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    ),
    "ceval": (
        "以下是中国关于逻辑学考试的单项选择题，请选出其中的正确答案。\n\n"
        "Which of these numbers follows 50 in logic when one counts on when one counts on?\n"
        "A. 51\nB. 52\nC. 53\nD. 54\n答案：C\n\n"
        "Which of these numbers follows 0 in logic?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    ),
    "agieval": (
        "以下是考试中各个问题的答案。\n"
        "问题 1.    What is 21?\n从以下选项中选择:    (A)21 (B)22 (C)23 (D)24\n答案是 B\n\n"
        "问题 2.    What is 1?\n从以下选项中选择:    (A)1 (B)2 (C)3 (D)4\n答案是"
    ),
    "gaokao": (
        "以下是中国高考数学的单项选择题，请直接给出正确答案的选项。\n\n"
        "题目：0．下列各数中最大的是\nA．1  B．2  C．3  D．4\n答案："
    ),
    "gsm8k": (
        "Question: What is 50 plus 1?\nAnswer: 50 + 1 = <<50+1=51>>51.\n#### 51\n\nQuestion: What is 0 plus 1?\nAnswer:"
    ),
}
LEFT_OUT = {
    "agieval": {"with 5 choices": 1, "with several right answers": 1, "without choices": 1},
    "gaokao": {"with several questions": 1, "with several right answers": 1},
}
COUNTS = {"mmlu": 12, "cmmlu": 12, "ceval": 3, "agieval": 5, "gaokao": 2, "gsm8k": 4}


@pytest.mark.parametrize("name", SET_NAMES)
def test_a_set_is_read_and_asked(name, tmp_path):
    kind = SETS[name]
    found = kind.read(evaluation_files.WRITERS[name](tmp_path), kind.num_fewshot)
    first = found.questions[0]
    examples = found.examples.get(first.subject, ())
    assert kind.form.prompt(first, examples[:1]) == PROMPTS[name]
    assert len(examples) == {"agieval": 3}.get(name, kind.num_fewshot)
    assert (len(found.questions), found.left_out) == (COUNTS[name], LEFT_OUT.get(name, {}))


def test_examples_that_cannot_be_used_are_counted_and_a_task_without_one_is_refused(tmp_path, caplog):
    path = evaluation_files.write_agieval(tmp_path) / "few_shot_prompts.csv"
    kind = SETS["agieval"]
    caplog.set_level("INFO")
    replace(path, "'label': 'B'", "'label': ['A', 'B']")
    found = kind.read(tmp_path, 5)
    assert found.examples_left_out == {"with several right answers": 1}
    assert sorted(len(examples) for examples in found.examples.values()) == [2, 3]
    QuestionTask("agieval", kind, found, 5)
    assert "agieval: 1 example with several right answers left out" in caplog.text
    path.write_text(re.sub("'label': '[ABCD]'", "'label': ['A', 'B']", path.read_text()))
    with pytest.raises(UserError, match=r"few_shot_prompts.csv:1: the column \S+ has no example with four choices and"):
        kind.read(tmp_path, 5)


def test_a_task_without_passages_has_the_examples_of_the_other_without_theirs(tmp_path):
    evaluation_files.write_agieval(tmp_path)
    path = tmp_path / "few_shot_prompts.csv"
    path.write_text(path.read_text().replace("logiqa-en", "sat-en").replace("'passage': None", "'passage': 'Read.'"))
    (tmp_path / "v1" / "logiqa-en.jsonl").rename(tmp_path / "v1" / "sat-en.jsonl")
    evaluation_files.write_lines(
        tmp_path / "v1" / "sat-en-without-passage.jsonl", [evaluation_files.agieval_record(number) for number in (0, 1)]
    )
    examples = SETS["agieval"].read(tmp_path, 5).examples
    with_passage, without = examples["sat-en"], examples["sat-en-without-passage"]
    assert [example.text for example in without] == [example.text for example in with_passage] != []
    assert {example.passage for example in with_passage} == {"Read."}
    assert {example.passage for example in without} == {""}


@pytest.mark.parametrize("least, shown", [(5, "5"), (2, "2-5")])
def test_the_table_and_the_card_have_the_examples_that_questions_had(least, shown, tmp_path, capsys):
    kind = SETS["gsm8k"]
    task = QuestionTask("gsm8k", kind, kind.read(evaluation_files.write_gsm8k(tmp_path), 5), 5)
    records = [
        {
            **{
                "item": n,
                "subject": "gsm8k",
                "examples": least if n else 5,
                "is_correct": True,
                "tokens": 9,
                "seconds": 1,
            }
        }
        | {"is_cut": n > 1, "new_tokens": 256 if n > 1 else 7}
        for n in range(4)
    ]
    result = result_of("m", task, records)
    assert result.notes == {"answers cut at 256 tokens": 2}
    print_results([result], by_subject=False)
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["m", "gsm8k", shown, "4"]
    assert f"gsm8k ({shown}-shot)" in with_results("", [result])


def test_texts_without_a_token_to_predict_are_counted(tmp_path):
    evaluation_files.write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    records = [
        {"item": n, "subject": "", "bits": n, "bytes": n, "predicted": n, "tokens": 1 + n, "seconds": 1} for n in (0, 1)
    ]
    notes = result_of("m", TextTask(tmp_path / "a.jsonl", None), records).notes
    assert notes == {"texts without a token to predict": 1}


def test_an_english_task_of_agieval_has_its_own_words(tmp_path):
    found = SETS["agieval"].read(evaluation_files.write_agieval(tmp_path), 0)
    asked = next(question for question in found.questions if question.subject == "logiqa-en")
    assert SETS["agieval"].form.prompt(asked, ()) == (
        "Problem 1.   A story. What is 0?\nChoose from the following options:    (A)0 (B)1 (C)2 (D)3\n"
        "The answer is therefore"
    )


@pytest.mark.parametrize("name, inside", [("mmlu", "data"), ("gsm8k", "grade_school_math/data")])
def test_the_folder_may_be_the_authors_whole_repository(name, inside, tmp_path):
    evaluation_files.WRITERS[name](tmp_path / inside)
    assert len(SETS[name].read(tmp_path, 2).questions) == COUNTS[name]


def replace(path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def make_folder(path) -> None:
    path.unlink()
    path.mkdir()


def end_early(path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


# Set, file, what is wrong with it, and the message.
BROKEN = {
    "no test split": ("mmlu", "test", lambda path: path.rename(path.with_name("tests")), "test: there is no such file"),
    "no dev file": ("cmmlu", "dev/logical.csv", lambda path: path.unlink(), "logical.csv: there is no such file"),
    "an answer outside A-D": (
        "mmlu",
        "test/agronomy_test.csv",
        lambda path: replace(path, "4,A", "4,E"),
        "agronomy_test.csv:1: the answer is 'E', one of A, B, C, D allowed",
    ),
    "five choices": (
        "mmlu",
        "test/agronomy_test.csv",
        lambda path: replace(path, "2,3,4,5,B", "2,3,4,5,6,B"),
        "agronomy_test.csv:2: 7 columns, 6 expected",
    ),
    "a fifth column": (
        "cmmlu",
        "test/agronomy.csv",
        lambda path: replace(path, "D,Answer", "D,E,Answer"),
        "agronomy.csv:1: the columns are (no name), Question, A",
    ),
    "a column less": (
        "ceval",
        "val/logic_val.csv",
        lambda path: replace(path, ",answer", ""),
        "logic_val.csv:1: the columns are id, question, A, B, C, D, and question, A, B, C, D, answer are expected",
    ),
    "a cell less": (
        "cmmlu",
        "test/logical.csv",
        lambda path: replace(path, ",4,A", ",A"),
        "logical.csv:2: 6 cells, and the header has 7",
    ),
    "an empty file": ("cmmlu", "test/logical.csv", lambda path: path.write_text(""), "logical.csv:1: is empty"),
    "an empty jsonl": (
        "agieval",
        "v1/logiqa-en.jsonl",
        lambda path: path.write_text(""),
        "logiqa-en.jsonl:1: is empty",
    ),
    "a blank jsonl": (
        "gsm8k",
        "test.jsonl",
        lambda path: path.write_text("\n\n"),
        "test.jsonl:1: has only blank lines",
    ),
    "a folder in place of a file": ("gsm8k", "test.jsonl", make_folder, "test.jsonl: is a folder, not a regular file"),
    "a folder in place of a dev file": (
        "cmmlu",
        "dev/logical.csv",
        make_folder,
        "logical.csv: is a folder, not a regular file",
    ),
    "a file in place of a folder": (
        "mmlu",
        "test",
        lambda path: (shutil.rmtree(path), path.write_text("")),
        "test: is a file, not a folder",
    ),
    "blank cells alone": (
        "mmlu",
        "test/logical_test.csv",
        lambda path: path.write_text(",,,,,\n,,,,,\n"),
        "logical_test.csv:1: has only blank cells",
    ),
    "blank rows alone": (
        "ceval",
        "val/logic_val.csv",
        lambda path: path.write_text(",,,\n\n"),
        "logic_val.csv:1: has only blank cells",
    ),
    "blank dev rows alone": (
        "cmmlu",
        "dev/logical.csv",
        lambda path: path.write_text(",,\n"),
        "logical.csv:1: has only blank cells",
    ),
    "blank examples alone": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: path.write_text(",,,,\n"),
        "few_shot_prompts.csv:1: has only blank cells",
    ),
    "an example with a list as a key": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: replace(path, path.read_text().split('"')[1], "{[]: 1}"),
        "few_shot_prompts.csv:2 (logiqa-en): is not an example",
    ),
    "items twice": (
        "gaokao",
        "Data/Objective_Questions/2010-2022_Math_I_MCQs.json",
        lambda path: path.write_text('{"example": [1],\n"example": [{"question": "a", "answer": ["A"]}, 2]}'),
        'MCQs.json:2: has "example" a second time',
    ),
    "a header alone": (
        "cmmlu",
        "test/logical.csv",
        lambda path: path.write_text(",Question,A,B,C,D,Answer\n"),
        "logical.csv:1: has a header and no question",
    ),
    "another encoding": (
        "cmmlu",
        "test/logical.csv",
        lambda path: path.write_bytes(path.read_text().replace("follows 1", "接着 1").encode("gb18030")),
        "logical.csv:3: not UTF-8",
    ),
    "an open quote": (
        "cmmlu",
        "test/logical.csv",
        lambda path: replace(path, "1,Which", '1,"Which'),
        "logical.csv:3: not CSV (a quote that this row opens is never closed); correct the row",
    ),
    "a quote inside a quoted cell": (
        "mmlu",
        "test/logical_test.csv",
        lambda path: replace(path, "Which of", '"Which "of'),
        "logical_test.csv:1: not CSV (a quote inside a quoted cell must be written twice); correct the row",
    ),
    "one column": (
        "mmlu",
        "test/logical_test.csv",
        lambda path: path.write_text("Which\n"),
        "logical_test.csv:1: 1 column, 6 expected",
    ),
    "UTF-16": (
        "ceval",
        "val/logic_val.csv",
        lambda path: path.write_text(path.read_text(), encoding="utf-16"),
        "logic_val.csv:1: is UTF-16, not UTF-8; convert it, such as with iconv -f UTF-16 -t UTF-8",
    ),
    "UTF-32": (
        "ceval",
        "val/logic_val.csv",
        lambda path: path.write_text(path.read_text(), encoding="utf-32"),
        "logic_val.csv:1: is UTF-32, not UTF-8; convert it, such as with iconv -f UTF-32 -t UTF-8",
    ),
    "a zero byte": (
        "mmlu",
        "test/logical_test.csv",
        lambda path: replace(path, "follows 1", "follows \0"),
        "logical_test.csv:2: has a zero byte",
    ),
    "jsonl that ends early": ("gsm8k", "test.jsonl", end_early, "test.jsonl:4: not JSON"),
    "json that ends early": (
        "gaokao",
        "Data/Objective_Questions/2010-2022_Math_I_MCQs.json",
        end_early,
        "MCQs.json:23: not JSON",
    ),
    "a gaokao answer outside A-D": (
        "gaokao",
        "Data/Objective_Questions/2010-2022_Math_I_MCQs.json",
        lambda path: replace(path, '"A"\n', '"G"\n'),
        "MCQs.json:11: the answer is 'G'",
    ),
    "an agieval label outside A-D": (
        "agieval",
        "v1/logiqa-en.jsonl",
        lambda path: replace(path, '"label": "B"', '"label": "E"'),
        "logiqa-en.jsonl:2: the answer is 'E'",
    ),
    "no examples of agieval": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: path.unlink(),
        "few_shot_prompts.csv: there is no such file",
    ),
    "a task without examples": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: replace(path, ",jec-qa-kd", ",jec-qa-xy"),
        "few_shot_prompts.csv:1: has no column jec-qa-kd",
    ),
    "an example without a label": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: path.write_text(path.read_text().replace("'label'", "'answer'")),
        "few_shot_prompts.csv:2 (jec-qa-kd)",
    ),
    "code for an example": (
        "agieval",
        "few_shot_prompts.csv",
        lambda path: replace(path, '"{', '"print({'),
        "few_shot_prompts.csv:2 (logiqa-en): is not an example",
    ),
    "a solution without a number": (
        "gsm8k",
        "train.jsonl",
        lambda path: replace(path, "#### 52", "#### many"),
        'train.jsonl:2: "answer" does not end with',
    ),
}


def test_questions_with_empty_or_equal_choices_are_counted_and_scored(tmp_path, caplog):
    """The published sets have some."""
    folder = evaluation_files.write_mmlu(tmp_path / "mmlu")
    path = folder / "test" / "agronomy_test.csv"
    replace(path, "?,1,2,3,4,A", "?,1,1,3,4,A")
    replace(path, "?,2,3,4,5,B", "?,2,,4,5,B")
    replace(path, "?,3,4,5,6,C", "?,3,4, 3,6,C")
    with caplog.at_level("INFO"):
        (task,) = read_tasks([("mmlu", folder)], num_fewshot=None, limit=None, seed=0)
    assert len(task.subjects) == 12
    assert f"mmlu: 1 question with an empty choice, scored unchanged: {path}:2" in caplog.messages
    assert f"mmlu: 2 questions with equal choices, scored unchanged: {path}:1, {path}:3" in caplog.messages


@pytest.mark.parametrize("hidden", ["test", "test/agronomy_test.csv"])
def test_what_this_user_may_not_read_is_a_mistake_of_the_user(hidden, tmp_path, capsys):
    folder = evaluation_files.write_mmlu(tmp_path / "mmlu")
    (folder / hidden).chmod(0)
    with (
        as_ordinary_user(folder),
        pytest.raises(SystemExit) as end,
        one_line_errors("evaluation"),
    ):
        read_tasks([("mmlu", folder)], num_fewshot=None, limit=None, seed=0)
    (folder / hidden).chmod(0o755)
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(folder / hidden) in error and error.endswith(f"{PERMISSION_CURE}\n")


@contextlib.contextmanager
def as_ordinary_user(folder):
    """Root may read everything, so another user who may read the folder, except what its owner may not."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        if path.stat().st_mode & 0o400:
            path.chmod(0o755)
    opened = [path for path in folder.parents if path.stat().st_uid == 0 and not path.stat().st_mode & 1]
    for path in opened:
        path.chmod(path.stat().st_mode | 1)
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        for path in opened:
            path.chmod(path.stat().st_mode & ~1)


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_used_is_named_with_its_line(case, tmp_path):
    name, file, damage, message = BROKEN[case]
    evaluation_files.WRITERS[name](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError) as error:
        SETS[name].read(tmp_path, 0 if name == "gaokao" else 5)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "text, number",
    [
        ("3 + 4 = 7.\n#### 7\nQuestion", 7),
        ("so it is $1,200.50", 1200.5),
        ("#### 1,000 and 7", 1000),
        ("It is -3.", -3),
        ("#### 5.0", 5),
        ("none", None),
    ],
)
def test_the_final_number_of_an_answer(text, number):
    assert final_number(text) == number


def test_a_limit_takes_from_all_subjects(tmp_path):
    found = SETS["mmlu"].read(evaluation_files.write_mmlu(tmp_path), 0).questions
    assert [question.subject for question in by_turns(found, 5)] == ["agronomy"] * 3 + ["logical"] * 2
    assert [question.text[:33] for question in by_turns(found, 3)] == [
        "Which of these numbers follows 0 ",
        "Which of these numbers follows 1 ",
        "Which of these numbers follows 0 ",
    ]
    assert by_turns(found, 99) == found


def test_every_line_of_a_gaokao_file_is_the_right_one(tmp_path):
    """An item may have the words of a key in its text."""
    folder = evaluation_files.write_gaokao(tmp_path)
    path = folder / "Data" / "Objective_Questions" / "2010-2022_Math_I_MCQs.json"
    content = json.loads(path.read_text())
    content["keywords"] = 'the "example": [ of'
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1))
    wheres = [question.where for question in SETS["gaokao"].read(folder, 0).questions]
    assert [where.rpartition(":")[2] for where in wheres] == ["4", "11"]
