"""What the arguments of schedules must be: values, numbers of steps, boundaries, names of shapes."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, LimitError, explain
from ..transform import nonnegative

__all__ = ["Value", "boundaries_of", "check_numbers", "check_values", "one_of", "refuse"]

Value = float | Tensor  # a number >= 0 or a 0-d tensor


def refuse(
    what: str, *, expected: str | None = None, got: object = None, cause: str | None = None, fix: str | None = None
) -> LimitError:
    """The error about arguments that do not go together, ready to be raised."""
    shown = None if got is None else got if isinstance(got, str) else repr(got)
    return LimitError(explain(what, expected=expected, got=shown, cause=cause, fix=fix))


def check_values(**values: Any) -> None:
    """Raise unless each is a number >= 0 or a 0-d tensor.

    >>> from ftrain.optim.schedules.checks import check_values
    >>> check_values(peak=0.1)
    """
    nonnegative(**values)
    for name, value in values.items():
        if not isinstance(value, (int, float, Tensor)):
            raise ArgumentError(
                explain(
                    f"{name}={value!r} is not a value of a schedule.",
                    expected="a number >= 0 or a 0-d tensor",
                    got=type(value).__name__,
                    cause="schedules are put together by join, warmup and *, not as arguments of one another",
                    fix=f"{name}=0.001",
                )
            )


def check_numbers(*, positive: bool = False, **numbers: Any) -> None:
    """Raise unless each is a plain finite number: at least 0, or above 0 where it is a length that is divided by.

    >>> from ftrain.optim.schedules.checks import check_numbers
    >>> check_numbers(warmup_steps=0)
    """
    for name, number in numbers.items():
        expected = f"a number {'>' if positive else '>='} 0"
        usual = 1000 if "steps" in name else 1.0
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ArgumentError(
                explain(
                    f"{name}={number!r} is not a number.",
                    expected=expected,
                    got=type(number).__name__,
                    fix=f"{name}={usual!r}",
                )
            )
        if not math.isfinite(number) or number < 0 or (positive and number == 0):
            said = "is negative" if number < 0 else "is 0" if number == 0 else "is not finite"
            better = abs(number) if math.isfinite(number) and number != 0 else usual
            raise LimitError(
                explain(f"{name}={number!r} {said}.", expected=expected, got=repr(number), fix=f"{name}={better!r}")
            )


def boundaries_of(boundaries: Iterable[Any], what: str, fix: str) -> tuple[float, ...]:
    """The boundaries as a tuple; raises unless they are numbers of steps, each above the one before it.

    >>> from ftrain.optim.schedules.checks import boundaries_of
    >>> boundaries_of([10, 20], "join", "join(...)")
    (10, 20)
    """
    if isinstance(boundaries, (str, Tensor)) or not isinstance(boundaries, Iterable):
        raise ArgumentError(
            explain(f"{what}: boundaries are a sequence of steps.", got=type(boundaries).__name__, fix=fix)
        )
    found = tuple(boundaries)
    check_numbers(**{f"{what}: boundary[{i}]": one for i, one in enumerate(found)})
    for before, after in itertools.pairwise(found):
        if not after > before:
            raise refuse(
                f"{what}: the boundaries do not increase.",
                expected=f"a step above {before} after {before}",
                got=f"{after} in {list(found)}",
                fix=fix,
            )
    return found


def one_of(name: str, given: object, allowed: Sequence[str]) -> str:
    """`given`, if it is one of the names; else an error that suggests the nearest.

    >>> from ftrain.optim.schedules.checks import one_of
    >>> one_of("kind", "linear", ("linear", "cosine"))
    'linear'
    """
    if given in allowed:
        return str(given)
    near = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)
    raise refuse(
        f"{name}={given!r} is unknown.", expected=" or ".join(map(repr, allowed)), got=given, fix=f"{name}={near[0]!r}"
    )
