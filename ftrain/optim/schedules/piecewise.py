"""Values given at certain steps: held until the next one, or joined by lines or half cosines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, explain
from .checks import Value, boundaries_of, check_values, one_of
from .schedule import ScheduleFn, written
from .shapes import SHAPES

__all__ = ["interpolated", "piecewise_constant", "piecewise_interpolate"]


def piecewise_constant(init_value: Value, boundaries_and_scales: Mapping[float, Value] | None = None) -> ScheduleFn:
    """Multiply by a factor of its own at each boundary (`optax.piecewise_constant_schedule`).

    Equation, with t the step: `init_value` times the product of the scales whose boundary is <= t.

    For values of its own in each piece, `join` numbers: `join([0.1, 0.03], [1000])`.

    Args:
        init_value: the first value.
        boundaries_and_scales: `{step: factor}`.

    Raises:
        LimitError: a negative value, boundary or factor.

    >>> import ftrain as ft
    >>> ft.schedules.piecewise_constant(1.0, {100: 0.5, 200: 0.1})([0, 99, 100, 200])
    tensor([1.0000, 1.0000, 0.5000, 0.0500], dtype=torch.float64)
    """
    points = _points(init_value, boundaries_and_scales, "piecewise_constant")

    def value(step: Tensor) -> Tensor:
        out = torch.ones_like(step) * init_value
        for begin, held in points[1:]:
            out = torch.where(step < begin, out, held)
        return out

    return ScheduleFn(value, written("piecewise_constant", init_value, dict(boundaries_and_scales or {})))


def piecewise_interpolate(
    interpolate_type: str, init_value: Value, boundaries_and_scales: Mapping[float, Value] | None = None
) -> ScheduleFn:
    """Multiply by a factor up to each boundary, smoothly (`optax.piecewise_interpolate_schedule`).

    Equation: the values are those of `piecewise_constant` at its boundaries and `init_value` at step 0, and lie on straight lines
    or half cosines between them.

    Args:
        interpolate_type: `"linear"` or `"cosine"`.
        init_value: the value at step 0.
        boundaries_and_scales: `{step: factor}`.

    Raises:
        LimitError: an unknown type, or a negative value, boundary or factor.

    >>> import ftrain as ft
    >>> ft.schedules.piecewise_interpolate("linear", 1.0, {100: 0.5, 200: 0.1})([0, 50, 100, 200, 300])
    tensor([1.0000, 0.7500, 0.5000, 0.0500, 0.0500], dtype=torch.float64)
    """
    one_of("interpolate_type", interpolate_type, ("linear", "cosine"))
    points = _points(init_value, boundaries_and_scales, "piecewise_interpolate")
    text = written("piecewise_interpolate", interpolate_type, init_value, dict(boundaries_and_scales or {}))
    return ScheduleFn(interpolated(points, interpolate_type), text)


def interpolated(points: Sequence[tuple[float, Value]], kind: str) -> Callable[[Tensor], Tensor]:
    """The function through the points `(step, value)`, whose steps do not fall; the last value stays."""
    between, pieces = SHAPES[kind], list(itertools.pairwise(points))

    def value(step: Tensor) -> Tensor:
        out = torch.ones_like(step) * points[0][1]
        for (begin, a), (end, b) in pieces:
            piece = between(a, b, ((step - begin) / max(end - begin, 1)).clamp(0.0, 1.0))
            # Two points at one step are a jump: nothing lies between them.
            out = torch.where(step < begin, out, torch.where(step < end, piece, b))
        return out

    return value


def _points(
    init_value: Value, boundaries_and_scales: Mapping[float, Value] | None, what: str
) -> list[tuple[float, Value]]:
    """The value reached at step 0 and at each boundary."""
    check_values(init_value=init_value)
    fix = f"{what}(..., {{1000: 0.1, 2000: 0.1}})"
    scales = {} if boundaries_and_scales is None else boundaries_and_scales
    if not isinstance(scales, Mapping):
        raise ArgumentError(
            explain(
                f"{what}: boundaries and factors are a dict.",
                expected="{step: factor}",
                got=type(scales).__name__,
                fix=fix,
            )
        )
    points: list[tuple[float, Value]] = [(0, init_value)]
    for boundary in boundaries_of(sorted(scales), what, fix):
        factors: dict[str, Any] = {f"{what}: factor[{boundary}]": scales[boundary]}
        check_values(**factors)
        points.append((boundary, points[-1][1] * scales[boundary]))
    return points
