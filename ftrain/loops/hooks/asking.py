"""What the ready hooks have in common: how their arguments are looked at."""

from __future__ import annotations

import math
from typing import Any

from ...errors import LimitError, explain
from ..cadences import Cadence
from ..units import every

__all__ = ["cadence", "positive"]


def cadence(given: Any, who: str, *, steps: int = 50, argument: str = "every") -> Cadence:
    """The cadence that was given, or the one that `fit` records with.

    Raises:
        LimitError: it is no cadence.

    >>> from ftrain.loops.hooks.asking import cadence
    >>> cadence(None, "ft.hooks.timer")
    every(steps=50)
    """
    if given is None:
        return every(steps=steps)
    if not isinstance(given, Cadence):
        raise LimitError(
            explain(
                f"{who}: {argument}= is no cadence.",
                expected="ft.every(...), ft.at(...)",
                got=repr(given),
                fix=f"{argument}=ft.every(steps={steps})",
            )
        )
    return given


def positive(who: str, example: float, **numbers: Any) -> None:
    """Raise unless each of these is None or a positive number.

    >>> from ftrain.loops.hooks.asking import positive
    >>> positive("ft.hooks.throughput", 1e12, flops_per_step=-1.0)
    Traceback (most recent call last):
    ftrain.errors.LimitError: ft.hooks.throughput: flops_per_step=-1.0 makes no sense.
      expected: a positive number
      got:      -1.0
      fix:      flops_per_step=1e+12
    """
    for key, number in numbers.items():
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < math.inf:
            raise LimitError(
                explain(
                    f"{who}: {key}={number!r} makes no sense.",
                    expected="a positive number",
                    got=repr(number),
                    fix=f"{key}={example:g}",
                )
            )
