"""A run at one moment, as a value: what a checkpoint holds of it, and what an exception carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sinks import Record
from ..state import TrainState
from .position import Position

__all__ = ["Failure", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        state: the state; valid until the next step, unless it is a copy.
        position: where the run is in its data, and its clock.
        notes: everything else that a run keeps between two steps, as nested dicts and lists of numbers, texts and arrays: metrics
            that were not recorded yet, random streams, when cadences were last asked, and what was due but not complete.
        records: the records of the run so far, those of earlier processes included.
        ended: why the run is over, where a hook or the data said so; None otherwise.

    >>> import torch, ftrain as ft
    >>> state = ft.init(torch.nn.Linear(1, 1), ft.optim.sgd(0.1))
    >>> records = [ft.Record(0, 0, 0, 0.1, "val", {"loss": 2.0})]
    >>> ft.Snapshot(state, ft.Position(0), records=records).metrics()
    {'val/loss': 2.0}
    """

    state: TrainState
    position: Position
    notes: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()
    ended: str | None = None

    def metrics(self) -> dict[str, Any]:
        """The metrics that were recorded at this very step, by full name."""
        found: dict[str, Any] = {}
        step = self.state.counters().step
        for record in reversed(self.records):
            if record.step != step:
                break
            found = {**record.named(), **found}
        return found


class Failure:
    """What an exception that left `fit` carries as `error.ftrain`: the newest state that is valid, and where it happened.

    Attributes:
        origin: which state this is: `"step"`, the one after the newest complete step; `"snapshot"`, the copy kept by
            `fit(snapshot=...)`; `"checkpoint"`, the newest checkpoint (read when `.state` is asked for); `"start"`, the one given to
            `fit`; None where there is none (`donate=True`, and the first step failed).
        at: how many steps that state has taken, or None.
        step: the newest step that was complete.
        epoch: the epoch of the batch at which it happened.
        batch: the position of that batch in its epoch.
        path: the folder of the checkpoint that holds the state, or None.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> def broken(state, event):
    ...     raise OSError("no more paper")
    >>> try:
    ...     ft.fit(ft.init(model, tx), step, [torch.ones(2, 1)] * 3, hooks=[broken], progress=False, compile=False)
    ... except OSError as error:
    ...     print(error.ftrain)
    Failure(origin='start', at=0, step=0, epoch=0, batch=0)
    """

    def __init__(
        self, origin: str | None, load: Callable[[], TrainState] | None, at: int | None, where: tuple[int, int, int]
    ) -> None:
        self.origin, self.at = origin, at
        self.step, self.epoch, self.batch = where
        self.path: str | None = None
        self._load = load
        self._state: TrainState | None = None

    @property
    def state(self) -> TrainState | None:
        """The newest valid state; a checkpoint is read at the first use."""
        if self._state is None and self._load is not None:
            self._state, self._load = self._load(), None
        return self._state

    def __reduce__(self) -> Any:
        """As a value, with its state: an error travels from the process of a pool to the one that waits for it."""
        return _failure, (self.origin, self.at, (self.step, self.epoch, self.batch), self.path, self.state)

    def __repr__(self) -> str:
        path = "" if self.path is None else f", path={self.path!r}"
        return f"Failure(origin={self.origin!r}, at={self.at}, step={self.step}, epoch={self.epoch}, batch={self.batch}{path})"


def _failure(
    origin: str | None, at: int | None, where: tuple[int, int, int], path: str | None, state: TrainState | None
) -> Failure:
    found = Failure(origin, None, at, where)
    found._state = state
    found.path = path
    return found
