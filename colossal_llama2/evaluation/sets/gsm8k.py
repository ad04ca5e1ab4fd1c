"""GSM8K (Cobbe et al. 2021, https://github.com/openai/grade-school-math): test.jsonl, with train.jsonl for examples.

A solution ends with "#### " and the final number. The examples are the first lines of train.jsonl.
"""

import re
from decimal import Decimal, InvalidOperation
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.prompt_form import PromptForm
from colossal_llama2.evaluation.sets.questions import Question, QuestionSet
from colossal_llama2.evaluation.sets.text_files import folder_of, jsonl_records

NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
MARKED = re.compile(rf"####\s*({NUMBER.pattern})")
# Where an answer has gone on to a question of its own.
NEXT_QUESTION = "Question:"


def read(folder: Path, shots: int) -> QuestionSet:
    """The problems of test.jsonl. Raises UserError, with file:line, for what cannot be used."""
    root = folder_of(folder, "grade_school_math/data", "data", needed="test.jsonl")
    examples = _problems(root / "train.jsonl")[:shots] if shots else []
    return QuestionSet(_problems(root / "test.jsonl"), {"gsm8k": examples})


def _problems(path: Path) -> list[Question]:
    found = []
    for where, record in jsonl_records(path):
        for name in ("question", "answer"):
            if not isinstance(record.get(name), str) or not record[name].strip():
                raise UserError(f'{where}: "{name}" must be a text; copy the file again from its source')
        if MARKED.search(record["answer"]) is None:
            raise UserError(f'{where}: "answer" does not end with "#### " and a number; correct the file')
        found.append(Question(where, "gsm8k", record["question"].strip(), (), record["answer"].strip()))
    return found


def final_number(text: str) -> Decimal | None:
    """The number after the first "####" of a solution; without one, the last number. None if there is none."""
    marked = MARKED.search(text)
    numbers = [marked[1]] if marked else NUMBER.findall(text)[-1:]
    try:
        return Decimal(numbers[0].replace(",", "").replace("$", "")) if numbers else None
    except InvalidOperation:
        return None


def _introduction(subject: str, has_examples: bool) -> str:
    return ""


def _question(question: Question, number: int) -> str:
    return f"{NEXT_QUESTION} {question.text}\nAnswer:"


FORM = PromptForm(_introduction, _question, lead=" ")
