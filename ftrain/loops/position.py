"""Where a run is in its data, as a value: what a loop needs besides the state in order to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, StateError, explain
from ..state import Counters
from .cadences import Clock

__all__ = ["Position"]


@dataclass(frozen=True)
class Position:
    """Where a run is: `ft.loop(state, step, data, start=position)` goes on there.

    Attributes:
        epoch: the epoch of the next batch, from 0 on.
        data: the place in that epoch's data: `data["batch"]` batches were handed out; the rest is the data's own.
        clock: how much was done since the run began, this and earlier processes together.
        before: the clock at which the limits of the run were asked before, where they ask for a moment; else None.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> data = [torch.full((1, 1), float(i)) for i in range(5)]
    >>> for tick in ft.loop(ft.init(model, tx), step, data):
    ...     if tick.step == 2:
    ...         state, position = tick.state, tick.position()
    ...         break
    >>> position.data
    {'batch': 2}
    >>> [tick.batch for tick in ft.loop(state, step, data, start=position)]
    [2, 3, 4]
    """

    epoch: int
    data: Mapping[str, Any] = field(default_factory=lambda: {"batch": 0})
    clock: Clock = field(default_factory=Clock)
    before: Clock | None = None

    def plain(self) -> dict[str, Any]:
        """As nested dicts and lists, for a checkpoint."""
        before = None if self.before is None else self.before._asdict()
        return {"epoch": self.epoch, "data": dict(self.data), "clock": self.clock._asdict(), "before": before}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Position:
        """From what `plain` gave.

        >>> import ftrain as ft
        >>> ft.Position.of(ft.Position(3).plain()) == ft.Position(3)
        True
        """
        before = None if plain["before"] is None else Clock(**plain["before"])
        return cls(plain["epoch"], plain["data"], Clock(**plain["clock"]), before)


def check_position(start: object, counters: Counters, what: str) -> Position:
    """Raise unless `start` is a position at which a state with these counters can be."""
    if not isinstance(start, Position):
        raise DataError(
            explain(
                f"{what}: start={start!r} is no position.",
                expected="what tick.position() gave",
                got=type(start).__name__,
                fix=f"{what}(state, step, data, start=tick.position())",
            )
        )
    if start.epoch != counters.epoch or start.clock.steps > counters.step or start.clock.samples > counters.samples:
        raise StateError(
            explain(
                f"{what}: the state and the position are not of the same moment.",
                expected=f"a state in epoch {start.epoch}, after at least {start.clock.steps} steps",
                got=f"epoch {counters.epoch}, {counters.step} steps",
                fix="state, position = tick.state, tick.position()   # take both from one tick",
            )
        )
    return start
