"""Signals during a run: handlers that only set a flag, which the run looks at between two steps.

Law: after the context, every handler is the one that it was before.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["REASONS", "Signals"]

# What each signal makes of a run, by its name: what `Result.reason` says. SIGUSR1 is SLURM's warning by convention.
REASONS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGUSR1": "preempted"}

Handler = Callable[[int, FrameType | None], Any] | int | None


class Signals:
    """Context in which Ctrl-C, SIGTERM and SIGUSR1 ask a run to end; a Ctrl-C after that raises `KeyboardInterrupt` at once.

    A handler of the user's own is called as well. Off the main thread, where Python allows no handlers, nothing is installed.

    Attributes:
        reason: what the run shall end with, or None.

    >>> import os, signal
    >>> from ftrain.loops.signals import Signals
    >>> with Signals() as signals:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    >>> signals.reason
    'terminated'
    """

    def __init__(self, active: bool = True) -> None:
        self.reason: str | None = None
        self._active = active
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> Signals:
        if self._active and threading.current_thread() is threading.main_thread():
            for name in REASONS:
                number: int | None = getattr(signal, name, None)  # Windows has no SIGUSR1
                before = None if number is None else signal.getsignal(number)
                if number is None or before is None or before == signal.SIG_IGN:
                    continue  # set outside of Python, or not to be disturbed by it
                self._before[number] = before
                signal.signal(number, self._flag)
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()

    def _flag(self, number: int, frame: FrameType | None) -> None:
        reason = REASONS[signal.Signals(number).name]
        if number == signal.SIGINT and self.reason is not None:  # whatever asked first: somebody will not wait
            raise KeyboardInterrupt
        self.reason = self.reason or reason
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
