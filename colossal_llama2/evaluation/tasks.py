"""Read the tasks of a command, before torch is imported."""

from collections.abc import Sequence
from pathlib import Path

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.icl_task import IclTask
from colossal_llama2.evaluation.question_task import QuestionTask
from colossal_llama2.evaluation.sets.questions import Question
from colossal_llama2.evaluation.sets.registry import SETS
from colossal_llama2.evaluation.task import Task
from colossal_llama2.evaluation.text_task import TextTask
from colossal_llama2.logs import get_logger
from colossal_llama2.plurals import counted
from colossal_llama2.task_names import BITS_PER_BYTE, ICL


def read_tasks(
    tasks: Sequence[tuple[str, Path | None]], *, num_fewshot: int | None, limit: int | None, seed: int
) -> list[Task]:
    """Tasks by name, in their order. What they leave out is logged.

    Args:
        tasks: names, each with where its files are; None for icl.
        num_fewshot, limit, seed: as in `EvaluationSettings`.

    Raises:
        UserError: with file:line, for a file that is missing or cannot be used.
    """
    found: list[Task] = []
    for name, place in tasks:
        if name == ICL:
            found.append(IclTask(seed=seed, limit=limit))
        elif name == BITS_PER_BYTE:
            assert place is not None
            found.append(TextTask(place, limit))
        else:
            assert place is not None
            kind = SETS[name]
            # A set without examples has none with any --num_fewshot.
            shots = kind.num_fewshot if num_fewshot is None or not kind.num_fewshot else num_fewshot
            questions = kind.read(place, shots)
            questions.questions = by_turns(questions.questions, limit)
            found.append(QuestionTask(name, kind, questions, shots))
        for reason, count in found[-1].left_out.items():
            get_logger().info(f"{found[-1].name}: {counted(count, 'item')} {reason} left out")
    names = [task.name for task in found]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice:
        raise UserError(f"--tasks: two files are named {twice}; rename one, since the table has their names")
    return found


def by_turns(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions: the first of each subject, then the second of each, and so on; in their order."""
    if limit is None or len(questions) <= limit:
        return list(questions)
    seen: dict[str, int] = {}
    turns = []
    for place, question in enumerate(questions):
        turns.append((seen.get(question.subject, 0), place))
        seen[question.subject] = seen.get(question.subject, 0) + 1
    return [questions[place] for place in sorted(place for _, place in sorted(turns)[:limit])]
