"""The sets that can be evaluated: how each is read, asked and scored.

Examples and metrics are those of the tables of Colossal-LLaMA-2 (README, "Performance Evaluation").
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2.evaluation.sets import agieval, ceval, cmmlu, gaokao, gsm8k, mmlu
from colossal_llama2.evaluation.sets.prompt_form import PromptForm
from colossal_llama2.evaluation.sets.questions import QuestionSet

# The logits of the first predicted token over the letters; or that or the letter of a greedy answer; or the final
# number of a greedy answer.
CHOICE, COMBINED, FINAL_NUMBER = "choice", "combined", "final_number"


@dataclass(frozen=True)
class EvaluationSet:
    """A set: `read` returns its questions with at most as many examples as its second argument."""

    read: Callable[[Path, int], QuestionSet]
    form: PromptForm
    num_fewshot: int
    metric: str = CHOICE


SETS = {
    "mmlu": EvaluationSet(mmlu.read, mmlu.FORM, 5),
    "cmmlu": EvaluationSet(cmmlu.read, cmmlu.FORM, 5),
    "ceval": EvaluationSet(ceval.read, ceval.FORM, 5),
    "agieval": EvaluationSet(agieval.read, agieval.FORM, 5, COMBINED),
    "gaokao": EvaluationSet(gaokao.read, gaokao.FORM, 0),
    "gsm8k": EvaluationSet(gsm8k.read, gsm8k.FORM, 8, FINAL_NUMBER),
}
