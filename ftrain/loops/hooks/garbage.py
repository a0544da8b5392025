"""Python's garbage collector, run when the run wants it, not when the allocator feels like it.

The collector walks all objects of the process whenever enough new ones were made: a pause of tens of milliseconds somewhere in a
step, and on many devices on one of them at a time, for which all others wait. Turned off, and called at a cadence, it costs a known
time at a known step. The idea is that of torchtitan's `GarbageCollection` and torchtnt's callback of that name.
"""

from __future__ import annotations

import gc
from typing import Any

from ...errors import LimitError, explain
from ...state import TrainState
from ..cadences import Cadence, Clock, Moment
from ..events import Event, on
from .asking import cadence

__all__ = ["garbage_collection"]


class _Automatic(Cadence):
    """At the first step at which Python collects by itself: the first one of this process, where a run is resumed."""

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return gc.isenabled()

    def moments(self, now: Clock) -> list[Moment]:
        return [Moment(now.steps + 1)] if gc.isenabled() else []

    def __repr__(self) -> str:
        return "while Python collects by itself"


def garbage_collection(*, every: Cadence | None = None, generation: int = 1) -> Any:
    """A hook that turns automatic garbage collection off during the run, and collects at a cadence.

    When the run ends or fails the collector is turned on again, if it was on before. Objects that are in no reference cycle do not
    wait for it: tensors are freed as ever.

    Args:
        every: when to collect; default: every 1000 steps.
        generation: the oldest that is collected: 0 and 1 are quick, 2 is everything (a second or more in a large process).

    Returns:
        A hook for `ft.fit(..., hooks=[...])`; it leaves the state alone.

    Raises:
        LimitError: now, if an argument makes no sense.

    >>> import gc, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> seen = []
    >>> look = ft.on("step", lambda state, event: seen.append(gc.isenabled()) or state)
    >>> hooks = [ft.hooks.garbage_collection(every=ft.every(steps=10)), look]
    >>> _ = ft.fit(ft.init(model, tx), step, [torch.ones(2, 1)] * 3, hooks=hooks, progress=False, compile=False)
    >>> seen, gc.isenabled()
    ([False, False, False], True)
    """
    who = "ft.hooks.garbage_collection"
    if isinstance(generation, bool) or generation not in (0, 1, 2):
        raise LimitError(
            explain(
                f"{who}: there is no such generation.", expected="0, 1 or 2", got=repr(generation), fix="generation=1"
            )
        )
    ours = [False]  # whether this hook turned the collector off: an effect on the process, so no part of the state

    def collect(state: TrainState, event: Event) -> TrainState:
        if event.kind in ("end", "exception"):
            if ours[0]:
                ours[0] = False
                gc.enable()
            return state
        if gc.isenabled():
            ours[0] = True
            gc.disable()
        gc.collect(generation)
        return state

    when = cadence(every, who, steps=1000)
    return on(("start", when, _Automatic(), "end", "exception"), collect)
