"""A number agrees with its noun."""

import pytest

from colossal_llama2.plurals import counted


@pytest.mark.parametrize(
    "number, noun, text",
    [
        (0, "sample", "0 samples"),
        (1, "bad row", "1 bad row"),
        (1234, "token", "1,234 tokens"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
    ],
)
def test_a_noun_is_plural_unless_there_is_one(number, noun, text):
    assert counted(number, noun) == text
