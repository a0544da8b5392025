"""A value that stays as it is."""

from __future__ import annotations

import torch

from .checks import Value, check_values
from .schedule import ScheduleFn, written

__all__ = ["constant"]


def constant(value: Value) -> ScheduleFn:
    """The same value at every step (`optax.constant_schedule`).

    Args:
        value: a number >= 0 or a 0-d tensor.

    >>> import torch
    >>> from ftrain.optim.schedules import constant
    >>> constant(0.1)(torch.tensor(7))
    tensor(0.1000, dtype=torch.float64)
    """
    check_values(value=value)
    return ScheduleFn(lambda step: torch.ones_like(step) * value, written("constant", value))
