"""MMLU (Hendrycks et al. 2021, https://github.com/hendrycks/test): {dev,test}/SUBJECT_{dev,test}.csv, no header.

The prompts are those of the authors' evaluate.py, with its two spaces before the name of the subject, except that
spaces around a cell are removed. A prompt that is too long loses its first examples, and the authors' its last.
"""

from pathlib import Path

from colossal_llama2.evaluation.sets.prompt_form import PromptForm, in_words, lettered
from colossal_llama2.evaluation.sets.questions import Question, QuestionSet
from colossal_llama2.evaluation.sets.subject_files import read_subjects
from colossal_llama2.evaluation.sets.text_files import csv_rows


def read(folder: Path, shots: int) -> QuestionSet:
    """The questions of the split "test". Raises UserError as `read_subjects`."""
    return read_subjects(folder, split="test", suffixes=("_test.csv", "_dev.csv"), rows_of=csv_rows, shots=shots)


def _introduction(subject: str, has_examples: bool) -> str:
    return f"The following are multiple choice questions (with answers) about  {in_words(subject)}.\n\n"


def _question(question: Question, number: int) -> str:
    return f"{question.text}\n{lettered(question)}\nAnswer:"


FORM = PromptForm(_introduction, _question, lead=" ")
