"""Learning rates, and other hyper-parameters that lie in the optimizer's state, as metrics.

A step that ftrain made tells them by itself (`lr`, `lr/head`). This hook is for steps that do not, such as those written by hand,
and for names of one's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, HookError, explain
from ...optim import metrics as reported
from ...state import TrainState
from ..cadences import Cadence
from ..events import Event, Outcome, on
from .asking import cadence

__all__ = ["learning_rate"]


def learning_rate(*, every: Cadence | None = None, hyper: str | Iterable[str] = ("lr",), prefix: str = "") -> Any:
    """A hook that tells learning rates and other hyper-parameters, as the optimizers' states have them after the step.

    The values stay on the device until the next record. What the step's own metrics hold under the same name is not told again:
    `ft.train_step` tells all of it already, unless a `prefix` asks for other names.

    Args:
        every: when to tell; default: every 50 steps, as often as `ft.fit` records.
        hyper: names, e.g. `("lr", "momentum", "weight_decay")`; each in every group, chain and optimizer that has it. A rate is in
            the state always, anything else where `ft.optim.inject` put it there.
        prefix: put in front of each name, e.g. `"optimizer_"`.

    Returns:
        A hook for `ft.fit(..., hooks=[...])`; its metrics are those of `ft.optim.metrics`: 0-d tensors.

    Raises:
        ArgumentError, LimitError: now, if an argument makes no sense.
        HookError: when the run starts, if no optimizer has such a hyper-parameter in its state.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.inject(ft.optim.sgd)(lr=0.1, momentum=0.9)
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean()))
    >>> update = ft.make_update(grad, tx)
    >>> step = ft.as_step(lambda state, batch: (update(state, batch)[0], {}), uses=[update])  # tells nothing
    >>> hook = ft.hooks.learning_rate(every=ft.every(steps=1), hyper=("lr", "momentum"))
    >>> result = ft.fit(ft.init(model, tx), step, [torch.ones(2, 1)], hooks=[hook], progress=False, compile=False)
    >>> result.history.last()
    {'lr': 0.1, 'momentum': 0.9}
    """
    who = "ft.hooks.learning_rate"
    names = (hyper,) if isinstance(hyper, str) else tuple(hyper) if isinstance(hyper, Iterable) else (hyper,)
    for name in names or (None,):
        if not isinstance(name, str) or not name:
            raise ArgumentError(
                explain(
                    f"{who}: hyper= are names of hyper-parameters.",
                    expected="a str, or several",
                    got=repr(hyper),
                    fix='hyper=("lr", "weight_decay")',
                )
            )
    if not isinstance(prefix, str):
        raise ArgumentError(
            explain(f"{who}: prefix= is text.", expected="a str", got=repr(prefix), fix='prefix="optimizer_"')
        )
    # `metrics` adds the labels of groups, and a number where two optimizers of a chain report the same name.
    wanted = {name: re.compile(rf"{re.escape(name)}(_\d+)?(/.*)?") for name in names}

    def tell(state: TrainState, event: Event) -> Any:
        found = reported(state.opt)
        if event.kind == "start":
            _check_reported(wanted, found)
            return state
        told = {
            prefix + name: value.clone()  # the state's memory belongs to the next step
            for name, value in found.items()
            if prefix + name not in event.metrics and any(one.fullmatch(name) for one in wanted.values())
        }
        return Outcome(state, told)

    return on(("start", cadence(every, who)), tell)


def _check_reported(wanted: dict[str, re.Pattern[str]], found: dict[str, Tensor]) -> None:
    for name, pattern in wanted.items():
        if not any(pattern.fullmatch(one) for one in found):
            raise HookError(
                explain(
                    f"ft.hooks.learning_rate: no optimizer has {name!r} in its state.",
                    where="state.opt",
                    expected=f"one of: {', '.join(found) or '(none)'}",
                    got=f"hyper={name!r}",
                    cause="a hyper-parameter that was not injected is a constant in the optimizer's code, not in the state",
                    fix=f"tx = ft.optim.inject(ft.optim.adamw)(lr=1e-3, {name}=...)   # in ft.init and ft.train_step alike",
                )
            )
