"""Up and down between two values, again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, one_of, refuse
from .schedule import ScheduleFn, written

__all__ = ["cyclic"]


def cyclic(
    base_lr: Value,
    max_lr: Value,
    step_size_up: float = 2000,
    step_size_down: float | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> ScheduleFn:
    """Linear up and down between two values (`torch.optim.lr_scheduler.CyclicLR`).

    Equation, with t the step, n the number of cycles completed, u in [0, 1] the height of the triangle at t:
    `base_lr + (max_lr - base_lr) u h` with h = 1 (triangular), 1 / 2^n (triangular2) or gamma^t (exp_range).

    Args:
        base_lr: the lower value.
        max_lr: the upper value.
        step_size_up: length of the rise, in steps.
        step_size_down: length of the fall; default: that of the rise.
        mode: `"triangular"`, `"triangular2"` or `"exp_range"`.
        gamma: of `"exp_range"`.

    Raises:
        LimitError: a negative value, no length, an unknown mode, or `gamma` without its mode.

    Source: Smith, "Cyclical learning rates for training neural networks", WACV 2017.

    >>> import ftrain as ft
    >>> ft.schedules.cyclic(0.0, 1.0, 10, mode="triangular2")([0, 5, 10, 20, 30])
    tensor([0.0000, 0.5000, 1.0000, 0.0000, 0.5000], dtype=torch.float64)
    """
    check_values(base_lr=base_lr, max_lr=max_lr, gamma=gamma)
    down = step_size_up if step_size_down is None else step_size_down
    check_numbers(positive=True, step_size_up=step_size_up, step_size_down=down)
    one_of("mode", mode, ("triangular", "triangular2", "exp_range"))
    if mode != "exp_range" and gamma != 1.0:
        raise refuse(
            f"cyclic: mode={mode!r} has no gamma.",
            got=f"gamma={gamma!r}",
            fix='cyclic(..., mode="exp_range", gamma=0.999)',
        )
    length = step_size_up + down

    def value(step: Tensor) -> Tensor:
        cycle = torch.floor(step / length)
        within = step - cycle * length
        height = torch.where(within <= step_size_up, within / step_size_up, (length - within) / down)
        if mode == "triangular2":
            height = height * torch.pow(0.5, cycle)
        elif mode == "exp_range":
            height = height * torch.pow(gamma, step)
        return base_lr + (max_lr - base_lr) * height

    text = written(
        "cyclic",
        base_lr,
        max_lr,
        step_size_up,
        step_size_down=(step_size_down, None),
        mode=(mode, "triangular"),
        gamma=(gamma, 1.0),
    )
    return ScheduleFn(value, text)
