"""AGIEval (Zhong et al. 2023, https://github.com/ruixiangcui/AGIEval): v1/TASK.jsonl and few_shot_prompts.csv.

The examples and the form of the prompts are those of the authors' few-shot setting without explanations
(src/dataset_loader.py), with these differences:

- A prompt ends with "The answer is therefore" or "答案是", where the authors' ends after the choices: the logits of the
  letters are those of the next token.
- Without examples, the prompt has the same form; the authors have another.
- A prompt that is too long loses its first examples, and the authors' its last. The examples that stay are numbered
  from 1.
- Only questions and examples with four choices and one right answer are read, as in the table of Colossal-LLaMA-2; the
  others are counted.
"""

import ast
import re
from pathlib import Path
from typing import Any

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.prompt_form import PromptForm
from colossal_llama2.evaluation.sets.questions import LETTERS, Question, QuestionSet, checked_letter
from colossal_llama2.evaluation.sets.text_files import csv_rows, files_of, folder_of, jsonl_records

EXAMPLES_FILE = "few_shot_prompts.csv"
# Such a task has the examples of the one with passages, without theirs.
NO_PASSAGE = "-without-passage"
CHINESE = re.compile(r"gaokao-(?!english)|-zh$|^jec-qa")


def read(folder: Path, shots: int) -> QuestionSet:
    """The 4-choice questions of all tasks.

    Raises:
        UserError: with file:line, for a file that is missing or a question of another form.
    """
    root = folder_of(folder, "data", needed="v1")
    examples_file = folder_of(root, needed=EXAMPLES_FILE) / EXAMPLES_FILE if shots else None
    found = QuestionSet([], {})
    for path in files_of(root / "v1", ".jsonl"):
        for where, record in jsonl_records(path):
            _add(found, _read(record, where, path.stem))
    if not found.questions:
        raise UserError(f"{root / 'v1'}: has no question with four choices; give the folder as published")
    if examples_file is not None:
        found.examples = _examples(examples_file, found, shots)
    return found


def _add(found: QuestionSet, read_item: "Question | str") -> None:
    if isinstance(read_item, str):
        found.leave_out(read_item)
    else:
        found.questions.append(read_item)


def _read(
    record: dict[str, Any], where: str, subject: str, counts: tuple[int, ...] = (len(LETTERS),)
) -> Question | str:
    """A question whose number of choices is one of `counts`, or why it is left out."""
    options, label = record.get("options"), record.get("label")
    if options is None:
        return "without choices"
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f'{where}: "options" must be a list of strings or null; copy the file again from its source')
    if len(options) not in counts:
        return f"with {len(options)} choices"
    if isinstance(label, list):
        if len(label) != 1:
            return "with several right answers"
        label = label[0]
    texts: dict[str, Any] = {"question": record.get("question"), "label": label, "passage": record.get("passage") or ""}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise UserError(f'{where}: "{name}" must be a string; copy the file again from its source')
    answer = checked_letter(str(label), where)
    return Question(where, subject, texts["question"], tuple(options), answer, texts["passage"])


def _examples(path: Path, found: QuestionSet, shots: int) -> dict[str, list[Question]]:
    """The examples of each task with questions: its column of the rows of samples. Counts what it leaves out."""
    header, *rows = csv_rows(path)
    examples: dict[str, list[Question]] = {}
    for subject in dict.fromkeys(question.subject for question in found.questions):
        column = subject if subject in header.cells else subject.removesuffix(NO_PASSAGE)
        if column not in header.cells:
            raise UserError(f"{header.where}: has no column {subject}; give the file as published, or --num_fewshot 0")
        place = header.cells.index(column)
        samples = [row for row in rows if row.cells[0].startswith("sample") and "".join(row.cells[place:][:1]).strip()]
        usable = examples[subject] = []
        for row in samples:
            example = _example(row.cells[place], f"{row.where} ({column})", subject)
            if isinstance(example, str):
                found.examples_left_out[example] = found.examples_left_out.get(example, 0) + 1
            else:
                usable.append(example if column == subject else example._replace(passage=""))
            if len(usable) == shots:
                break
        if not usable:
            raise UserError(
                f"{header.where}: the column {column} has no example with four choices and one right answer; give the "
                "file as published, or --num_fewshot 0"
            )
    return examples


def _example(cell: str, where: str, subject: str) -> Question | str:
    """An example from its cell, which holds the literal of a Python dictionary."""
    try:
        record = ast.literal_eval(cell)
        if not isinstance(record, dict):
            raise ValueError
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"{where}: is not an example as the authors publish them; copy the file again from its source")
    # Some examples have all choices in one string.
    return _read(record, where, subject, counts=(1, len(LETTERS)))


def _is_chinese(subject: str) -> bool:
    return CHINESE.search(subject) is not None


def _introduction(subject: str, has_examples: bool) -> str:
    if not has_examples:
        return ""
    if _is_chinese(subject):
        return "以下是考试中各个问题的答案。\n"
    return "Here are the answers for the problems in the exam.\n"


def _question(question: Question, number: int) -> str:
    options = " ".join(question.choices)
    text = f"{question.passage} {question.text}"
    if _is_chinese(question.subject):
        return f"问题 {number}.   {text}\n从以下选项中选择:    {options}\n答案是"
    return f"Problem {number}.   {text}\nChoose from the following options:    {options}\nThe answer is therefore"


FORM = PromptForm(_introduction, _question, lead=" ")
