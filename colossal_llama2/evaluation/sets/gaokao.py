"""GAOKAO-Bench (Zhang et al. 2023, https://github.com/OpenLMLab/GAOKAO-Bench): Data/Objective_Questions/*.json.

Only items that ask one question with one right answer of four are read. An item of reading or cloze asks several
questions about one text; it is left out as a whole, and counted. The choices are inside the question.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.prompt_form import PromptForm
from colossal_llama2.evaluation.sets.questions import Question, QuestionSet, checked_letter
from colossal_llama2.evaluation.sets.subject_names import GAOKAO
from colossal_llama2.evaluation.sets.text_files import files_of, folder_of, read_text

FOLDER = "Objective_Questions"
YEARS = re.compile(r"^\d{4}-\d{4}_")
# A quote inside a string is escaped, so this is a key.
LIST_OF_ITEMS = re.compile(r'"example"\s*:\s*\[?')
BETWEEN = re.compile(r"[\s,]*")


def read(folder: Path, shots: int) -> QuestionSet:
    """The single questions of all subjects; the set has no examples, so `shots` is 0.

    Raises:
        UserError: with file:line, for a file that is missing or an item of another form.
    """
    root = folder_of(folder, "Data", needed=FOLDER) / FOLDER
    found = QuestionSet([], {})
    for path in files_of(root, ".json"):
        subject = YEARS.sub("", path.stem)
        for where, record in _items(path):
            question = _read(record, where, subject)
            if isinstance(question, str):
                found.leave_out(question)
            else:
                found.questions.append(question)
    if not found.questions:
        raise UserError(f"{root}: has no item with a single question; give the folder as published")
    return found


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each item of a file begins, and the item."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); copy the file again from its source")
    except RecursionError:
        raise UserError(f"{path}:1: nested too deeply; copy the file again from its source")
    keys = list(LIST_OF_ITEMS.finditer(text))
    if not isinstance(content, dict) or not isinstance(content.get("example"), list) or not keys:
        raise UserError(f'{path}:1: has no list "example"; copy the file again from its source')
    if len(keys) > 1:
        where = f"{path}:{_line_of(text, keys[1].start())}"
        raise UserError(f'{where}: has "example" a second time; copy the file again from its source')
    decoder, place = json.JSONDecoder(), keys[0].end()
    for _ in content["example"]:
        place = _solid(text, place)
        record, end = decoder.raw_decode(text, place)
        yield f"{path}:{_line_of(text, place)}", record
        place = end


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _solid(text: str, place: int) -> int:
    found = BETWEEN.match(text, place)
    return place if found is None else found.end()


def _read(record: Any, where: str, subject: str) -> Question | str:
    """A question, or why it is left out."""
    answers = record.get("answer") if isinstance(record, dict) else None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f'{where}: "answer" must be a list of letters; copy the file again from its source')
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise UserError(f'{where}: "question" must be a text; copy the file again from its source')
    if len(answers) > 1:
        return "with several questions"
    if len(answers[0]) > 1 and answers[0].isalpha():
        return "with several right answers"
    return Question(where, subject, record["question"].strip(), (), checked_letter(answers[0], where))


def _introduction(subject: str, has_examples: bool) -> str:
    name = next((name for key, name in GAOKAO.items() if subject.startswith(key)), "")
    return f"以下是中国高考{name}的单项选择题，请直接给出正确答案的选项。\n\n"


def _question(question: Question, number: int) -> str:
    return f"题目：{question.text}\n答案："


FORM = PromptForm(_introduction, _question, lead="")
