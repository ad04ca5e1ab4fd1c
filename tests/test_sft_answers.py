"""A share of tests/sft_answers.py: a tiny model learns eight dialogues, and is asked as a user asks."""

import pytest

from tests.sft_answers import CASES, questions, wrong_answers


def test_questions_are_short_and_asked_once():
    chosen = questions(20)
    assert len(chosen) == len({question for question, _ in chosen}) == 20
    assert any(ord(character) > 0x4E00 for question, _ in chosen[::2] for character in question)
    assert all(question.isascii() for question, _ in chosen[1::2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2"])
def test_every_question_is_answered_word_for_word(name, tmp_path):
    assert wrong_answers(tmp_path, CASES[name], count=8, template="colossal", epochs=90) == []
