"""Half a cosine from a value downwards, once or again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import Value, check_numbers, check_values, refuse
from .schedule import ScheduleFn, written

__all__ = ["cosine", "cosine_restarts"]


def cosine(init_value: Value, decay_steps: float, alpha: Value = 0.0, exponent: Value = 1.0) -> ScheduleFn:
    """Half a cosine from `init_value` down to `alpha * init_value` (`optax.cosine_decay_schedule`).

    Equation, with t the step, T = `decay_steps`, x = min(t / T, 1):
    `init_value ((1 - alpha) ((1 + cos(pi x)) / 2)^exponent + alpha)`.

    Args:
        init_value: the value at step 0.
        decay_steps: length of the decay, in steps.
        alpha: the last value, as a part of `init_value`.
        exponent: of the cosine.

    Raises:
        LimitError: a negative value, or no length.

    Source: Loshchilov & Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017 (one period).

    >>> import ftrain as ft
    >>> ft.schedules.cosine(1.0, 100, alpha=0.1)([0, 50, 100, 150])
    tensor([1.0000, 0.5500, 0.1000, 0.1000], dtype=torch.float64)
    """
    check_values(init_value=init_value, alpha=alpha, exponent=exponent)
    check_numbers(positive=True, decay_steps=decay_steps)

    def value(step: Tensor) -> Tensor:
        return _half(init_value, (step / decay_steps).clamp(0.0, 1.0), alpha, exponent)

    text = written("cosine", init_value, decay_steps, alpha=(alpha, 0.0), exponent=(exponent, 1.0))
    return ScheduleFn(value, text)


def cosine_restarts(init_value: Value, decay_steps: int, t_mult: int = 1, alpha: Value = 0.0) -> ScheduleFn:
    """`cosine` again and again, each period `t_mult` times as long as the one before it.

    Equation: in the period that begins at s and has length T, x = (t - s) / T and
    `init_value ((1 - alpha) (1 + cos(pi x)) / 2 + alpha)`; period n has T = `decay_steps * t_mult^n`.

    For periods with peaks or warm-ups of their own (`optax.sgdr_schedule`), `join` schedules of `warmup_cosine`.

    Args:
        init_value: the value at which each period begins.
        decay_steps: length of the first period, in steps.
        t_mult: by how much each period is longer than the one before it, an integer.
        alpha: the value at which each period ends, as a part of `init_value`.

    Raises:
        LimitError: a negative value, or `decay_steps` or `t_mult` is not a positive integer.

    Source: Loshchilov & Hutter, "SGDR: Stochastic gradient descent with warm restarts", ICLR 2017.

    >>> import ftrain as ft
    >>> ft.schedules.cosine_restarts(1.0, 10, t_mult=2)([0, 5, 10, 20, 30])
    tensor([1.0000, 0.5000, 1.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    check_values(init_value=init_value, alpha=alpha)
    check_numbers(positive=True, decay_steps=decay_steps, t_mult=t_mult)
    for name, count in (("decay_steps", decay_steps), ("t_mult", t_mult)):
        if count != int(count):
            raise refuse(
                f"{name}={count!r} is not whole.",
                expected="a positive integer",
                got=count,
                cause="periods begin at whole steps",
                fix=f"{name}={max(round(count), 1)}",
            )

    def begin(period: Tensor) -> Tensor:
        # Rounded, because pow may miss the whole number by a digit, and the period of a step would be the wrong one.
        return torch.round(decay_steps * (torch.pow(float(t_mult), period) - 1.0) / (t_mult - 1))

    def value(step: Tensor) -> Tensor:
        if t_mult == 1:
            return _half(init_value, torch.remainder(step, decay_steps) / decay_steps, alpha, 1.0)
        period = torch.floor(torch.log(step * (t_mult - 1) / decay_steps + 1.0) / math.log(t_mult)).clamp(min=0.0)
        # The logarithm is off by one at some first and last steps of a period.
        period = torch.where(step < begin(period), period - 1.0, period)
        period = torch.where(step >= begin(period + 1.0), period + 1.0, period)
        first = begin(period)
        return _half(init_value, (step - first) / (begin(period + 1.0) - first), alpha, 1.0)

    text = written("cosine_restarts", init_value, decay_steps, t_mult=(t_mult, 1), alpha=(alpha, 0.0))
    return ScheduleFn(value, text)


def _half(init_value: Value, part: Tensor, alpha: Value, exponent: Value) -> Tensor:
    """The value when a part in [0, 1] of the period is over."""
    wave = 0.5 * (1.0 + torch.cos(math.pi * part))
    return init_value * ((1.0 - alpha) * torch.pow(wave, exponent) + alpha)
