"""Schedules one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, explain
from .checks import boundaries_of, refuse
from .schedule import ScheduleFn, as_schedule

__all__ = ["join"]

FIX = "ft.schedules.join([ft.schedules.linear(0.0, 0.1, 100), ft.schedules.cosine(0.1, 900)], [100])"


def join(schedules: Sequence[Any], boundaries: Sequence[float]) -> ScheduleFn:
    """One schedule after the other; each counts its steps from its own beginning (`optax.join_schedules`).

    Equation, with t the step and 0 = b_0 < b_1 < ...: `schedules[i](t - b_i)` for b_i <= t < b_(i+1).

    Args:
        schedules: schedules, functions of the step tensor, or numbers for values that stay.
        boundaries: the steps at which the next one begins, each above the one before it: one fewer than schedules.

    Raises:
        LimitError: the numbers of schedules and boundaries do not fit, or the boundaries do not increase.

    >>> import ftrain as ft
    >>> ft.schedules.join([0.5, ft.schedules.linear(1.0, 0.0, 10)], [100])([0, 99, 100, 105, 110])
    tensor([0.5000, 0.5000, 1.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if isinstance(schedules, str) or not isinstance(schedules, Sequence):
        raise ArgumentError(
            explain("join wants a list of schedules.", expected="a list", got=type(schedules).__name__, fix=FIX)
        )
    found = [as_schedule(one, "join") for one in schedules]
    begins = boundaries_of(boundaries, "join", FIX)
    if len(found) != len(begins) + 1:
        raise refuse(
            "join: schedules and boundaries do not fit.",
            expected=f"{len(found) - 1} boundaries for {len(found)} schedules" if found else "at least one schedule",
            got=f"{len(begins)} boundaries, {len(found)} schedules",
            fix=FIX,
        )

    def value(step: Tensor) -> Tensor:
        out = found[0](step)
        for begin, schedule in zip(begins, found[1:], strict=True):
            # No schedule sees a negative step: what it gave there could be inf, and its derivative in a `where` is nan.
            out = torch.where(step < begin, out, schedule((step - begin).clamp(min=0.0)))
        return out

    return ScheduleFn(value, f"join({found!r}, {list(begins)!r})")
