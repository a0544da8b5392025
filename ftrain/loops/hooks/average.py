"""Averaged parameters, put in the place of those that were trained."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ArgumentError, HookError, explain
from ...state import TrainState
from ...steps.average import Average, averaged
from .. import events
from ..cadences import Cadence
from ..events import CHANGES, Event

__all__ = ["swap_average"]


def swap_average(average: str = "ema", *, on: str | Cadence = "end") -> Any:
    """A hook that puts the averaged parameters and buffers of `ft.with_ema` or `ft.with_swa` in the place of the trained ones.

    Law: `params = average` where something was averaged, else nothing changes; decided on the device. The average itself and the
    optimizer's state stay as they are. When averaging begins, and how often, is said to the step: `with_ema(start=, every=)`.

    At `"end"` it is the last thing that happens: `result.state` has the averaged parameters, the last checkpoint has both.

    Args:
        average: name of the average in `state.extra`.
        on: when: a kind of event, or a cadence, e.g. `ft.at(epochs=10)`, from where on training begins with the average.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`.

    Raises:
        ArgumentError, HookError: now, if an argument makes no sense.
        StateError: before the first step, if the state has no such average.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.with_ema(ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx), 0.5)
    >>> hook = ft.hooks.swap_average("ema")
    >>> data = [torch.ones(2, 1)] * 3
    >>> state = ft.fit(ft.init(model, tx), step, data, hooks=[hook], progress=False, compile=False).state
    >>> torch.equal(state.params["weight"], state.extra["ema"].params["weight"])
    True
    """
    who = "ft.hooks.swap_average"
    if not isinstance(average, str) or not average:
        raise ArgumentError(
            explain(
                f"{who}: the average has a name.",
                expected="a str",
                got=repr(average),
                fix='ft.hooks.swap_average("ema")',
            )
        )
    if not isinstance(on, Cadence) and on not in CHANGES:
        raise HookError(
            explain(
                f"{who}: on={on!r} is no event at which a state can be changed.",
                expected=f"{', '.join(CHANGES)}, or a cadence",
                got=repr(on),
                fix='on="end"',
            )
        )

    def swap(state: TrainState, event: Event) -> TrainState:
        params, buffers = averaged(state, average, who)
        own: Average = state.extra[average]
        some = own.count > 0
        # `where` also makes leaves of their own: the average and the parameters must not share memory.
        return state.replace(
            params={name: torch.where(some, params[name], leaf) for name, leaf in state.params.items()},
            buffers={name: torch.where(some, buffers[name], leaf) for name, leaf in state.buffers.items()},
        )

    def check(state: TrainState, event: Event) -> TrainState:
        averaged(state, average, who)
        return state

    return events.compose(events.on("start", check), events.on(on, swap))
