"""Read sets that have a folder for each split, and in it a CSV file of 4-choice questions for each subject."""

from collections.abc import Callable
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.questions import LETTERS, Question, QuestionSet, checked_letter
from colossal_llama2.evaluation.sets.text_files import Row, files_of, folder_of
from colossal_llama2.plurals import counted

# Question, the four choices, answer.
COLUMNS = 6


def read_subjects(
    folder: Path,
    *,
    split: str,
    suffixes: tuple[str, str],
    rows_of: Callable[[Path], list[Row]],
    shots: int,
) -> QuestionSet:
    """The questions of a split with those of the split "dev" as examples.

    Args:
        folder: that has the folders of the splits, or has them in data/.
        suffixes: what follows a subject in the names of the files of the split and of dev.
        rows_of: returns question, choices and answer of each row of a file.
        shots: examples before a question; with 0, dev is not read.

    Raises:
        UserError: a split, a file or a column is missing, or a row is no 4-choice question; with file:line.
    """
    root = folder_of(folder, "data", needed=split)
    questions: list[Question] = []
    examples: dict[str, list[Question]] = {}
    for path in files_of(root / split, suffixes[0]):
        subject = path.name.removesuffix(suffixes[0])
        questions += [_question(row, subject) for row in rows_of(path)]
        if shots:
            dev = root / "dev" / f"{subject}{suffixes[1]}"
            if not dev.exists():
                raise UserError(
                    f"{dev}: there is no such file, and the examples are read from it; give --num_fewshot 0"
                )
            examples[subject] = [_question(row, subject) for row in rows_of(dev)][:shots]
    return QuestionSet(questions, examples)


def _question(row: Row, subject: str) -> Question:
    if len(row.cells) != COLUMNS:
        raise UserError(
            f"{row.where}: {counted(len(row.cells), 'column')}, {COLUMNS} expected (the question, "
            f"{len(LETTERS)} choices, the answer); only 4-choice questions can be scored"
        )
    text, *choices, answer = (cell.strip() for cell in row.cells)
    if not text:
        raise UserError(f"{row.where}: the question is empty; correct the file")
    return Question(row.where, subject, text, tuple(choices), checked_letter(answer, row.where))
