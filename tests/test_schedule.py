"""The cubic schedule: bounds, plateaus, monotony, and the formula itself."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_pst import cubic_sparsity

hundredths = st.integers(0, 99).map(lambda n: n / 100)
schedules = st.fixed_dictionaries(
    {
        "total_steps": st.integers(1, 5000),
        "target_sparsity": hundredths,
        "initial_sparsity": hundredths,
        "warmup_ratio": st.integers(0, 100).map(lambda n: n / 100),
        "cooldown_ratio": st.integers(0, 100).map(lambda n: n / 100),
    }
).filter(lambda s: s["warmup_ratio"] + s["cooldown_ratio"] <= 1)


def exact(step: int, schedule: dict[str, float]) -> Fraction:
    """The formula in rational arithmetic, on the decimals that were written."""
    numbers = {name: Fraction(str(value)) for name, value in schedule.items()}
    start, end = numbers["initial_sparsity"], numbers["target_sparsity"]
    total = numbers["total_steps"]
    ramp_start, ramp_end = numbers["warmup_ratio"] * total, (1 - numbers["cooldown_ratio"]) * total
    if step >= ramp_end:
        return end
    if step <= ramp_start:
        return start
    return end + (start - end) * (1 - (step - ramp_start) / (ramp_end - ramp_start)) ** 3


@given(schedule=schedules, data=st.data())
def test_formula(schedule: dict[str, float], data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * int(schedule["total_steps"])))
    ramp_ends = (
        Fraction(str(schedule["warmup_ratio"])) * int(schedule["total_steps"]),
        (1 - Fraction(str(schedule["cooldown_ratio"]))) * int(schedule["total_steps"]),
    )
    # Without a ramp the two ends are one step, at which rounding may choose either side.
    assume(ramp_ends[0] < ramp_ends[1] or step not in ramp_ends)
    assert cubic_sparsity(step, **schedule) == pytest.approx(float(exact(step, schedule)), abs=1e-12)


@given(schedule=schedules)
def test_monotone_and_bounded(schedule: dict[str, float]) -> None:
    values = [cubic_sparsity(step, **schedule) for step in range(int(schedule["total_steps"]) + 3)]
    rising = schedule["initial_sparsity"] <= schedule["target_sparsity"]
    assert values == sorted(values, reverse=not rising)
    low, high = sorted((schedule["initial_sparsity"], schedule["target_sparsity"]))
    assert all(low <= value <= high for value in values)


@given(total=st.integers(10, 5000), target=hundredths, initial=hundredths)
def test_plateaus_are_exact(total: int, target: float, initial: float) -> None:
    def at(step: int) -> float:
        return cubic_sparsity(step, total, target_sparsity=target, initial_sparsity=initial)

    assert {at(step) for step in range(total // 10 + 1)} == {initial}
    assert {at(step) for step in range(-(-7 * total // 10) + 1, total + 5)} == {target}


def test_the_papers_schedule_by_hand() -> None:
    values = [cubic_sparsity(step, 10, target_sparsity=0.8) for step in range(11)]
    ramp = [0.8 - 0.8 * (1 - (step - 1) / 6) ** 3 for step in range(2, 7)]
    assert values == pytest.approx([0.0, 0.0, *ramp, 0.8, 0.8, 0.8, 0.8], abs=1e-15)
    assert values[4] == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 999, 1000])
def test_the_last_step_is_at_the_target(total: int) -> None:
    assert cubic_sparsity(total, total, target_sparsity=0.9) == 0.9
    assert cubic_sparsity(total, total, target_sparsity=0.9, cooldown_ratio=0.0) == 0.9
    assert cubic_sparsity(10 * total, total, target_sparsity=0.9) == 0.9


def test_no_ramp_is_a_jump() -> None:
    values = [cubic_sparsity(step, 4, target_sparsity=0.9, warmup_ratio=0.5, cooldown_ratio=0.5) for step in range(5)]
    assert values == [0.0, 0.0, 0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("step", "total", "options", "message"),
    [
        (-1, 10, {}, "step=-1 is negative; pass the number of finished optimizer steps."),
        (0, 0, {}, "total_steps=0 is below 1; pass the number of optimizer steps of the whole run."),
        (0, 10, {"warmup_ratio": 0.8}, "warmup_ratio=0.8 and cooldown_ratio=0.3 sum to more than 1."),
    ],
)
def test_refusals(step: int, total: int, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full below
        cubic_sparsity(step, total, target_sparsity=0.9, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", ["target_sparsity", "initial_sparsity"])
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsities_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} is outside"):
        cubic_sparsity(5, 10, **{"target_sparsity": 0.9, name: value})


@pytest.mark.parametrize("name", ["warmup_ratio", "cooldown_ratio"])
def test_negative_ratios_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=-0.1.* is negative"):
        cubic_sparsity(5, 10, target_sparsity=0.9, **{name: -0.1})
