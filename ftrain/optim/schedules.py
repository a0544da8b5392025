"""Schedules: hyper-parameters as functions of the step tensor.

A schedule takes the count of updates made so far (int64 or floating, 0-d, on any device) and gives a 0-d float64 tensor. It is
pure, traces, and is never read on the host.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LimitError, explain
from .transform import nonnegative

__all__ = ["ScheduleFn", "constant", "warmup_cosine"]


@dataclass(frozen=True)
class ScheduleFn:
    """A schedule with a readable `repr`. `ScheduleFn(fn, text)` makes one of any function of a step tensor.

    >>> import torch
    >>> from ftrain.optim.schedules import ScheduleFn
    >>> ScheduleFn(lambda step: 0.1 / (1 + step), "decay")(torch.tensor(1.0))
    tensor(0.0500, dtype=torch.float64)
    """

    fn: Callable[[Tensor], Tensor]
    text: str = "schedule"
    is_schedule: bool = dataclasses.field(default=True, init=False, repr=False)

    def __call__(self, step: Tensor) -> Tensor:
        return self.fn(step.to(torch.float64)).to(torch.float64)

    def __repr__(self) -> str:
        return self.text


def constant(value: float) -> ScheduleFn:
    """The same value at every step.

    >>> import torch
    >>> from ftrain.optim.schedules import constant
    >>> constant(0.1)(torch.tensor(7))
    tensor(0.1000, dtype=torch.float64)
    """
    nonnegative(value=value)
    return ScheduleFn(lambda step: torch.full_like(step, value), f"constant({value!r})")


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, *, start: float = 0.0, end: float = 0.0
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
    nonnegative(peak=peak, warmup_steps=warmup_steps, start=start, end=end)
    nonnegative(total_steps=total_steps)
    if not total_steps > warmup_steps:
        raise LimitError(
            explain(
                "warmup_cosine: the decay has no length.",
                expected=f"total_steps > warmup_steps ({warmup_steps})",
                got=f"total_steps={total_steps}",
                fix=f"warmup_cosine({peak}, {warmup_steps}, {10 * max(warmup_steps, 1)})",
            )
        )

    def value(step: Tensor) -> Tensor:
        rise = start + (peak - start) * step / max(warmup_steps, 1)
        part = ((step - warmup_steps) / (total_steps - warmup_steps)).clamp(0.0, 1.0)
        fall = end + (peak - end) * 0.5 * (1.0 + torch.cos(math.pi * part))
        return torch.where(step < warmup_steps, rise, fall)

    return ScheduleFn(value, f"warmup_cosine({peak}, {warmup_steps}, {total_steps})")
