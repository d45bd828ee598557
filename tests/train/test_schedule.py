"""The learning rate over a run."""

import pytest

from loglinear.train.schedule import learning_rate_factor


def factors(schedule, steps=100, warmup_fraction=0.1, final_fraction=0.1):
    return [
        learning_rate_factor(
            step, steps=steps, schedule=schedule, warmup_fraction=warmup_fraction, final_fraction=final_fraction
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    assert factors(schedule)[:10] == pytest.approx([0.1 * step for step in range(1, 11)])


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.55), ("linear", 0.55)])
def test_falls_to_the_final_fraction(schedule, half):
    values = factors(schedule)
    assert values[-1] == pytest.approx(0.1)
    assert values[9 + 45] == pytest.approx(half)
    assert all(later < earlier for earlier, later in zip(values[9:], values[10:], strict=False))


def test_cosine_is_flat_where_the_line_is_not():
    cosine, linear = factors("cosine"), factors("linear")
    assert cosine[10] > linear[10] and cosine[98] < linear[98]


def test_constant_stays():
    assert factors("constant")[10:] == [1.0] * 90


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_move_at_every_step(steps, warmup_fraction):
    values = factors("linear", steps=steps, warmup_fraction=warmup_fraction, final_fraction=0.1)
    assert all(0 < value <= 1 for value in values)
