"""A warm-up in front of any schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, one_of, refuse
from .schedule import ScheduleFn, as_schedule, shown
from .shapes import SHAPES

__all__ = ["warmup"]

KINDS = ("linear", "cosine", "exponential", "constant")


def warmup(schedule: Any, steps: float, start: Value = 0.0, kind: str = "linear") -> ScheduleFn:
    """Rise from `start` to the first value of a schedule over `steps` steps, then follow the schedule from its beginning.

    Equation, with t the step, w = `steps`, p = `schedule(0)`, x = t / w: `schedule(t - w)` for t >= w, and before that
    `start + (p - start) x` (linear), `p + (start - p) (1 + cos(pi x)) / 2` (cosine), `start (p / start)^x` (exponential) or
    `start` (constant).

    Args:
        schedule: a schedule, a function of the step tensor, or a number for a value that stays.
        steps: length of the warm-up; 0 gives the schedule itself.
        start: value at step 0; above 0 if `kind` is exponential.
        kind: `"linear"`, `"cosine"`, `"exponential"` or `"constant"`.

    Raises:
        LimitError: a negative value, an unknown kind, or an exponential rise from 0.

    >>> import ftrain as ft
    >>> lr = ft.schedules.warmup(ft.schedules.step(1.0, 20), 10)
    >>> lr([0, 5, 10, 29, 30])
    tensor([0.0000, 0.5000, 1.0000, 1.0000, 0.1000], dtype=torch.float64)
    >>> lr
    warmup(step(1.0, 20), 10)
    """
    after = as_schedule(schedule, "warmup")
    check_numbers(steps=steps)
    check_values(start=start)
    between = SHAPES[one_of("kind", kind, KINDS)]
    if kind == "exponential" and not isinstance(start, Tensor) and start == 0:
        raise refuse(
            "warmup: an exponential rise cannot begin at 0.",
            expected="start > 0",
            got=start,
            fix=f"ft.schedules.warmup({after!r}, {steps}, start=1e-6, kind='exponential')",
        )

    def value(step: Tensor) -> Tensor:
        rise = between(start, after(torch.zeros_like(step)), (step / max(steps, 1)).clamp(max=1.0))
        return torch.where(step < steps, rise, after((step - steps).clamp(min=0.0)))

    options = f", start={shown(start)}" if isinstance(start, Tensor) or start != 0 else ""
    options += f", kind={kind!r}" if kind != "linear" else ""
    return ScheduleFn(value, f"warmup({after!r}, {steps!r}{options})")
