"""Spans of a run's time, told to whoever listens: a profile, for the time of some steps.

There are no ranges of torch's profiler where a user's code may stop one and start another, since a range that is open meanwhile is
written to memory that is gone (torch 2.13: a crash in the next garbage collection).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

__all__ = ["LISTENER"]

# `listener(part)` gives the context in which that part of the run goes on. Asked for each batch, so a plain look-up: 40 ns.
LISTENER: ContextVar[Callable[[str], AbstractContextManager[Any]] | None] = ContextVar("ftrain_listener", default=None)
