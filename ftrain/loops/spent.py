"""Where the time of a run goes: what was spent on each of its parts since it was last asked."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

from ..data.spans import LISTENER

__all__ = ["PARTS", "Spent"]

PARTS = ("evaluation", "hooks", "checkpoint", "sinks")


class Spent:
    """Seconds by part; what is left over is the step's.

    >>> from ftrain.loops.spent import Spent
    >>> spent = Spent()
    >>> with spent.on("hooks"):
    ...     pass
    >>> sorted(spent.taken(data=0.0, total=1.0))
    ['checkpoint', 'data', 'evaluation', 'hooks', 'sinks', 'step']
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._part = ""
        self._began = 0.0
        self._heard: Any = None  # the context of whoever listens

    def on(self, part: str) -> Spent:
        """A context in which time is spent on this part; they do not nest."""
        self._part = part
        return self

    def __enter__(self) -> None:
        listener = LISTENER.get()
        if listener is not None:
            self._heard = listener(self._part)
            self._heard.__enter__()
        self._began = perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._seconds[self._part] += perf_counter() - self._began
        if self._heard is not None:
            heard, self._heard = self._heard, None
            heard.__exit__(None, None, None)

    def taken(self, data: float, total: float) -> dict[str, float]:
        """The split of so many seconds, of which `data` were spent waiting for data; begins anew."""
        found = {"data": data, **self._seconds}
        found["step"] = max(0.0, total - sum(found.values()))
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return found

    def plain(self) -> dict[str, float]:
        return dict(self._seconds)

    def take(self, plain: Mapping[str, float]) -> None:
        self._seconds = {part: plain.get(part, 0.0) for part in PARTS}
