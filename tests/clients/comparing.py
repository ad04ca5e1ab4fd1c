"""How far a client is from what the model was trained on and from our own logits."""

from typing import NamedTuple

import numpy as np

from tests.clients.exchange import LOG_LIKELIHOOD, LOGITS, Found
from tests.clients.models import Model

# Of logits in float32; those of these models are up to about 20.
ALLOWED = 2e-3


class Comparison(NamedTuple):
    """One client with one model.

    Attributes:
        wrong: the answers that are not word for word those of training.
        other_prompts, other_texts: how many questions and texts the client tokenizes otherwise than training does; the
            latter is None for a client without a tokenizer.
        difference: the largest of all logits or log-probabilities; NaN if none can be compared.
        compared: of how many questions.
    """

    wrong: list[str]
    other_prompts: int
    other_texts: int | None
    difference: float
    compared: int

    @property
    def is_equal(self) -> bool:
        """Whether the client does what training did."""
        return not self.wrong and not self.other_prompts and self.difference <= ALLOWED


def compare(model: Model, found: Found) -> Comparison:
    """Compare what a client found with what our own code finds."""
    job = model.job
    wrong = [
        f"{question!r}: {answer!r}, not {expected!r}"
        for question, answer, expected in zip(job.questions, found.answers, job.answers, strict=True)
        if answer != expected
    ]
    prompts = [ids[:length] for ids, length in zip(job.conversations, job.prompt_lengths, strict=True)]
    gaps = [
        gap
        for number, scores in enumerate(found.scores)
        if scores is not None and (gap := _gap(model, number, scores, found.kind)) is not None
    ]
    return Comparison(
        wrong,
        _count_other(found.prompts, prompts),
        None if found.texts is None else _count_other(found.texts, model.text_ids),
        max(gaps, default=float("nan")),
        len(gaps),
    )


def _count_other(found: list[list[int]], expected: list[list[int]]) -> int:
    return sum(one != other for one, other in zip(found, expected, strict=True))


def _gap(model: Model, number: int, scores: np.ndarray, kind: str) -> float | None:
    """The largest difference for one question; None if the client has another number of tokens."""
    logits = model.logits[number].astype(np.float64)
    if kind == LOGITS:
        return float(np.abs(scores - logits).max()) if scores.shape == logits.shape else None
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    if kind != LOG_LIKELIHOOD:
        # Some do not return the step that ends the answer.
        rows = min(len(scores), len(expected))
        return float(np.abs(scores[:rows] - expected[:rows]).max()) if rows >= len(expected) - 1 else None
    answer = model.job.conversations[number][model.job.prompt_lengths[number] : -1]
    return float(abs(scores - sum(expected[place, token] for place, token in enumerate(answer))))
