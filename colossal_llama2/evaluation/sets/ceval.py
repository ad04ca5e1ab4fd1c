"""C-Eval (Huang et al. 2023, https://github.com/hkust-nlp/ceval): {dev,val}/SUBJECT_{dev,val}.csv with a header.

The authors keep the answers of the split "test" to themselves, so "val" is evaluated.
"""

from pathlib import Path

from colossal_llama2.evaluation.sets.prompt_form import PromptForm, in_words, lettered
from colossal_llama2.evaluation.sets.questions import Question, QuestionSet
from colossal_llama2.evaluation.sets.subject_files import read_subjects
from colossal_llama2.evaluation.sets.subject_names import CEVAL
from colossal_llama2.evaluation.sets.text_files import Row, named_cells

COLUMNS = ("question", "A", "B", "C", "D", "answer")


def read(folder: Path, shots: int) -> QuestionSet:
    """The questions of the split "val". Raises UserError as `read_subjects`."""
    return read_subjects(folder, split="val", suffixes=("_val.csv", "_dev.csv"), rows_of=_rows, shots=shots)


def _rows(path: Path) -> list[Row]:
    return named_cells(path, COLUMNS, ignored=("id", "explanation"))


def _introduction(subject: str, has_examples: bool) -> str:
    return f"以下是中国关于{CEVAL.get(subject, in_words(subject))}考试的单项选择题，请选出其中的正确答案。\n\n"


def _question(question: Question, number: int) -> str:
    return f"{question.text}\n{lettered(question)}\n答案："


FORM = PromptForm(_introduction, _question, lead="")
