"""One language for time: `every`, `at`, `until`, `after`, joined with `|`, `&` and `~`.

A cadence is asked with two clocks, the one at which it was asked before (None at the start) and the present one, and answers
whether it fires. It is a value without memory, so the same one serves many runs.

Laws
----
- `every(steps=n)` fires once for each multiple of n that is reached, however far apart the clocks are.
- `(a | b)` fires when either does, `(a & b)` when both do, `~a` when `a` does not.
- Times count from the start of the run that is asked; `until` and `after` are about how much was done since then.
- Between two questions a cadence does not fire before one of its `moments`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from ..errors import ArgumentError, LimitError, explain

__all__ = ["Cadence", "Clock", "Moment", "after", "at", "bounds", "every", "until"]

UNITS = ("steps", "epochs", "samples", "tokens", "seconds", "fraction")


class Clock(NamedTuple):
    """How far a run is: what was done since it began, and how many batches of the present epoch.

    >>> from ftrain.loops.units import Clock
    >>> Clock(steps=3).epochs
    0
    """

    steps: int = 0
    epochs: int = 0
    samples: int = 0
    seconds: float = 0.0
    tokens: int = 0
    batch: int = 0


class Moment(NamedTuple):
    """No sooner than at this step (counted like `Clock.steps`, at its end) and at this second: bounds, both inclusive.

    >>> from ftrain.loops.units import Moment
    >>> Moment(10).second
    0.0
    """

    step: float
    second: float = 0.0


class Cadence:
    """Base of `every`, `at`, `until`, `after` and what is joined of them.

    >>> import ftrain as ft
    >>> both = ft.every(steps=10) & ~ft.after(epochs=1) | ft.at(0)
    >>> both
    every(steps=10) & ~after(epochs=1) | at(0)
    """

    def fires(self, before: Clock | None, now: Clock) -> bool:
        """Whether this is the moment; `before` is the clock at the last question, None at the start."""
        raise TypeError(f"{type(self).__name__} cannot tell when")

    def moments(self, now: Clock) -> list[Moment]:
        """When it may fire next, between epoch ends: at the first of these. Empty: not before the end of the epoch."""
        return [Moment(now.steps + 1)]

    def pulses(self) -> bool:
        """Whether it fires at single moments, so that the answer depends on when it was asked before."""
        return False

    def bound(self, length: int | None, tokens: bool, what: str) -> Cadence:
        """For data with epochs of `length` batches (None: not known), whose tokens are counted or not.

        Raises:
            LimitError: it asks for a fraction of an epoch whose length is not known, or for tokens that nobody counts.
        """
        return self

    def amounts(self) -> Iterator[tuple[str, float]]:
        """The limits that it holds, as units and numbers, where all of them have to be reached: of `until` and `after`, by `&`."""
        return iter(())

    def alternatives(self) -> list[Cadence]:
        """The two sides of an `|`, any of which suffices; else itself."""
        return [self]

    def __or__(self, other: Cadence) -> Cadence:
        return _Join("|", self, other)

    def __and__(self, other: Cadence) -> Cadence:
        return _Join("&", self, other)

    def __invert__(self) -> Cadence:
        return _Not(self)


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

    def moments(self, now: Clock) -> list[Moment]:
        one, two = self.a.moments(now), self.b.moments(now)
        if self.sign == "|" or (self.a.pulses() and self.b.pulses()):
            return one + two
        # What fires at one moment compares two clocks, so it has to be asked at each, whether or not the other side holds then.
        if self.a.pulses() or self.b.pulses():
            return one if self.a.pulses() else two
        return [Moment(max(x.step, y.step), max(x.second, y.second)) for x in one for y in two]

    def pulses(self) -> bool:
        return self.a.pulses() or self.b.pulses()

    def bound(self, length: int | None, tokens: bool, what: str) -> Cadence:
        return _Join(self.sign, self.a.bound(length, tokens, what), self.b.bound(length, tokens, what))

    def amounts(self) -> Iterator[tuple[str, float]]:
        if self.sign == "&":
            yield from self.a.amounts()
            yield from self.b.amounts()

    def alternatives(self) -> list[Cadence]:
        return [self.a, self.b] if self.sign == "|" else [self]

    def __repr__(self) -> str:
        return f"{self._side(self.a)} {self.sign} {self._side(self.b)}"

    def _side(self, side: Cadence) -> str:
        return f"({side!r})" if self.sign == "&" and isinstance(side, _Join) and side.sign == "|" else repr(side)


@dataclass(frozen=True)
class _Not(Cadence):
    inner: Cadence

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return not self.inner.fires(before, now)

    def pulses(self) -> bool:
        return self.inner.pulses()

    def bound(self, length: int | None, tokens: bool, what: str) -> Cadence:
        return _Not(self.inner.bound(length, tokens, what))

    def __repr__(self) -> str:
        return f"~({self.inner!r})" if isinstance(self.inner, _Join) else f"~{self.inner!r}"


@dataclass(frozen=True)
class _Timed(Cadence):
    """A number of one unit."""

    word: str
    unit: str
    n: float
    length: int | None = None  # of an epoch, in batches; for fractions

    def bound(self, length: int | None, tokens: bool, what: str) -> Cadence:
        if self.unit == "tokens" and not tokens:
            raise LimitError(
                explain(
                    f"{what}: {self!r}, but nobody counts tokens.",
                    expected="a function that tells how many tokens a batch has",
                    fix=f'{what}(..., tokens=lambda batch: batch["tokens"].numel())',
                )
            )
        if self.unit != "fraction":
            return self
        if length is None:
            raise LimitError(
                explain(
                    f"{what}: {self!r} is a fraction of an epoch, and the data has no length.",
                    expected="data with a length (a list, a DataLoader of a map-style dataset, an ft.data.source)",
                    cause="an iterable that may be endless",
                    fix=f"ft.{self.word}(steps=1000)",
                )
            )
        return replace(self, length=length)

    def amount(self, clock: Clock) -> float:
        """How much of the unit was done; for fractions: how many batches."""
        if self.unit != "fraction":
            return getattr(clock, self.unit)  # type: ignore[no-any-return]  # fields of a Clock are numbers
        length = self._known()
        # An epoch is over when it is completed, after its last step: what is due then comes once, not before the epoch's end.
        return clock.epochs * length + (clock.batch if clock.batch < length else length - 0.5)

    def goal(self, k: float = 1) -> float:
        """The amount at which it is reached for the k-th time."""
        if self.unit != "fraction":
            return k * self.n
        return math.ceil(Fraction(str(self.n)) * self._known() * int(k))

    def reached(self, clock: Clock) -> float:
        """How many times it was reached."""
        if self.unit != "fraction":
            return self.amount(clock) // self.n
        return math.floor(self.amount(clock)) // (Fraction(str(self.n)) * self._known())

    def next(self, goal: float, now: Clock) -> list[Moment]:
        """When the goal is reached."""
        if self.unit == "steps":
            return [Moment(max(goal, now.steps + 1))]
        if self.unit == "seconds":
            return [Moment(now.steps + 1, goal)]
        if self.unit == "epochs":
            return []
        if self.unit == "fraction":
            ahead = goal - self.amount(now)
            ends = goal % self._known() == 0 and ahead > 0
            return [] if ends else [Moment(now.steps + max(1, math.floor(ahead)))]
        return [Moment(now.steps + 1)]

    def _known(self) -> int:
        if self.length is None:
            raise LimitError(
                explain(
                    f"{self!r} was asked without data, so it is not known how long an epoch is.",
                    expected="a cadence given to ft.fit, an evaluator or a hook",
                )
            )
        return self.length

    def __repr__(self) -> str:
        return f"{self.word}({self.unit}={self.n:g})"


@dataclass(frozen=True, repr=False)
class _Every(_Timed):
    def pulses(self) -> bool:
        return True

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return before is not None and self.reached(now) > self.reached(before)

    def moments(self, now: Clock) -> list[Moment]:
        return self.next(self.goal(self.reached(now) + 1), now)


@dataclass(frozen=True, repr=False)
class _From(_Timed):
    def fires(self, before: Clock | None, now: Clock) -> bool:
        return self.amount(now) >= self.goal()

    def moments(self, now: Clock) -> list[Moment]:
        found = self.next(self.goal(), now)
        return found if self.amount(now) < self.goal() else [Moment(now.steps + 1)]

    def amounts(self) -> Iterator[tuple[str, float]]:
        yield self.unit, self.n


@dataclass(frozen=True, repr=False)
class _At(_Timed):
    def pulses(self) -> bool:
        return True

    def fires(self, before: Clock | None, now: Clock) -> bool:
        if before is None or self.n == 0:
            return before is None and self.n == 0
        return self.amount(before) < self.goal() <= self.amount(now)

    def moments(self, now: Clock) -> list[Moment]:
        return self.next(self.goal(), now) if self.amount(now) < self.goal() else []

    def __repr__(self) -> str:
        return f"at({self.n:g})" if self.unit == "steps" else super().__repr__()


def bounds(moments: list[Moment], now: Clock) -> tuple[float, float]:
    """The first step at which one of these moments may come whatever the time is, and the first second at which one may.

    >>> from ftrain.loops.units import Clock, Moment, bounds
    >>> bounds([Moment(10), Moment(1, 60.0)], Clock())
    (10, 60.0)
    """
    steps = [moment.step for moment in moments if moment.second <= now.seconds]
    seconds = [moment.second for moment in moments if moment.second > now.seconds]
    return min(steps, default=math.inf), min(seconds, default=math.inf)


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
    >>> from ftrain.loops.units import Clock
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
    return _Every("every", unit, n)


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
    >>> from ftrain.loops.units import Clock
    >>> ft.until(samples=100).fires(None, Clock(samples=128))
    True
    """
    return _From("until", *_one("until", steps, epochs, samples, tokens, seconds, fraction))


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
    >>> from ftrain.loops.units import Clock
    >>> late = ft.every(steps=10) & ft.after(steps=100)
    >>> late.fires(Clock(steps=89), Clock(steps=90)), late.fires(Clock(steps=109), Clock(steps=110))
    (False, True)
    """
    return _From("after", *_one("after", steps, epochs, samples, tokens, seconds, fraction))


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
        return _At("at", "steps", 0)
    return _At("at", *_one("at", step, epochs, samples, tokens, seconds, fraction))


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
