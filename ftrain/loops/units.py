"""One language for time: `every`, `at`, `until`, joined with `|` and `&`.

A cadence is asked with two clocks, the one at which it was asked before (None at the start) and the present one, and answers
whether it fires. It is a value without memory, so the same one serves many runs.

Laws
----
- `every(steps=n)` fires once for each multiple of n that is reached, however far apart the clocks are.
- `(a | b)` fires when either does, `(a & b)` when both do.
- Times count from the start of the run that is asked; `until` is about how much was done since then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ArgumentError, LimitError, explain

__all__ = ["Cadence", "Clock", "at", "every", "until"]


class Clock(NamedTuple):
    """How far a run is: steps, completed epochs, samples and seconds since it began.

    >>> from ftrain.loops.units import Clock
    >>> Clock(steps=3).epochs
    0
    """

    steps: int = 0
    epochs: int = 0
    samples: int = 0
    seconds: float = 0.0


class Cadence:
    """Base of `every`, `at`, `until` and what is joined of them.

    >>> import ftrain as ft
    >>> both = ft.every(steps=10) | ft.at(0)
    >>> both
    every(steps=10) | at(0)
    """

    def fires(self, before: Clock | None, now: Clock) -> bool:
        """Whether this is the moment; `before` is the clock at the last question, None at the start."""
        raise TypeError(f"{type(self).__name__} cannot tell when")

    def next_step(self, now: Clock) -> float:
        """The first step (counted like `now.steps`) at whose end it may fire, between epoch ends; inf for never."""
        return now.steps + 1

    def __or__(self, other: Cadence) -> Cadence:
        return _Join("|", self, other)

    def __and__(self, other: Cadence) -> Cadence:
        return _Join("&", self, other)


@dataclass(frozen=True)
class _Join(Cadence):
    sign: str
    a: Cadence
    b: Cadence

    def __post_init__(self) -> None:
        for side in (self.a, self.b):
            if not isinstance(side, Cadence):
                raise ArgumentError(
                    explain(f"cannot join a cadence and {side!r}.", expected="ft.every(...), ft.at(...), ft.until(...)")
                )

    def fires(self, before: Clock | None, now: Clock) -> bool:
        one, two = self.a.fires(before, now), self.b.fires(before, now)
        return (one or two) if self.sign == "|" else (one and two)

    def next_step(self, now: Clock) -> float:
        return min(self.a.next_step(now), self.b.next_step(now))

    def __repr__(self) -> str:
        return f"{self.a!r} {self.sign} {self.b!r}"


@dataclass(frozen=True)
class _Every(Cadence):
    unit: str
    n: float

    def fires(self, before: Clock | None, now: Clock) -> bool:
        if before is None:
            return False
        return bool(getattr(now, self.unit) // self.n > getattr(before, self.unit) // self.n)

    def next_step(self, now: Clock) -> float:
        return _next(self.unit, (math.floor(now.steps / self.n) + 1) * self.n, now)

    def __repr__(self) -> str:
        return f"every({self.unit}={self.n:g})"


@dataclass(frozen=True)
class _Until(Cadence):
    unit: str
    n: float

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return bool(getattr(now, self.unit) >= self.n)

    def next_step(self, now: Clock) -> float:
        return _next(self.unit, self.n, now)

    def __repr__(self) -> str:
        return f"until({self.unit}={self.n:g})"


@dataclass(frozen=True)
class _At(Cadence):
    step: int

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return (self.step == 0) if before is None else before.steps < self.step <= now.steps

    def next_step(self, now: Clock) -> float:
        return self.step if self.step > now.steps else math.inf

    def __repr__(self) -> str:
        return f"at({self.step})"


def _next(unit: str, step: float, now: Clock) -> float:
    if unit == "steps":
        return max(step, now.steps + 1)
    return math.inf if unit == "epochs" else now.steps + 1


def every(
    *, steps: int | None = None, epochs: int | None = None, samples: int | None = None, seconds: float | None = None
) -> Cadence:
    """Again and again: every so many steps, epochs, samples or seconds since the start of the run. Name exactly one.

    Raises:
        LimitError: none or several named, or a number that is not positive.

    >>> import ftrain as ft
    >>> from ftrain.loops.units import Clock
    >>> ft.every(steps=10).fires(Clock(steps=9), Clock(steps=10))
    True
    """
    return _Every(*_one("every", steps, epochs, samples, seconds))


def until(
    *, steps: int | None = None, epochs: int | None = None, samples: int | None = None, seconds: float | None = None
) -> Cadence:
    """From when so much was done: for `fit(..., until=ft.until(seconds=600) | ft.until(epochs=3))`. Name exactly one.

    Raises:
        LimitError: none or several named, or a number that is not positive.

    >>> import ftrain as ft
    >>> from ftrain.loops.units import Clock
    >>> ft.until(samples=100).fires(None, Clock(samples=128))
    True
    """
    return _Until(*_one("until", steps, epochs, samples, seconds))


def at(step: int) -> Cadence:
    """Once, at the end of this step of the run; `at(0)` is before the first.

    Raises:
        LimitError: a negative step.

    >>> import ftrain as ft
    >>> ft.at(0).fires(None, ft.loops.Clock())
    True
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise LimitError(explain(f"ft.at: {step!r} is not a step.", expected="an integer >= 0", fix="ft.at(0)"))
    return _At(step)


def _one(name: str, steps: object, epochs: object, samples: object, seconds: object) -> tuple[str, float]:
    units = {"steps": steps, "epochs": epochs, "samples": samples, "seconds": seconds}
    given = {unit: n for unit, n in units.items() if n is not None}
    if len(given) != 1:
        raise LimitError(
            explain(
                f"ft.{name} wants exactly one unit.",
                expected="steps=, epochs=, samples= or seconds=",
                got=", ".join(f"{u}={n!r}" for u, n in given.items()) or "none",
                fix=f"ft.{name}(steps=100) | ft.{name}(seconds=60)",
            )
        )
    unit, n = next(iter(given.items()))
    whole = unit != "seconds"
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
