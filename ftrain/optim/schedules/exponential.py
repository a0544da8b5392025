"""A value that is multiplied by the same factor every so many steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, refuse
from .schedule import ScheduleFn, written

__all__ = ["exponential"]


def exponential(
    init_value: Value,
    transition_steps: float,
    decay_rate: Value,
    transition_begin: float = 0,
    staircase: bool = False,
    end_value: Value | None = None,
) -> ScheduleFn:
    """Multiply by `decay_rate` every `transition_steps` steps, smoothly or at once (`optax.exponential_decay`).

    Equation, with t the step, B = `transition_begin`, T = `transition_steps`, x = max((t - B) / T, 0), rounded down with
    `staircase`: `init_value decay_rate^x`, and not below `end_value` (above it, for a rate of 1 or more).

    Args:
        init_value: the value up to `transition_begin`.
        transition_steps: after how many steps the whole factor is reached.
        decay_rate: the factor, above 0.
        transition_begin: the step at which the decay begins.
        staircase: change the value only every `transition_steps` steps.
        end_value: the value at which it stops.

    Raises:
        LimitError: a negative value, no length, or a rate of 0.

    >>> import ftrain as ft
    >>> ft.schedules.exponential(1.0, 10, 0.5, staircase=True, end_value=0.2)([0, 9, 10, 20, 90])
    tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.2000], dtype=torch.float64)
    """
    check_values(init_value=init_value, decay_rate=decay_rate)
    if not isinstance(decay_rate, Tensor) and decay_rate == 0:
        raise refuse(
            "exponential: a value that is multiplied by 0 is 0.",
            expected="decay_rate > 0",
            got=decay_rate,
            fix="ft.schedules.exponential(0.1, 1000, 0.5)",
        )
    check_numbers(positive=True, transition_steps=transition_steps)
    check_numbers(transition_begin=transition_begin)
    if end_value is not None:
        check_values(end_value=end_value)

    def value(step: Tensor) -> Tensor:
        passed = ((step - transition_begin) / transition_steps).clamp(min=0.0)
        if staircase:
            passed = torch.floor(passed)
        found = init_value * torch.pow(decay_rate, passed)
        if end_value is None:
            return found
        end = torch.ones_like(found) * end_value
        above, below = torch.maximum(found, end), torch.minimum(found, end)
        if isinstance(decay_rate, Tensor):
            return torch.where(decay_rate < 1, above, below)
        return above if decay_rate < 1 else below

    text = written(
        "exponential",
        init_value,
        transition_steps,
        decay_rate,
        transition_begin=(transition_begin, 0),
        staircase=(staircase, False),
        end_value=(end_value, None),
    )
    return ScheduleFn(value, text)
