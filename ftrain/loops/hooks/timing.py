"""How long a run has taken and may take; the clock is the run's own, which goes on where an earlier process left it."""

from __future__ import annotations

import datetime
import math
import re
from typing import Any

from ...errors import LimitError, explain
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Outcome, on
from ..units import until
from .asking import cadence

__all__ = ["timer"]

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):([0-5]?\d):([0-5]?\d(?:\.\d+)?)")
_UNITS = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)")
_SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}

Duration = str | float | datetime.timedelta


def timer(duration: Duration, *, every: Cadence | None = None) -> Any:
    """A hook that ends the run when its time is up, and tells how much of it is gone.

    Time counts from the start of the run, without the time between two processes of it. The step that is going on ends first; so
    does what is due after it, so leave time for a last checkpoint.

    Args:
        duration: `"8:00:00"` (hours, minutes, seconds), `"1:12:00:00"` (with days), `"1d 12h"` (d, h, min or m, s), a number of
            seconds, or a `datetime.timedelta`.
        every: when to tell `elapsed_seconds` and `remaining_seconds`; default: every 50 steps.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`. `ft.fit(until=ft.until(seconds=...))` is the limit without the metrics.

    Raises:
        LimitError: now, if it is no duration.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> hook = ft.hooks.timer("1d 2h")
    >>> ft.fit(ft.init(model, tx), step, [torch.ones(2, 1)], hooks=[hook], progress=False, compile=False).reason
    'epochs'
    """
    seconds = _seconds(duration)

    def look(state: TrainState, event: Event) -> Outcome:
        elapsed = event.clock.seconds
        told = {"elapsed_seconds": elapsed, "remaining_seconds": max(seconds - elapsed, 0.0)}
        return Outcome(state, told, f"timer: {_shown(seconds)} are over" if elapsed >= seconds else None)

    # `until` is asked at each step, on the host, and fires at the first at which the time is up.
    return on((cadence(every, "ft.hooks.timer"), until(seconds=seconds)), look)


def _seconds(duration: Any) -> float:
    found = math.nan
    if isinstance(duration, datetime.timedelta):
        found = duration.total_seconds()
    elif isinstance(duration, str):
        text = duration.strip()
        parts = _UNITS.findall(text)
        clock = _CLOCK.fullmatch(text)
        if clock is not None:
            days, hours, minutes, rest = clock.groups(default="0")
            found = ((int(days) * 24 + int(hours)) * 60 + int(minutes)) * 60 + float(rest)
        elif parts and re.fullmatch(r"[\s,]*", _UNITS.sub("", text)):
            found = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        found = float(duration)
    if not 0 < found < math.inf:
        raise LimitError(
            explain(
                f"ft.hooks.timer: {duration!r} is no duration.",
                expected='"8:00:00" (h:m:s), "1:12:00:00" (d:h:m:s), "1d 12h 30m", seconds > 0, or a datetime.timedelta',
                got=repr(duration),
                fix='ft.hooks.timer("8:00:00")',
            )
        )
    return found


def _shown(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} seconds"
    return str(datetime.timedelta(seconds=round(seconds)))
