"""Let parameters train from a moment of the run on: fine-tuning in stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import HookError, LimitError, explain
from ...optim import FreezableState
from ...optim.masks import matches, nearest
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, compose, on
from .hyper import children, rebuilt

__all__ = ["unfreeze"]


def unfreeze(schedule: Mapping[str, Cadence]) -> Any:
    """A hook that lets groups of `ft.optim.freezable` train from the moment on at which a cadence fires.

    Law: until then the group's parameters, and its optimizer's state, are bit for bit what they were; from the next step on they move
    as in a run that begins there with a new optimizer. Which of the two is a 0-d tensor in the state, so the step is not compiled
    again, and a run that is resumed has it.

    Args:
        schedule: `{group: cadence}`: a group's pattern as `freezable` has it, or a pattern for such; e.g. `ft.at(epochs=1)` for the
            end of the first epoch, `ft.at(1000)` for the end of step 1000.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`.

    Raises:
        LimitError: now, if it is no schedule.
        HookError: when the run starts, or when a group is let go, if the optimizer has no such group.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    >>> tx = ft.optim.freezable(ft.optim.adamw(1e-2), ["0.*"])
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> hook, data = ft.hooks.unfreeze({"0.*": ft.at(epochs=1)}), [torch.ones(2, 1)] * 3
    >>> def moved(epochs):
    ...     state = ft.init(model, tx)
    ...     after = ft.fit(state, step, data, epochs=epochs, hooks=[hook], progress=False, compile=False).state
    ...     return [name for name, p in state.params.items() if not torch.equal(p, after.params[name])]
    >>> moved(1)
    ['1.weight', '1.bias']
    >>> moved(2)
    ['0.weight', '0.bias', '1.weight', '1.bias']
    """
    who = "ft.hooks.unfreeze"
    right = isinstance(schedule, Mapping) and bool(schedule)
    if not right or not all(isinstance(k, str) and isinstance(v, Cadence) for k, v in schedule.items()):
        raise LimitError(
            explain(
                f"{who} wants a cadence for each group.",
                expected="{pattern: cadence}",
                got=repr(schedule),
                fix='ft.hooks.unfreeze({"body.*": ft.at(epochs=1)})',
            )
        )

    def check(state: TrainState, event: Event) -> TrainState:
        for pattern in schedule:
            _check_group(state.opt, pattern)
        return state

    def release(pattern: str) -> Any:
        def unfreeze(state: TrainState, event: Event) -> TrainState:
            _check_group(state.opt, pattern)  # again: a run that is resumed has no start
            return state.replace(opt=_active(state.opt, pattern))

        return unfreeze

    return compose(on("start", check), *(on(when, release(pattern)) for pattern, when in schedule.items()))


def _active(opt: Any, pattern: str) -> Any:
    """The optimizer's state with the groups that match set free."""
    inner = rebuilt(opt, [_active(child, pattern) for _, child in children(opt)])
    if not isinstance(inner, FreezableState):
        return inner
    return inner._replace(active={name: _freed(flag, _named(name, pattern)) for name, flag in inner.active.items()})


def _freed(flag: Tensor, chosen: bool) -> Tensor:
    return torch.ones_like(flag) if chosen else flag


def _named(name: str, pattern: str) -> bool:
    return name == pattern or matches(name, (pattern,))


def _groups(opt: Any) -> Iterator[str]:
    if isinstance(opt, FreezableState):
        yield from opt.active
    for _, child in children(opt):
        yield from _groups(child)


def _check_group(opt: Any, pattern: str) -> None:
    found = list(_groups(opt))
    if not any(_named(name, pattern) for name in found):
        near = nearest(pattern, found)
        raise HookError(
            explain(
                f"ft.hooks.unfreeze: the optimizer has no group {pattern!r} that could be let go.",
                where="state.opt",
                expected=f"one of: {', '.join(found)}" if found else "the state of ft.optim.freezable",
                got=repr(pattern),
                fix=f"ft.hooks.unfreeze({{{near!r}: ...}})"
                if near
                else f"tx = ft.optim.freezable(tx, [{pattern!r}])   # in ft.init and ft.train_step alike",
            )
        )
