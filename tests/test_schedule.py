"""The learning rate as a function of the step."""

import pytest

from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps


def test_warm_up_is_linear_and_ends_at_the_peak():
    schedule = CosineSchedule(peak=1e-3, total_steps=100, warmup_steps=4)
    assert [schedule.learning_rate(step) for step in range(5)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_cosine_falls_to_a_tenth():
    schedule = CosineSchedule(peak=1.0, total_steps=110, warmup_steps=10)
    rates = [schedule.learning_rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert schedule.learning_rate(10_000) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run():
    schedule = CosineSchedule(peak=1.0, total_steps=5, warmup_steps=100)
    assert [schedule.learning_rate(step) for step in range(5)] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


def test_default_is_two_and_a_half_percent():
    assert warmup_steps(None, 1000) == 25
    assert warmup_steps(None, 39) == 0
    assert warmup_steps(0, 1000) == 0
    assert warmup_steps(7, 10) == 7
