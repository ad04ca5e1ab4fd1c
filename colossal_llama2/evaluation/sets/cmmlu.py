"""CMMLU (Li et al. 2023, https://github.com/haonan-li/CMMLU): {dev,test}/SUBJECT.csv with a header.

The introduction and the form of a question are the authors', except that the prompt ends with "答案：", as in lm-eval,
and not with "答案是：".
"""

from pathlib import Path

from colossal_llama2.evaluation.sets.prompt_form import PromptForm, in_words, lettered
from colossal_llama2.evaluation.sets.questions import Question, QuestionSet
from colossal_llama2.evaluation.sets.subject_files import read_subjects
from colossal_llama2.evaluation.sets.subject_names import CMMLU
from colossal_llama2.evaluation.sets.text_files import Row, named_cells

COLUMNS = ("Question", "A", "B", "C", "D", "Answer")


def read(folder: Path, shots: int) -> QuestionSet:
    """The questions of the split "test". Raises UserError as `read_subjects`."""
    return read_subjects(folder, split="test", suffixes=(".csv", ".csv"), rows_of=_rows, shots=shots)


def _rows(path: Path) -> list[Row]:
    # The first column has the number of the row and no name.
    return named_cells(path, COLUMNS, ignored=("",))


def _introduction(subject: str, has_examples: bool) -> str:
    return f"以下是关于{CMMLU.get(subject, in_words(subject))}的单项选择题，请直接给出正确答案的选项。\n\n"


def _question(question: Question, number: int) -> str:
    return f"题目：{question.text}\n{lettered(question)}\n答案："


FORM = PromptForm(_introduction, _question, lead="")
