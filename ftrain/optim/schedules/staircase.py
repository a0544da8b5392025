"""A value that is multiplied by a factor at certain steps: every so many, or at a list of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .checks import Value, boundaries_of, check_numbers, check_values
from .schedule import ScheduleFn, written

__all__ = ["multi_step", "step"]


def step(init_value: Value, step_size: float, gamma: Value = 0.1) -> ScheduleFn:
    """Multiply by `gamma` every `step_size` steps (`torch.optim.lr_scheduler.StepLR`).

    Equation, with t the step: `init_value gamma^floor(t / step_size)`.

    Args:
        init_value: the first value.
        step_size: how many steps a value lasts.
        gamma: the factor.

    Raises:
        LimitError: a negative value, or no length.

    >>> import ftrain as ft
    >>> ft.schedules.step(1.0, 10)([0, 9, 10, 20])
    tensor([1.0000, 1.0000, 0.1000, 0.0100], dtype=torch.float64)
    """
    check_values(init_value=init_value, gamma=gamma)
    check_numbers(positive=True, step_size=step_size)

    def value(at: Tensor) -> Tensor:
        return init_value * torch.pow(gamma, torch.floor(at / step_size))

    return ScheduleFn(value, written("step", init_value, step_size, gamma=(gamma, 0.1)))


def multi_step(init_value: Value, milestones: Iterable[float], gamma: Value = 0.1) -> ScheduleFn:
    """Multiply by `gamma` at each milestone (`torch.optim.lr_scheduler.MultiStepLR`).

    Equation, with t the step: `init_value gamma^(number of milestones <= t)`.

    Args:
        init_value: the first value.
        milestones: steps, each above the one before it.
        gamma: the factor.

    Raises:
        LimitError: a negative value, or milestones that do not increase.

    >>> import ftrain as ft
    >>> ft.schedules.multi_step(1.0, [10, 15])([0, 10, 14, 15, 100])
    tensor([1.0000, 0.1000, 0.1000, 0.0100, 0.0100], dtype=torch.float64)
    """
    check_values(init_value=init_value, gamma=gamma)
    passed = boundaries_of(milestones, "multi_step", "multi_step(0.1, [1000, 2000])")

    def value(at: Tensor) -> Tensor:
        count = torch.zeros_like(at)
        for milestone in passed:
            count = count + (at >= milestone)
        return init_value * torch.pow(gamma, count)

    return ScheduleFn(value, written("multi_step", init_value, list(passed), gamma=(gamma, 0.1)))
