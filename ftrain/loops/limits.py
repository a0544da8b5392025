"""When a run ends: `epochs=`, `steps=` and `until=`, checked before any work."""

from __future__ import annotations

from typing import NamedTuple

from ..data import Epochs
from ..errors import DataError, LimitError, explain
from .units import Cadence, Clock

__all__ = ["Limits"]


class Limits(NamedTuple):
    """How much a run may do from where it starts; None is no limit."""

    epochs: int | None
    steps: int | None
    until: Cadence | None

    @classmethod
    def of(cls, epochs: int | None, steps: int | None, until: Cadence | None, data: Epochs, what: str) -> Limits:
        """Check the limits against each other and against the data.

        Raises:
            LimitError: a limit that is no positive integer, or none at all for data without a length.
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
        if until is not None and not isinstance(until, Cadence):
            raise LimitError(
                explain(
                    f"{what}: until={until!r} makes no sense.",
                    expected="ft.until(...)",
                    got=type(until).__name__,
                    fix=f"{what}(state, step, data, until=ft.until(seconds=600))",
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
        if data.once and epochs is not None and epochs > 1:
            raise DataError(
                explain(
                    f"{what}: epochs={epochs}, but the data is an iterator, which is at its end after one.",
                    expected="a list, a DataLoader, or a function epoch -> iterable",
                    fix=f"{what}(state, step, lambda epoch: make_batches(), epochs={epochs})",
                )
            )
        return cls(epochs, steps, until)

    def reached(self, before: Clock, now: Clock) -> str | None:
        """Which limit is reached between two clocks, or None."""
        if self.steps is not None and now.steps >= self.steps:
            return "steps"
        if self.epochs is not None and now.epochs >= self.epochs:
            return "epochs"
        if self.until is not None and self.until.fires(before, now):
            return "until"
        return None
