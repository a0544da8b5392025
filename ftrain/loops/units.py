"""One language for time: `every`, `at`, `until`, `after`, joined with `|`, `&` and `~`.

Laws
----
- `every(steps=n)` fires once for each multiple of n that is reached, however far apart the clocks are.
- Times count from the start of the run that is asked; `until` and `after` are about how much was done since then.
"""

from __future__ import annotations

import math

from ..errors import LimitError, explain
from .cadences import At, Cadence, Every, From

__all__ = ["after", "at", "every", "until"]

UNITS = ("steps", "epochs", "samples", "tokens", "seconds", "fraction")


def every(
    *,
    steps: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    fraction: float | None = None,
) -> Cadence:
    """Again and again: every so many steps, epochs, samples, tokens or seconds since the start of the run. Name exactly one.

    Args:
        steps: at the end of each step whose number is a multiple.
        epochs: at the end of epochs.
        samples: when so many more samples were seen.
        tokens: when so many more tokens were; counted by `fit(tokens=...)`.
        seconds: when so much more time went by, at the end of a step.
        fraction: a part of an epoch, in (0, 1], as `0.25`; for data whose length is known. Where it falls together with the
            end of an epoch, it is then.

    Raises:
        LimitError: none or several named, or a number that is not positive.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import Clock
    >>> ft.every(steps=10).fires(Clock(steps=9), Clock(steps=10))
    True
    """
    unit, n = _one("every", steps, epochs, samples, tokens, seconds, fraction)
    if unit == "fraction" and n > 1:
        raise LimitError(
            explain(
                f"ft.every(fraction={n!r}) makes no sense.",
                expected="a part of an epoch: a number in (0, 1]",
                got=repr(n),
                fix="ft.every(fraction=0.5)",
            )
        )
    return Every("every", unit, n)


def until(
    *,
    steps: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    fraction: float | None = None,
) -> Cadence:
    """From when so much was done: for `fit(..., until=ft.until(seconds=600) | ft.until(epochs=3))`. Name exactly one.

    Raises:
        LimitError: none or several named, or a number that is not positive.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import Clock
    >>> ft.until(samples=100).fires(None, Clock(samples=128))
    True
    """
    return From("until", *_one("until", steps, epochs, samples, tokens, seconds, fraction))


def after(
    *,
    steps: int | None = None,
    epochs: int | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    fraction: float | None = None,
) -> Cadence:
    """From when so much was done on: a condition, for `ft.every(steps=10) & ft.after(epochs=1)`. Name exactly one.

    `until` under the name that reads well in a condition; `~ft.after(...)` is before.

    Raises:
        LimitError: none or several named, or a number that is not positive.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import Clock
    >>> late = ft.every(steps=10) & ft.after(steps=100)
    >>> late.fires(Clock(steps=89), Clock(steps=90)), late.fires(Clock(steps=109), Clock(steps=110))
    (False, True)
    """
    return From("after", *_one("after", steps, epochs, samples, tokens, seconds, fraction))


def at(
    step: int | None = None,
    *,
    epochs: int | None = None,
    samples: int | None = None,
    tokens: int | None = None,
    seconds: float | None = None,
    fraction: float | None = None,
) -> Cadence:
    """Once: at the end of this step of the run, or when so much was done. `at(0)` is before the first step.

    Raises:
        LimitError: a negative step, none or several named, or another number that is not positive.

    >>> import ftrain as ft
    >>> ft.at(0).fires(None, ft.loops.Clock())
    True
    """
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise LimitError(explain(f"ft.at: {step!r} is not a step.", expected="an integer >= 0", fix="ft.at(0)"))
    if step == 0 and (epochs, samples, tokens, seconds, fraction) == (None,) * 5:
        return At("at", "steps", 0)
    return At("at", *_one("at", step, epochs, samples, tokens, seconds, fraction))


def _one(name: str, *numbers: object) -> tuple[str, float]:
    given = {unit: n for unit, n in zip(UNITS, numbers, strict=True) if n is not None}
    if len(given) != 1:
        raise LimitError(
            explain(
                f"ft.{name} wants exactly one unit.",
                expected="steps=, epochs=, samples=, tokens=, seconds= or fraction=",
                got=", ".join(f"{u}={n!r}" for u, n in given.items()) or "none",
                fix=f"ft.{name}({'100' if name == 'at' else 'steps=100'}) | ft.{name}(seconds=60)",
            )
        )
    unit, n = next(iter(given.items()))
    whole = unit not in ("seconds", "fraction")
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not 0 < n < math.inf or (whole and n != int(n)):
        raise LimitError(
            explain(
                f"ft.{name}({unit}={n!r}) makes no sense.",
                expected=f"a positive {'integer' if whole else 'number'}",
                got=repr(n),
                fix=f"ft.{name}({unit}=1)",
            )
        )
    return unit, n
