"""Checks of arguments that many combinators have."""

from __future__ import annotations

import difflib
from typing import Any, get_args

import numpy as np

from ..errors import ArgumentError, DataError, FtrainError, explain

__all__ = ["amount", "integer", "one_of"]


def integer(
    value: object,
    what: str,
    name: str,
    *,
    least: int | None = None,
    most: int | None = None,
    kind: type[FtrainError] = DataError,
    fix: str | None = None,
) -> None:
    """Raise unless a value is an integer between two bounds, both included; `kind` for one that is outside of them.

    >>> from ftrain.data.checks import integer
    >>> integer(0, "f", "n", least=1)
    Traceback (most recent call last):
    ftrain.errors.DataError: f: n=0 makes no sense.
      expected: an integer >= 1
      got:      0
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if whole and (least is None or value >= least) and (most is None or value <= most):  # type: ignore[operator]
        return
    bounds = "" if least is None else (f" >= {least}" if most is None else f" from {least} to {most}")
    raise (kind if whole else ArgumentError)(
        explain(f"{what}: {name}={value!r} makes no sense.", expected=f"an integer{bounds}", got=repr(value), fix=fix)
    )


def amount(value: object, what: str) -> None:
    """Raise unless a value is a number of items, or a fraction of them."""
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return
    raise DataError(
        explain(
            f"{what}: {value!r} is neither a number of items nor a fraction of them.",
            expected="an integer >= 0, or a float from 0 to 1",
            got=repr(value),
            fix=f"{what.replace('Source', 'source')}(100)   # or (0.1), a tenth",
        )
    )


def one_of(value: object, choices: Any, what: str, name: str, *, kind: type[FtrainError] = DataError) -> None:
    """Raise unless a value is one of those of a Literal; the error shows the nearest one.

    >>> from typing import Literal
    >>> from ftrain.data.checks import one_of
    >>> one_of("exp", Literal["exponential", "linear"], "f", "mode")
    Traceback (most recent call last):
    ftrain.errors.DataError: f: there is no mode='exp'.
      expected: 'exponential', 'linear'
      got:      'exp'
      fix:      f(..., mode='exponential')
    """
    known = get_args(choices)
    if value not in known:
        texts = [one for one in known if isinstance(one, str)]
        near = difflib.get_close_matches(value, texts, n=1, cutoff=0.0) if isinstance(value, str) else None
        raise kind(
            explain(
                f"{what}: there is no {name}={value!r}.",
                expected=", ".join(map(repr, known)),
                got=repr(value),
                fix=f"{what}(..., {name}={(near or known)[0]!r})",
            )
        )
