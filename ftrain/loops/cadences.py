"""Cadences: values that answer whether this is the moment, and the clocks that they are asked with.

A cadence is asked with two clocks, the one at which it was asked before (None at the start) and the present one, and answers
whether it fires. It is a value without memory, so the same one serves many runs.

Laws
----
- `(a | b)` fires when either does, `(a & b)` when both do, `~a` when `a` does not.
- Between two questions a cadence does not fire before one of its `moments`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from ..errors import ArgumentError, LimitError, explain

__all__ = ["At", "Cadence", "Clock", "Every", "From", "Moment", "bounds"]


class Clock(NamedTuple):
    """How far a run is: what was done since it began, and how many batches of the present epoch.

    >>> from ftrain.loops.cadences import Clock
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
    """No sooner than at this step (counted like `Clock.steps`, at its end), second, sample and token: bounds, all inclusive.

    >>> from ftrain.loops.cadences import Moment
    >>> Moment(10).second
    0.0
    """

    step: float
    second: float = 0.0
    sample: float = 0
    token: float = 0

    def both(self, other: Moment) -> Moment:
        """No sooner than either."""
        return Moment(*map(max, self, other))


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
        return [x.both(y) for x in one for y in two]

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
                    fix=f'{"ft.loop" if what == "ft.loop" else "ft.fit"}(..., tokens=lambda batch: batch["tokens"].numel())',
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
            return [Moment(now.steps + 1, second=goal)]
        if self.unit == "samples":
            return [Moment(now.steps + 1, sample=goal)]
        if self.unit == "tokens":
            return [Moment(now.steps + 1, token=goal)]
        if self.unit == "epochs":
            return []
        ahead = goal - self.amount(now)  # a fraction, in batches
        ends = goal % self._known() == 0 and ahead > 0
        return [] if ends else [Moment(now.steps + max(1, math.floor(ahead)))]

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
class Every(_Timed):
    """Again and again. Made by `ft.every`.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import Every
    >>> ft.every(steps=3) == Every("every", "steps", 3)
    True
    """

    def pulses(self) -> bool:
        return True

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return before is not None and self.reached(now) > self.reached(before)

    def moments(self, now: Clock) -> list[Moment]:
        return self.next(self.goal(self.reached(now) + 1), now)


@dataclass(frozen=True, repr=False)
class From(_Timed):
    """From some moment on. Made by `ft.until` and `ft.after`.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import From
    >>> ft.after(epochs=1) == From("after", "epochs", 1)
    True
    """

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return self.amount(now) >= self.goal()

    def moments(self, now: Clock) -> list[Moment]:
        found = self.next(self.goal(), now)
        return found if self.amount(now) < self.goal() else [Moment(now.steps + 1)]

    def amounts(self) -> Iterator[tuple[str, float]]:
        yield self.unit, self.n


@dataclass(frozen=True, repr=False)
class At(_Timed):
    """Once. Made by `ft.at`.

    >>> import ftrain as ft
    >>> from ftrain.loops.cadences import At
    >>> ft.at(3) == At("at", "steps", 3)
    True
    """

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


def bounds(moments: list[Moment], now: Clock) -> Moment:
    """The first step at which one of these moments may come whatever else is, and the first second, sample and token at which one may.

    >>> from ftrain.loops.cadences import Clock, Moment, bounds
    >>> bounds([Moment(10), Moment(1, second=60.0)], Clock())
    Moment(step=10, second=60.0, sample=inf, token=inf)
    """
    step = second = sample = token = math.inf
    for moment in moments:  # one bound that is not reached yet is enough to wait for
        if moment.second > now.seconds:
            second = min(second, moment.second)
        elif moment.sample > now.samples:
            sample = min(sample, moment.sample)
        elif moment.token > now.tokens:
            token = min(token, moment.token)
        else:
            step = min(step, moment.step)
    return Moment(step, second, sample, token)
