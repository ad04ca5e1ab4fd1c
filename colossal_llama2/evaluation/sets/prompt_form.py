"""How a set's questions are written into a prompt: an introduction, examples with answers, and the question itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from colossal_llama2.evaluation.sets.questions import LETTERS, Question


@dataclass(frozen=True)
class PromptForm:
    """The form of a set's prompts.

        introduction(subject) + question(example, 1) + lead + example.answer + between + ... + question(asked, n)

    Attributes:
        introduction: the beginning for a subject, without and with examples.
        question: the text of a question with the given number, up to where its answer begins.
        lead: between the question and its answer in an example: " " or "".
        between: follows an example.
    """

    introduction: Callable[[str, bool], str]
    question: Callable[[Question, int], str]
    lead: str
    between: str = "\n\n"

    def prompt(self, asked: Question, examples: Sequence[Question]) -> str:
        """The prompt for a question after these examples. Its answer would begin with `lead`."""
        parts = [self.introduction(asked.subject, bool(examples))]
        for number, example in enumerate(examples, start=1):
            parts.append(f"{self.question(example, number)}{self.lead}{example.answer}{self.between}")
        return "".join([*parts, self.question(asked, len(examples) + 1)])


def lettered(question: Question) -> str:
    """The choices of a question, one on each line: "A. first"."""
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=True))


def in_words(subject: str) -> str:
    """The name of a subject as words: "high_school_physics" becomes "high school physics"."""
    return subject.replace("_", " ")
