"""Any scheduler of `torch.optim.lr_scheduler` as a schedule: it is run once, and its values are looked up.

Torch's schedulers are objects that change an optimizer. They depend on nothing but the number of times that they were stepped
(those that need a metric apart), so a table of their values says all that they do.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ...errors import ArgumentError, LimitError, explain
from .checks import refuse
from .schedule import ScheduleFn

__all__ = ["from_torch"]

FIX = "ft.schedules.from_torch(torch.optim.lr_scheduler.StepLR, lr=0.1, steps=1000, step_size=100)"


def from_torch(make: Callable[..., Any], lr: float, steps: int, **options: Any) -> ScheduleFn:
    """The learning rates that a scheduler of torch sets, as a schedule.

    The scheduler is made on an optimizer of its own and stepped `steps - 1` times, now. Of what it changes, only the learning rate
    is kept (not the momentum that `OneCycleLR` cycles). From step `steps` on, the value is that of step `steps - 1`.

    Args:
        make: a class of `torch.optim.lr_scheduler`, or any function `optimizer -> scheduler`.
        lr: the learning rate of the optimizer, from which most schedulers start.
        steps: for how many steps values are wanted, usually the length of the run.
        **options: passed on to `make`, after the optimizer.

    Returns:
        A schedule: one look-up in a table of `steps` float64 values, which is copied once to each device.

    Raises:
        LimitError: the scheduler needs a metric, or `lr` or `steps` make no sense.
        ArgumentError: `make` is not callable or does not give a scheduler.

    >>> import torch, ftrain as ft
    >>> lr = ft.schedules.from_torch(torch.optim.lr_scheduler.StepLR, lr=1.0, steps=100, step_size=10)
    >>> lr([0, 9, 10, 25])
    tensor([1.0000, 1.0000, 0.1000, 0.0100], dtype=torch.float64)
    >>> def chained(optimizer):
    ...     one = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    ...     return torch.optim.lr_scheduler.ChainedScheduler([one])
    >>> ft.schedules.from_torch(chained, lr=1.0, steps=3)([0, 1, 2, 3])
    tensor([1.0000, 0.5000, 0.2500, 0.2500], dtype=torch.float64)
    """
    _check(make, lr, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, device="cpu", requires_grad=True)], lr=float(lr))
    values: list[float] = []
    with warnings.catch_warnings():
        # That the optimizer was not stepped is on purpose; the rest is about torch's own calls.
        warnings.simplefilter("ignore")
        scheduler = make(optimizer, **options)
        _check_scheduler(make, scheduler)
        for position in range(steps):
            values.append(float(optimizer.param_groups[0]["lr"]))
            if position + 1 < steps:
                try:
                    scheduler.step()
                except Exception as error:
                    error.add_note(f"ftrain: raised by step {position + 1} of {steps} in ft.schedules.from_torch.")
                    raise
    parts = [_name(make), f"lr={lr!r}", f"steps={steps!r}", *(f"{key}={value!r}" for key, value in options.items())]
    return ScheduleFn(_Table(values), f"from_torch({', '.join(parts)})")


class _Table:
    """Values by step, with one copy on each device: a copy from the host at each step would be a synchronisation."""

    def __init__(self, values: list[float]) -> None:
        self.host = torch.tensor(values, dtype=torch.float64, device="cpu")
        self.copies: dict[torch.device, Tensor] = {}

    def __call__(self, step: Tensor) -> Tensor:
        at = step.clamp(0, len(self.host) - 1).to(torch.int64)
        # Not table[at]: torch reads a 0-d index on the host.
        return self.on(step.device).index_select(0, at.reshape(-1)).reshape(at.shape)

    def on(self, device: torch.device) -> Tensor:
        if device.type == "cpu":
            return self.host
        found = self.copies.get(device)
        if found is None:
            found = self.host.to(device)
            # What is made inside a trace or a transform of torch.func must not outlive it.
            if not torch.compiler.is_compiling() and type(found) is Tensor and not _transforming():
                self.copies[device] = found
        return found


def _transforming() -> bool:
    """Whether this runs inside `torch.func.vmap`, `grad` or the like."""
    return torch._C._functorch.maybe_current_level() is not None


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__name__", None) or type(make).__name__


def _check(make: object, lr: object, steps: object) -> None:
    if isinstance(make, (LRScheduler, torch.optim.Optimizer)) or not callable(make):
        raise ArgumentError(
            explain(
                "from_torch wants the scheduler's class, or a function that makes it.",
                expected="a class of torch.optim.lr_scheduler, or a function optimizer -> scheduler",
                got=f"an object of {type(make).__name__}" if isinstance(make, LRScheduler) else type(make).__name__,
                fix=FIX,
            )
        )
    if isinstance(make, type) and not issubclass(make, LRScheduler):
        raise ArgumentError(
            explain(
                f"from_torch: {make.__name__} is no scheduler of torch.",
                expected="a subclass of torch.optim.lr_scheduler.LRScheduler, or a function optimizer -> scheduler",
                got=make.__name__,
                fix=FIX,
            )
        )
    if isinstance(make, type):
        _check_metric(make, make.step, ignore=1)
    if isinstance(lr, bool) or not isinstance(lr, (int, float)):
        raise ArgumentError(explain("from_torch: lr= is a number.", got=type(lr).__name__, fix=FIX))
    if not lr >= 0:
        raise LimitError(explain(f"lr={lr!r} is negative.", expected="a number >= 0", got=repr(lr), fix=FIX))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise refuse("from_torch: for how many steps?", expected="steps= a positive integer", got=steps, fix=FIX)


def _check_scheduler(make: Callable[..., Any], scheduler: object) -> None:
    if not isinstance(scheduler, LRScheduler):
        raise ArgumentError(
            explain(
                f"from_torch: {_name(make)} gave no scheduler of torch.",
                expected="an object of torch.optim.lr_scheduler.LRScheduler",
                got=type(scheduler).__name__,
                cause="forgot to return the scheduler?" if scheduler is None else None,
                fix=FIX,
            )
        )
    # Those that are made of others (SequentialLR, ChainedScheduler) keep them here.
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        _check_metric(type(one), one.step)


def _check_metric(kind: type, step: Callable[..., Any], ignore: int = 0) -> None:
    """Raise if a scheduler is stepped with something; `ignore` is the number of arguments that are none (`self`)."""
    parameters = list(inspect.signature(step).parameters.values())[ignore:]
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(one.default is one.empty and one.kind not in loose for one in parameters):
        raise _needs_metric(kind)


def _needs_metric(kind: type) -> LimitError:
    return refuse(
        f"from_torch: {kind.__name__} needs a metric, so it is no function of the step.",
        got=kind.__name__,
        cause="a schedule knows the step and nothing else",
        fix='ft.fit(..., hooks=[ft.hooks.plateau("val/loss", factor=0.1, patience=10)])\n'
        "# with a learning rate that a hook can reach: tx = ft.optim.inject(ft.optim.adamw)(lr=1e-3)",
    )
