"""`ScheduleFn`: a schedule with a readable form, products, and a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ArgumentError, explain
from .checks import check_values
from .drawing import draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ScheduleFn", "as_schedule", "written"]


@dataclass(frozen=True)
class ScheduleFn:
    """A schedule with a readable `repr`. `ScheduleFn(fn, text)` makes one of any function of a step tensor.

    `fn` gets the steps in float64 and gives their values in the same shape, or one value for all of them. Two schedules, or a
    schedule and a number or 0-d tensor, are multiplied by `*`.

    >>> import torch, ftrain as ft
    >>> decay = ft.schedules.ScheduleFn(lambda step: 0.1 / (1 + step), "decay")
    >>> decay(torch.tensor(1.0))
    tensor(0.0500, dtype=torch.float64)
    >>> 0.5 * decay * ft.schedules.step(1.0, 10)
    0.5 * decay * step(1.0, 10)
    >>> (0.5 * decay)([0, 1])
    tensor([0.0500, 0.0250], dtype=torch.float64)
    """

    fn: Callable[[Tensor], Tensor]
    text: str = "schedule"
    is_schedule: bool = dataclasses.field(default=True, init=False, repr=False)

    def __call__(self, step: Tensor | float | Sequence[float], /) -> Tensor:
        at = step if isinstance(step, Tensor) else torch.as_tensor(step, dtype=torch.float64)
        value = self.fn(at.to(torch.float64))
        if not isinstance(value, Tensor) or (value.shape != at.shape and value.ndim != 0):
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(
                explain(
                    f"the schedule {self.text!r} did not give a value for each step.",
                    expected=f"a tensor of shape {tuple(at.shape)}",
                    got=got,
                    fix="ScheduleFn(lambda step: torch.full_like(step, 0.1))",
                )
            )
        value = value.to(torch.float64)
        return value if value.shape == at.shape else value.expand(at.shape)

    def __repr__(self) -> str:
        return self.text

    def __mul__(self, other: Any) -> ScheduleFn:
        return _product(self, other)

    def __rmul__(self, other: Any) -> ScheduleFn:
        return _product(other, self)

    def plot(
        self, steps: int, path: str | Path | None = None, *, log: bool = False, name: str = "learning rate"
    ) -> Figure:
        """Draw the values at the steps 0, 1, ..., `steps`, with matplotlib.

        Args:
            steps: the last step that is drawn.
            path: also save the figure there, in the format of the suffix; missing directories are made.
            log: logarithmic values; what is not positive leaves a gap.
            name: the label of the values.

        Returns:
            The figure. It displays itself in Jupyter; elsewhere use `path`, or `figure.savefig`.

        Raises:
            LimitError: `steps` is not a positive integer.
            ImportError: matplotlib is not installed.

        >>> figure = ft.schedules.warmup_cosine(3e-4, 100, 2000).plot(2000)
        >>> figure.axes[0].get_title()
        'warmup_cosine(0.0003, 100, 2000)'
        """
        return draw(self, steps, path, log=log, name=name, title=self.text)


def as_schedule(value: Any, what: str) -> ScheduleFn:
    """A schedule of a schedule, of a function of the step, or of a value that stays as it is.

    >>> from ftrain.optim.schedules.schedule import as_schedule
    >>> as_schedule(0.1, "join")
    0.1
    """
    if isinstance(value, ScheduleFn):
        return value
    if callable(value):
        return ScheduleFn(value, getattr(value, "__name__", type(value).__name__))
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise ArgumentError(
            explain(
                f"{what} wants schedules.",
                expected="a schedule, a function of the step tensor, a number or a 0-d tensor",
                got=type(value).__name__,
                fix=f"{what} of ft.schedules.constant(0.1), say",
            )
        )
    check_values(value=value)
    return ScheduleFn(lambda step: torch.ones_like(step) * value, shown(value))


def _product(a: Any, b: Any) -> ScheduleFn:
    if not all(isinstance(one, (int, float, Tensor)) or callable(one) for one in (a, b)):
        return NotImplemented  # type: ignore[no-any-return]  # Python then says which operands do not go together
    one, two = as_schedule(a, "a product"), as_schedule(b, "a product")
    return ScheduleFn(lambda step: one(step) * two(step), f"{one!r} * {two!r}")


def shown(value: Any) -> str:
    """An argument as it is written; the value of a tensor is not read."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {shown(one)}' for key, one in value.items())}}}"
    return "tensor" if isinstance(value, Tensor) else repr(value)


def written(name: str, *args: Any, **kwargs: tuple[Any, Any]) -> str:
    """A call as it is written; keywords come as `(value, default)` and are left out at their default.

    >>> from ftrain.optim.schedules.schedule import written
    >>> written("linear", 1.0, 0.0, 100, transition_begin=(5, 0))
    'linear(1.0, 0.0, 100, transition_begin=5)'
    """
    parts = [shown(one) for one in args]
    for key, (value, default) in kwargs.items():
        if isinstance(value, Tensor) or value != default:
            parts.append(f"{key}={shown(value)}")
    return f"{name}({', '.join(parts)})"
