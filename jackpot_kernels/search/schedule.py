"""Schedules: how many of the proposed swaps a step grants, and how many weights it keeps.

A schedule is a function of the time ``u = t / total_steps`` in (0, 1], for the steps t = 1 ... total_steps.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

Schedule = Callable[[float], float]


def quartic(u: float) -> float:
    """Rate of the paper, ``(1 - u)^4`` (Eq. 29): much exploration first, hardly any at the end."""
    # Products, not pow: each is rounded as IEEE 754 says, so the table has the same bits on every machine.
    square = (1.0 - u) * (1.0 - u)
    return square * square


def inverse(u: float) -> float:
    """Rate ``u^4`` (Eq. 32)."""
    square = u * u
    return square * square


def constant(u: float) -> float:
    """Rate 1: every proposed swap is granted, which is edge-popup from a warm start."""
    return 1.0


def single(u: float) -> float:
    """One swap a step, where any is proposed: ``ceil(n * 2^-64)`` is 1 for every count n > 0."""
    return 2.0**-64


def cubic(u: float) -> float:
    """Share of the way still to go, ``(1 - u)^3``."""
    return (1.0 - u) * (1.0 - u) * (1.0 - u)


def linear(u: float) -> float:
    """Share of the way still to go, ``1 - u``."""
    return 1.0 - u


SCHEDULES: Mapping[str, Schedule] = {
    "quartic": quartic,
    "inverse": inverse,
    "constant": constant,
    "single": single,
}
RAMPS: Mapping[str, Schedule] = {"cubic": cubic, "linear": linear}


def rate_table(schedule: str | Schedule, total_steps: int) -> Tensor:
    """Tabulate the rate ``r(t)`` of which ``q = ceil(n * r(t))`` swaps are granted of n proposed (Eq. 29).

    Args:
        schedule: "quartic", "inverse", "constant", "single" or a function of ``t / total_steps``.
        total_steps: number of steps of the search, at least 1.

    Returns:
        float64 rates in [0, 1] for t = 1 ... total_steps.  # [T]

    Raises:
        ValueError: for an unknown name, a ``total_steps`` below 1, or a rate that is NaN or outside [0, 1].
        TypeError: when ``total_steps`` is no integer, or ``schedule`` neither a name nor a function.
    """
    return _tabulate(
        "schedule", _lookup("schedule", schedule, SCHEDULES), _positive_int("total_steps", total_steps)
    )


def ramp_table(ramp: str | Schedule, total_steps: int, ramp_end: float = 0.5) -> Tensor:
    """Tabulate the share of the way from the first to the last number of kept weights that is still to go.

    Args:
        ramp: "cubic", "linear" or a function of ``u = min(1, t / (ramp_end * total_steps))`` that never rises
            and ends at 0.
        total_steps: number of steps of the search, at least 1.
        ramp_end: when the ramp has ended, as a fraction of the search in (0, 1].

    Returns:
        float64 shares in [0, 1] for t = 1 ... total_steps; the last is 0.  # [T]

    Raises:
        ValueError: for an unknown name, a value outside its range, or a ramp that rises or does not end at 0.
        TypeError: when ``total_steps`` is no integer, or ``ramp`` neither a name nor a function.
    """
    function = _lookup("ramp", ramp, RAMPS)
    if not 0.0 < ramp_end <= 1.0:
        raise ValueError(f"ramp_end must be in (0, 1], got {ramp_end}")
    table = _tabulate(
        "ramp", lambda u: function(min(1.0, u / ramp_end)), _positive_int("total_steps", total_steps)
    )
    if bool((table[1:] > table[:-1]).any()):
        step = int((table[1:] > table[:-1]).nonzero()[0]) + 2
        raise ValueError(f"ramp must never rise, got {table[step - 2]} then {table[step - 1]} at step {step}")
    if table[-1] != 0:
        raise ValueError(f"ramp must end at 0, got {table[-1]}")
    return table


def step_table(rates: Tensor, ramp: Tensor, swap_every: int = 1) -> Tensor:
    """Join rates and ramp into what the swap reads on the device, with swaps at every ``swap_every``-th step.

    Between two swaps the rate is 0 and the ramp stands still, so that nothing moves. The last step always
    swaps, so that the ramp reaches its end.

    Args:
        rates: float64 rates.  # [T]
        ramp: float64 shares of the ramp still to go.  # [T]
        swap_every: period of the swaps in steps, at least 1.

    Returns:
        float64 rows of (rate, ramp) for t = 1 ... total_steps.  # [T, 2]

    Raises:
        ValueError: when ``swap_every`` is below 1.
        TypeError: when ``swap_every`` is no integer.
    """
    steps = torch.arange(1, len(rates) + 1)
    swaps = (steps % _positive_int("swap_every", swap_every) == 0) | (steps == len(rates))
    last_swap = torch.where(swaps, steps, 0).cummax(0).values
    before_any = last_swap == 0
    return torch.stack(
        [torch.where(swaps, rates, 0.0), torch.where(before_any, 1.0, ramp[(last_swap - 1).clamp(min=0)])],
        dim=1,
    )


def _lookup(argument: str, schedule: str | Schedule, known: Mapping[str, Schedule]) -> Schedule:
    if isinstance(schedule, str):
        if schedule not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)} or a function, got {schedule!r}")
        return known[schedule]
    if not callable(schedule):
        raise TypeError(f"{argument} must be a name or a function, got {type(schedule).__name__}")
    return schedule


def _positive_int(argument: str, value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1, got {value}")
    return int(value)


def _tabulate(argument: str, schedule: Schedule, total_steps: int) -> Tensor:
    values = [float(schedule(t / total_steps)) for t in range(1, total_steps + 1)]
    for t, value in enumerate(values, start=1):
        if not 0.0 <= value <= 1.0 or math.isnan(value):
            raise ValueError(
                f"{argument} must give values in [0, 1], got {value} at step {t} of {total_steps}"
            )
    return torch.tensor(values, dtype=torch.float64)
