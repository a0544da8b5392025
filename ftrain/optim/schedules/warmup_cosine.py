"""A linear rise, then half a cosine: the schedule of most language models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, refuse
from .schedule import ScheduleFn, shown, written

__all__ = ["warmup_cosine"]


def warmup_cosine(
    peak: Value, warmup_steps: float, total_steps: float, *, start: Value = 0.0, end: Value = 0.0
) -> ScheduleFn:
    """Linear from `start` to `peak` over `warmup_steps`, then a half cosine down to `end` at `total_steps`, then `end`.

    Equation, with t the step, w = `warmup_steps`, T = `total_steps`:
    `start + (peak - start) t / w` for t < w; `end + (peak - end) (1 + cos(pi (t - w) / (T - w))) / 2` for w <= t <= T.

    Args:
        peak: the highest value.
        warmup_steps: length of the rise, in steps; 0 starts at the peak.
        total_steps: the step at which `end` is reached.
        start: value at step 0.
        end: value from `total_steps` on.

    Raises:
        LimitError: a negative value, or `total_steps` not above `warmup_steps`.

    Source: Loshchilov & Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017 (one period).

    >>> import torch
    >>> from ftrain.optim.schedules import warmup_cosine
    >>> lr = warmup_cosine(1.0, 10, 110)
    >>> [round(float(lr(torch.tensor(t))), 3) for t in (0, 5, 10, 60, 110, 500)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    check_values(peak=peak, start=start, end=end)
    check_numbers(warmup_steps=warmup_steps, total_steps=total_steps)
    if not total_steps > warmup_steps:
        raise refuse(
            "warmup_cosine: the decay has no length.",
            expected=f"total_steps > warmup_steps ({warmup_steps})",
            got=f"total_steps={total_steps}",
            fix=f"warmup_cosine({shown(peak)}, {warmup_steps}, {10 * max(warmup_steps, 1)})",
        )

    def value(step: Tensor) -> Tensor:
        rise = start + (peak - start) * step / max(warmup_steps, 1)
        part = ((step - warmup_steps) / (total_steps - warmup_steps)).clamp(0.0, 1.0)
        fall = end + (peak - end) * 0.5 * (1.0 + torch.cos(math.pi * part))
        return torch.where(step < warmup_steps, rise, fall)

    text = written("warmup_cosine", peak, warmup_steps, total_steps, start=(start, 0.0), end=(end, 0.0))
    return ScheduleFn(value, text)
