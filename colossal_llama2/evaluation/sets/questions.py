"""What the readers of all sets return: questions, examples to put before them, and what was left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from colossal_llama2.errors import UserError

LETTERS = ("A", "B", "C", "D")


class Question(NamedTuple):
    """One question of a set.

    Attributes:
        where: the file and the line, for messages.
        subject: the part of the set that it belongs to.
        text: the question; with the choices, if the set has them inside the question.
        choices: the texts of the choices, without their letters; empty if they are in `text`, or there are none.
        answer: the letter of the right choice; in a set without choices, the whole solution.
        passage: a text that the question is about, or "".
    """

    where: str
    subject: str
    text: str
    choices: tuple[str, ...]
    answer: str
    passage: str = ""


@dataclass
class QuestionSet:
    """The questions of a set in the order of its files.

    Attributes:
        examples: for each subject, the questions that may stand before those of the subject, with their answers.
        left_out: how many questions cannot be used, by reason.
        examples_left_out: how many examples of the subjects cannot be used, by reason.
    """

    questions: list[Question]
    examples: Mapping[str, Sequence[Question]]
    left_out: dict[str, int] = field(default_factory=dict)
    examples_left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        """Count a question that is left out."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1


def checked_letter(answer: str, where: str) -> str:
    """The letter of the right choice. Raises UserError if it is none of `LETTERS`."""
    if answer not in LETTERS:
        raise UserError(
            f"{where}: the answer is {answer[:40]!r}, one of {', '.join(LETTERS)} allowed; correct the file"
        )
    return answer


def doubtful_choices(questions: Iterable[Question]) -> dict[str, list[str]]:
    """Where the questions are that have an empty choice, or two equal ones, by what they have.

    The published sets have some, so they are scored all the same.
    """
    found: dict[str, list[str]] = {"an empty choice": [], "equal choices": []}
    for question in questions:
        if not all(choice.strip() for choice in question.choices):
            found["an empty choice"].append(question.where)
        elif len(set(question.choices)) < len(question.choices):
            found["equal choices"].append(question.where)
    return {what: places for what, places in found.items() if places}
