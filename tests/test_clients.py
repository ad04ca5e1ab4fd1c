"""The comparison of other programs with training (tests/clients), without the programs."""

import numpy as np
import pytest

from colossal_llama2.errors import UserError
from tests.clients import environments
from tests.clients.comparing import compare
from tests.clients.exchange import LOG_LIKELIHOOD, LOG_PROBABILITIES, LOGITS, Found, Job
from tests.clients.models import Model

LOGITS_OF_MODEL = np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]], np.float32)
LOG_PROBS = LOGITS_OF_MODEL - np.log(np.exp(LOGITS_OF_MODEL).sum(-1, keepdims=True))
JOB = Job("m", ["q"], ["a"], [[0, 1, 2, 1]], [2], ["t"])
MODEL = Model(JOB, [[0, 2]], [LOGITS_OF_MODEL], ["a"])


def found(scores=LOGITS_OF_MODEL, kind=LOGITS, *, answer="a", prompt=(0, 1), text=(0, 2)) -> Found:
    return Found({"program": "1"}, [answer], [list(prompt)], [list(text)], [scores], kind)


@pytest.mark.parametrize(
    ("scores", "kind"),
    [
        (LOGITS_OF_MODEL, LOGITS),
        (LOG_PROBS, LOG_PROBABILITIES),
        # Without the step that ends the answer.
        (LOG_PROBS[:1], LOG_PROBABILITIES),
        (LOG_PROBS[0, 2], LOG_LIKELIHOOD),
    ],
)
def test_a_program_that_does_what_training_did(scores, kind, tmp_path):
    found(np.asarray(scores), kind).write(tmp_path)
    read = Found.read(tmp_path)
    assert read.versions == {"program": "1"}
    result = compare(MODEL, read)
    assert result.is_equal and result.compared == 1 and result.difference < 1e-6 and result.other_texts == 0


def test_every_difference_is_found():
    assert compare(MODEL, found(answer="b")).wrong == ["'q': 'b', not 'a'"]
    assert compare(MODEL, found(prompt=(0, 2))).other_prompts == 1
    assert compare(MODEL, found(text=(0,))).other_texts == 1
    assert compare(MODEL, found(LOGITS_OF_MODEL + 0.01)).difference == pytest.approx(0.01, rel=1e-4)
    # Nothing that can be compared is no agreement.
    for scores in (None, LOGITS_OF_MODEL[:1]):
        result = compare(MODEL, found(scores))
        assert result.compared == 0 and not result.is_equal
    for other in (found(answer="b"), found(prompt=(0, 2)), found(LOGITS_OF_MODEL + 0.01)):
        assert not compare(MODEL, other).is_equal


def test_without_uv_the_cure_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="pip install uv"):
        environments.python_of("vllm", tmp_path)
