"""AGIEval (Zhong et al. 2023, https://github.com/ruixiangcui/AGIEval): v1/TASK.jsonl and few_shot_prompts.csv.

The examples and the form of the prompts are those of the authors' few-shot setting without explanations. Only
questions with four choices and one right answer are read, as in the table of Colossal-LLaMA-2; the others are counted.
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
CHINESE = re.compile(r"gaokao-(?!english)|-zh$|^jec-qa")


def read(folder: Path, shots: int) -> QuestionSet:
    """The 4-choice questions of all tasks.

    Raises:
        UserError: with file:line, for a file that is missing or a question of another form.
    """
    root = folder_of(folder, "data", needed="v1")
    found = QuestionSet([], _examples(folder_of(root, needed=EXAMPLES_FILE), shots) if shots else {})
    for path in files_of(root / "v1", ".jsonl"):
        for where, record in jsonl_records(path):
            _add(found, _read(record, where, path.stem))
    if not found.questions:
        raise UserError(f"{root / 'v1'}: has no question with four choices; give the folder as published")
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


def _examples(folder: Path, shots: int) -> dict[str, list[Question]]:
    """The examples of each task: the file has a column for each, and rows of samples and of their explanations."""
    header, *rows = csv_rows(folder / EXAMPLES_FILE)
    found: dict[str, list[Question]] = {name: [] for name in header.cells[1:]}
    for row in rows:
        if not row.cells[0].startswith("sample"):
            continue
        for subject, cell in zip(header.cells[1:], row.cells[1:], strict=False):
            example = _example(cell, f"{row.where} ({subject})", subject) if cell.strip() else ""
            if isinstance(example, Question) and len(found[subject]) < shots:
                found[subject].append(example)
    return found


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
        return "以下是考试中各个问题的答案。\n\n"
    return "Here are the answers for the problems in the exam.\n\n"


def _question(question: Question, number: int) -> str:
    options = " ".join(question.choices)
    text = f"{question.passage} {question.text}".strip()
    if _is_chinese(question.subject):
        return f"问题 {number}.   {text}\n从以下选项中选择:    {options}\n答案是"
    return f"Problem {number}.   {text}\nChoose from the following options:    {options}\nThe answer is therefore"


FORM = PromptForm(_introduction, _question, lead=" ")
