"""A watcher of steps: inside `watching(fn)`, each call of a step goes through `fn`, which may look at it, or do it in its own way.

Law: what a watcher calls in its turn goes to the watcher outside of it, if there is one, and else runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..state import TrainState
from ..types import Batch

__all__ = ["WATCHER", "Watcher", "watching"]

Watcher = Callable[[Any, TrainState, Batch], Any]

# Asked by every call of a step, so it is a plain look-up: 30 ns, of the 100 us that a small step takes.
WATCHER: ContextVar[Watcher | None] = ContextVar("ftrain_step_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Context in which `watcher(step, state, batch)` is called in the place of `step(state, batch)`, and gives what that gives.

    Args:
        watcher: gets the outermost step: a compiled one, or else one of `ft.train_step` and its kin.

    >>> import torch, ftrain as ft
    >>> from ftrain.steps.watching import watching
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> def watcher(step, state, batch):
    ...     print("step", state.counters().step, tuple(batch.shape))
    ...     return step(state, batch)
    >>> with watching(watcher):
    ...     new, metrics = step(ft.init(model, tx), torch.ones(4, 1))
    step 0 (4, 1)
    """
    outer = WATCHER.get()

    def call(step: Any, state: TrainState, batch: Batch) -> Any:
        token = WATCHER.set(outer)
        try:
            return watcher(step, state, batch)
        finally:
            WATCHER.reset(token)

    token = WATCHER.set(call)
    try:
        yield
    finally:
        WATCHER.reset(token)
