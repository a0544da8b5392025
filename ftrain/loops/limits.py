"""When a run ends: `epochs=`, `steps=`, `until=` and `at_least=`, checked before any work."""

from __future__ import annotations

from typing import NamedTuple

from ..data import Epochs
from ..errors import DataError, LimitError, explain
from .cadences import Cadence, Clock

__all__ = ["Limits"]


class Limits(NamedTuple):
    """How much a run may do from where it starts, and how much it does at least; None is no limit."""

    epochs: int | None
    steps: int | None
    until: Cadence | None
    at_least: Cadence | None = None

    @classmethod
    def of(
        cls,
        epochs: int | None,
        steps: int | None,
        until: Cadence | None,
        data: Epochs,
        what: str,
        *,
        at_least: Cadence | None = None,
        tokens: bool = False,
    ) -> Limits:
        """Check the limits against each other and against the data.

        Raises:
            LimitError: a limit that is no positive integer, none at all for data without a length, or contradictory ones.
            DataError: several epochs of data that can be iterated only once.
        """
        for name, n in (("epochs", epochs), ("steps", steps)):
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise LimitError(
                    explain(
                        f"{what}: {name}={n!r} makes no sense.",
                        expected="an integer >= 1",
                        got=repr(n),
                        fix=f"{what}(state, step, data, {name}=1)",
                    )
                )
        for name, cadence in (("until", until), ("at_least", at_least)):
            if cadence is not None and not isinstance(cadence, Cadence):
                raise LimitError(
                    explain(
                        f"{what}: {name}={cadence!r} makes no sense.",
                        expected="ft.until(...)",
                        got=type(cadence).__name__,
                        fix=f"{what}(state, step, data, {name}=ft.until(seconds=600))",
                    )
                )
        if epochs is None and steps is None and until is None:
            if data.length is None:
                raise LimitError(
                    explain(
                        f"{what}: the data has no length, so it may be endless, and neither epochs nor steps are given.",
                        expected="epochs=, steps= or until=",
                        fix=f"{what}(state, step, data, steps=1000)",
                    )
                )
            epochs = 1
        if data.endless and epochs is not None and steps is None and until is None:
            raise LimitError(
                explain(
                    f"{what}: epochs={epochs}, but the data is endless: its first epoch never ends.",
                    expected="steps= or until=, or data with an end",
                    got=f"epochs={epochs}",
                    fix=f"{what}(state, step, data, steps=1000)   # or source without .repeat()",
                )
            )
        if data.once and epochs is not None and epochs > 1:
            raise DataError(
                explain(
                    f"{what}: epochs={epochs}, but the data is an iterator, which is at its end after one.",
                    expected="a list, a DataLoader, or a function epoch -> iterable",
                    fix=f"{what}(state, step, lambda epoch: make_batches(), epochs={epochs})",
                )
            )
        if at_least is not None:
            if at_least.pulses():
                raise LimitError(
                    explain(
                        f"{what}: at_least={at_least!r} holds at single moments only.",
                        expected="what holds from some moment on: ft.until(...), ft.after(...)",
                        got=repr(at_least),
                        fix=f"{what}(state, step, data, at_least=ft.until(steps=100))",
                    )
                )
            _check_order(at_least, cls(epochs, steps, until), data.length, what)
            at_least = at_least.bound(data.length, tokens, what)
        return cls(epochs, steps, None if until is None else until.bound(data.length, tokens, what), at_least)

    def reached(self, before: Clock, now: Clock) -> str | None:
        """Which limit is reached between two clocks, or None."""
        if self.steps is not None and now.steps >= self.steps:
            return "steps"
        if self.epochs is not None and now.epochs >= self.epochs:
            return "epochs"
        if self.until is not None and self.until.fires(before, now):
            return "until"
        return None


def _check_order(at_least: Cadence, limits: Limits, length: int | None, what: str) -> None:
    """Raise where a run would be over before it has done what it has to do at least."""
    most = _most(limits, length)
    for unit, least in at_least.amounts():
        if unit in most and least > most[unit][0]:
            raise LimitError(
                explain(
                    f"{what}: the limits contradict each other.",
                    expected="at_least= below what ends the run",
                    got=f"at_least={at_least!r}, and {most[unit][1]}"
                    + (f" with {length} steps an epoch" if unit not in most[unit][1] else ""),
                    fix=f"{what}(state, step, data, at_least=ft.until({unit}={int(most[unit][0])}))"
                    if most[unit][0] >= 1
                    else f"{what}(state, step, data)   # without at_least=",
                )
            )


def _most(limits: Limits, length: int | None) -> dict[str, tuple[float, str]]:
    """How much a run may do, by unit, and which limit says so."""
    epochs, steps, until = limits.epochs, limits.steps, limits.until
    most: dict[str, tuple[float, str]] = {}
    alternatives = [until] if until is not None else []
    while alternatives:  # of what is joined by "or", the first that is reached ends the run
        one = alternatives.pop()
        sides = one.alternatives()
        if len(sides) > 1:
            alternatives.extend(sides)
            continue
        amounts = list(one.amounts())
        if len(amounts) == 1:  # several by "and": none of them ends the run by itself
            _note(most, *amounts[0], repr(one))
    if steps is not None:
        _note(most, "steps", steps, f"steps={steps}")
    if epochs is not None:
        _note(most, "epochs", epochs, f"epochs={epochs}")
    for unit in ("epochs", "fraction"):
        if unit in most and length is not None:
            _note(most, "steps", most[unit][0] * length, most[unit][1])
    if "steps" in most and length is not None:
        _note(most, "epochs", most["steps"][0] / length, most["steps"][1])
        _note(most, "fraction", most["steps"][0] / length, most["steps"][1])
    return most


def _note(most: dict[str, tuple[float, str]], unit: str, n: float, whose: str) -> None:
    if unit not in most or n < most[unit][0]:
        most[unit] = n, whose
