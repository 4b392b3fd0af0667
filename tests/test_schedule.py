"""Rates, ramps and swap periods against their equations and against each kind of bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jackpot_kernels.search.schedule import SCHEDULES, ramp_table, rate_table, step_table


def times(total_steps):
    return np.arange(1, total_steps + 1) / total_steps


@pytest.mark.parametrize("total_steps", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("name", "equation"),
    [
        ("quartic", lambda u: (1 - u) ** 4),  # Eq. 29
        ("inverse", lambda u: u**4),  # Eq. 32
        ("constant", np.ones_like),
    ],
)
def test_rates_follow_their_equation(name, equation, total_steps):
    table = rate_table(name, total_steps)
    assert table.dtype == torch.float64
    np.testing.assert_allclose(table.numpy(), equation(times(total_steps)), rtol=1e-15)


def test_quartic_ends_at_zero_and_inverse_at_one():
    assert rate_table("quartic", 9)[-1] == 0
    assert rate_table("inverse", 9)[-1] == 1


@given(n=st.integers(1, 2**48))
def test_single_grants_exactly_one_swap(n):
    rate = float(rate_table("single", 1)[0])
    assert math.ceil(n * rate) == 1
    assert math.ceil(0 * rate) == 0


def test_a_function_sees_the_time_of_each_step():
    seen = []
    table = rate_table(lambda u: seen.append(u) or u / 2, 4)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    assert table.tolist() == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("ramp_end", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("name", "power"), [("cubic", 3), ("linear", 1)])
def test_ramps_follow_their_equation(name, power, ramp_end):
    table = ramp_table(name, 40, ramp_end).numpy()
    np.testing.assert_allclose(table, np.clip(1 - times(40) / ramp_end, 0, None) ** power, atol=1e-15)
    assert (np.diff(table) <= 0).all()
    assert (table[times(40) >= ramp_end] == 0).all()


def test_a_ramp_function_sees_the_share_that_has_passed():
    assert ramp_table(lambda u: 1 - u, 4, 0.5).tolist() == [0.5, 0, 0, 0]


@pytest.mark.parametrize(("swap_every", "swaps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])])
def test_between_swaps_the_rate_is_zero_and_the_ramp_stands_still(swap_every, swaps):
    rates, ramp = rate_table("constant", 7), ramp_table("linear", 7, 1.0)
    table = step_table(rates, ramp, swap_every)
    assert table.dtype == torch.float64 and table.is_contiguous()
    held = 1.0
    for t, (rate, share) in enumerate(table.tolist(), start=1):
        held = float(ramp[t - 1]) if t in swaps else held
        assert rate == (1 if t in swaps else 0)
        assert share == held
    assert table[-1, 1] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rate_table("cosine", 5), ValueError, f"schedule must be one of {', '.join(SCHEDULES)}"),
        (lambda: rate_table(3, 5), TypeError, "schedule must be a name or a function, got int"),
        (lambda: rate_table("quartic", 0), ValueError, "total_steps must be at least 1, got 0"),
        (lambda: rate_table("quartic", 2.0), TypeError, "total_steps must be an integer, got float"),
        (lambda: rate_table("quartic", True), TypeError, "total_steps must be an integer, got bool"),
        (
            lambda: rate_table(lambda u: 1.5 * u, 2),
            ValueError,
            "schedule must give values in .0, 1., got 1.5 at step 2",
        ),
        (
            lambda: rate_table(lambda u: math.nan, 2),
            ValueError,
            "schedule must give values in .0, 1., got nan at step 1",
        ),
        (lambda: rate_table(lambda u: -u, 2), ValueError, "got -0.5 at step 1 of 2"),
        (lambda: ramp_table("square", 5), ValueError, "ramp must be one of cubic, linear"),
        (lambda: ramp_table("cubic", 5, 0.0), ValueError, "ramp_end must be in .0, 1., got 0.0"),
        (lambda: ramp_table("cubic", 5, math.nan), ValueError, "ramp_end must be in .0, 1., got nan"),
        (lambda: ramp_table("cubic", 5, 1.5), ValueError, "ramp_end must be in .0, 1., got 1.5"),
        (
            lambda: ramp_table(lambda u: u, 2, 1.0),
            ValueError,
            "ramp must never rise, got 0.5 then 1.0 at step 2",
        ),
        (lambda: ramp_table(lambda u: 0.5, 2), ValueError, "ramp must end at 0, got 0.5"),
        (
            lambda: step_table(torch.ones(2), torch.zeros(2), 0),
            ValueError,
            "swap_every must be at least 1, got 0",
        ),
        (lambda: step_table(torch.ones(2), torch.zeros(2), 1.5), TypeError, "swap_every must be an integer"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()
