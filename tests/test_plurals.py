"""A number agrees with its noun, and a long list is cut."""

import pytest

from colossal_llama2.plurals import counted, some


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


@pytest.mark.parametrize(
    "names, text",
    [([], ""), (["a"], "a"), (["a", "b", "c"], "a, b, c"), (list("abcd"), "a, b, c and 1 more")],
)
def test_a_list_names_three(names, text):
    assert some(names) == text


def test_a_list_counts_the_rest_with_separators():
    assert some(["x"] * 1503) == "x, x, x and 1,500 more"
    assert some(["x"] * 4, 4) == "x, x, x, x"
