"""From one value to another along a power of the time that is left; linear is the first power."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values
from .schedule import ScheduleFn, written

__all__ = ["linear", "polynomial"]


def polynomial(
    init_value: Value, end_value: Value, power: Value, transition_steps: float, transition_begin: float = 0
) -> ScheduleFn:
    """From `init_value` to `end_value` along a power of the time that is left (`optax.polynomial_schedule`).

    Equation, with t the step, B = `transition_begin`, T = `transition_steps`, x = (t - B) / T held within [0, 1]:
    `(init_value - end_value) (1 - x)^power + end_value`.

    Args:
        init_value: the value up to `transition_begin`.
        end_value: the value from `transition_begin + transition_steps` on.
        power: the exponent; 1 is linear.
        transition_steps: length of the transition, in steps.
        transition_begin: the step at which it begins.

    Raises:
        LimitError: a negative value, or no length.

    >>> import ftrain as ft
    >>> ft.schedules.polynomial(1.0, 0.0, 2, 100)([0, 50, 100, 150])
    tensor([1.0000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_values(init_value=init_value, end_value=end_value, power=power)
    _check_times(transition_steps, transition_begin)

    def value(step: Tensor) -> Tensor:
        left = 1.0 - ((step - transition_begin) / transition_steps).clamp(0.0, 1.0)
        return (init_value - end_value) * torch.pow(left, power) + end_value

    begin = (transition_begin, 0)
    text = written("polynomial", init_value, end_value, power, transition_steps, transition_begin=begin)
    return ScheduleFn(value, text)


def linear(init_value: Value, end_value: Value, transition_steps: float, transition_begin: float = 0) -> ScheduleFn:
    """From `init_value` to `end_value` in a straight line (`optax.linear_schedule`).

    Equation, with t the step, B = `transition_begin`, T = `transition_steps`, x = (t - B) / T held within [0, 1]:
    `(init_value - end_value) (1 - x) + end_value`.

    Args:
        init_value: the value up to `transition_begin`.
        end_value: the value from `transition_begin + transition_steps` on.
        transition_steps: length of the transition, in steps.
        transition_begin: the step at which it begins.

    Raises:
        LimitError: a negative value, or no length.

    >>> import ftrain as ft
    >>> ft.schedules.linear(1.0, 0.0, 100)([0, 25, 100, 150])
    tensor([1.0000, 0.7500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_values(init_value=init_value, end_value=end_value)
    _check_times(transition_steps, transition_begin)

    def value(step: Tensor) -> Tensor:
        left = 1.0 - ((step - transition_begin) / transition_steps).clamp(0.0, 1.0)
        return (init_value - end_value) * left + end_value

    text = written("linear", init_value, end_value, transition_steps, transition_begin=(transition_begin, 0))
    return ScheduleFn(value, text)


def _check_times(transition_steps: float, transition_begin: float) -> None:
    check_numbers(positive=True, transition_steps=transition_steps)
    check_numbers(transition_begin=transition_begin)
