"""Hyper-parameters as leaves of the optimizer's state.

Law: `inject(f)(lr=x)` computes what `f(lr=x)` does, with `x` as a leaf of the state that anybody may replace.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, explain
from ..types import Transform
from .transform import forwarding, is_schedule, new_count, value_at

__all__ = ["Injected", "inject"]


class Injected(NamedTuple):
    """State of `inject`: hyper-parameters by name (0-d float64), the count of updates, the state of the optimizer.

    `scheduled` names those hyper-parameters that a schedule sets anew at each update, each with an empty tuple: it has no leaves,
    and tells who wants to change a hyper-parameter that it would not last.

    >>> import torch, ftrain as ft
    >>> ft.optim.inject(ft.optim.sgd)(lr=0.1).init({"w": torch.ones(2)}).hyper
    {'lr': tensor(0.1000, dtype=torch.float64)}
    """

    hyper: dict[str, Tensor]
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    inner: Any
    scheduled: dict[str, tuple[()]]

    def metrics(self) -> dict[str, Tensor]:
        return self.hyper


def inject(factory: Callable[..., Transform]) -> Callable[..., Transform]:
    """Turn the numeric hyper-parameters of an optimizer into leaves of its state.

    Hooks, `lr_find` and vmapped sweeps can then read and replace them: `state.opt.hyper["lr"]`. An argument that is a schedule
    is evaluated at every update, and its value stands there too.

    Args:
        factory: a function of hyper-parameters that returns a transform, e.g. `ft.optim.adamw`.

    Returns:
        A function of the same arguments. The numbers, 0-d tensors and schedules that are passed to it become leaves, also those
        passed by keyword to a `**kwargs` or held by a `functools.partial`. Those left at their default do not, nor does what is
        structure: bools, strings, tuples, arguments annotated as `int`, whole numbers in a `**kwargs`.

    Source: the idea of `optax.inject_hyperparams`.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.inject(ft.optim.sgd)(lr=0.5)
    >>> params = {"w": torch.zeros(1)}
    >>> state = tx.init(params)
    >>> halved = state._replace(hyper={"lr": state.hyper["lr"] / 2})
    >>> tx.update({"w": torch.ones(1)}, halved, params)[0]["w"]
    tensor([-0.2500])
    """
    if not callable(factory):
        raise ArgumentError(
            explain(
                "ft.optim.inject wants an optimizer's function.",
                got=repr(factory),
                fix="inject(ft.optim.adamw)(lr=1e-3)",
            )
        )
    held: dict[str, Any] = {}
    first: tuple[Any, ...] = ()
    own: Any = factory
    while isinstance(own, functools.partial):
        held, first, own = {**own.keywords, **held}, (*own.args, *first), own.func
    parameters = inspect.signature(own).parameters
    positional = [
        name for name, one in parameters.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]

    def make(*args: Any, **kwargs: Any) -> Transform:
        args, kwargs = (*first, *args), {**held, **kwargs}
        made = own(*args, **kwargs)  # validates the arguments now, not at the first step
        names = [*positional[: len(args)], *[""] * (len(args) - len(positional))]  # "": what falls into *args
        given = {name: value for name, value in zip(names, args, strict=True) if name} | kwargs
        schedules = {name: value for name, value in given.items() if _is_schedule(value, parameters.get(name))}
        numbers = {name: value for name, value in given.items() if _is_number(value, parameters.get(name))}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim == 0}

        def build(hyper: dict[str, Tensor]) -> Transform:
            values = [hyper.get(name, value) for name, value in zip(names, args, strict=True)]
            built: Transform = own(*values, **{name: hyper.get(name, value) for name, value in kwargs.items()})
            return built

        def init(params: Any, /) -> Any:
            count = new_count(params)
            hyper = {name: torch.full_like(count, value, dtype=torch.float64) for name, value in numbers.items()}
            hyper |= {
                name: value.detach().to(count.device, torch.float64, copy=True) for name, value in tensors.items()
            }
            hyper |= {name: _tensor_at(schedule, count) for name, schedule in schedules.items()}
            return Injected(hyper, count, build(hyper).init(params), dict.fromkeys(schedules, ()))

        def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
            now = {name: _tensor_at(schedule, state.count) for name, schedule in schedules.items()}
            hyper = {**state.hyper, **now}
            updates, inner = build(hyper).update(grads, state.inner, params, **more)
            return updates, Injected(hyper, state.count + 1, inner, state.scheduled)

        return forwarding(init, update, made)

    return make


def _tensor_at(schedule: Any, count: Tensor) -> Tensor:
    value = value_at(schedule, count)
    assert isinstance(value, Tensor), "a schedule gives a tensor, or value_at raises"
    return value


def _is_schedule(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Whether an argument is a schedule: by itself, or a function where the annotation says that a function is one."""
    if is_schedule(value):
        return True
    return callable(value) and parameter is not None and "Schedule" in _kinds(parameter)


def _kinds(parameter: inspect.Parameter) -> set[str]:
    """The alternatives of an annotation."""
    note = parameter.annotation
    text = note if isinstance(note, str) else getattr(note, "__name__", str(note))
    return {part.strip() for part in text.split("|")}


def _is_number(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Whether an argument is a number that may become a tensor; one annotated as an integer is a size or a choice, and stays.

    What falls into a `**kwargs` (no parameter of its own) does not say: there a whole number stays as well.
    """
    if parameter is None or type(value) is not int:
        return type(value) is float
    return not _kinds(parameter) <= {"int", "bool", "None"}
