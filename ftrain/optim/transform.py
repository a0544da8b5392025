"""The algebra of transforms: `chain`, `identity`, `apply_updates`, and what all transforms are made with.

Laws
----
- `chain(a, chain(b, c))` computes what `chain(chain(a, b), c)` does, and `identity()` is neutral in it.
- What wraps others takes a `value_fn` when one of them does, and hands it to those alone.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ArgumentError, LimitError, explain
from ..types import InitFn, Schedule, Transform, ValueFn
from .lists import over

__all__ = [
    "CountState",
    "apply_updates",
    "chain",
    "check_transforms",
    "forwarding",
    "identity",
    "is_schedule",
    "new_count",
    "nonnegative",
    "takes_value_fn",
    "value_at",
]


def identity() -> Transform:
    """The transform that changes nothing.

    >>> import ftrain as ft
    >>> ft.optim.identity().update({"w": 1.0}, (), {"w": 0.0})
    ({'w': 1.0}, ())
    """
    return Transform(lambda params: (), lambda grads, state, params: (grads, state))


def chain(*transforms: Transform) -> Transform:
    """Transforms one after the other: each works on what the one before it gave.

    Args:
        *transforms: from the gradient to the update.

    Returns:
        A transform whose state is the tuple of their states.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.sgd(1.0))
    >>> params = {"w": torch.zeros(2)}
    >>> updates, _ = tx.update({"w": torch.tensor([30.0, 40.0])}, tx.init(params), params)
    >>> updates["w"]
    tensor([-0.6000, -0.8000])
    """
    check_transforms("chain", *transforms)

    def init(params: Any, /) -> Any:
        return tuple([one.init(params) for one in transforms])

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        new = []
        for one, own in tree.zip_strict(transforms, state, "transforms of a chain and their states are"):
            grads, after = one.update(grads, own, params, **(more if takes_value_fn(one) else {}))
            new.append(after)
        return grads, tuple(new)

    return forwarding(init, update, *transforms)


def check_transforms(what: str, *transforms: Any) -> None:
    """Raise unless all of them have the two functions of a transform.

    >>> import ftrain as ft
    >>> from ftrain.optim.transform import check_transforms
    >>> check_transforms("chain", ft.optim.sgd)
    Traceback (most recent call last):
    ftrain.errors.ArgumentError: ft.optim.chain wants transforms.
      where:    argument 0
      expected: Transform(init, update)
      got:      function
      cause:    `sgd` makes one when it is called
      fix:      ft.optim.sgd(...)
    """
    for position, one in enumerate(transforms):
        if not (callable(getattr(one, "init", None)) and callable(getattr(one, "update", None))):
            raise ArgumentError(
                explain(
                    f"ft.optim.{what} wants {'transforms' if what == 'chain' else 'a transform'}.",
                    where=f"argument {position}",
                    expected="Transform(init, update)",
                    got=type(one).__name__,
                    **_way_out(what, one),
                )
            )


def _way_out(what: str, one: Any) -> dict[str, str]:
    if inspect.isfunction(one) and one.__module__.startswith(__package__):
        return {"cause": f"`{one.__name__}` makes one when it is called", "fix": f"ft.optim.{one.__name__}(...)"}
    kind = one if isinstance(one, type) else type(one)
    if issubclass(kind, torch.optim.Optimizer):
        return {"fix": f"ft.optim.from_torch(torch.optim.{kind.__name__}, lr=...)"}
    inner = "ft.optim.clip_by_global_norm(1.0), ft.optim.adamw(3e-4)" if what == "chain" else "ft.optim.adamw(3e-4)"
    return {"fix": f"ft.optim.{what}({inner})"}


def takes_value_fn(tx: Transform) -> bool:
    """Whether a transform evaluates the loss again, see `ftrain.types.UpdateFn`.

    >>> import ftrain as ft
    >>> from ftrain.optim.transform import takes_value_fn
    >>> takes_value_fn(ft.optim.sgd(0.1))
    False
    """
    if (
        torch.compiler.is_compiling()
    ):  # dynamo (2.13) cannot take the signature of a function that was made in a trace (`inject`)
        code = getattr(tx.update, "__code__", None)
        if code is not None:
            return "value_fn" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return "value_fn" in inspect.signature(tx.update).parameters


def forwarding(init: InitFn, run: Callable[[Any, Any, Any, dict[str, Any]], tuple[Any, Any]], *inner: Any) -> Transform:
    """A transform around others, which takes a `value_fn` if one of them does.

    Args:
        init: as of the transform.
        run: `run(grads, state, params, more)`, of which `more` is `{}` or `{"value_fn": value_fn}`, for those inner ones that want it.
        *inner: the others.

    >>> import ftrain as ft
    >>> from ftrain.optim.transform import forwarding
    >>> inner = ft.optim.sgd(0.1)
    >>> tx = forwarding(
    ...     inner.init, lambda grads, state, params, more: inner.update(grads, state, params, **more), inner
    ... )
    """
    if not any(takes_value_fn(one) for one in inner):
        return Transform(init, lambda grads, state, params, /: run(grads, state, params, {}))

    def update(grads: Any, state: Any, params: Any, /, *, value_fn: ValueFn | None = None) -> tuple[Any, Any]:
        return run(grads, state, params, {} if value_fn is None else {"value_fn": value_fn})

    return Transform(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """`params + updates`, leaf by leaf, in the dtype of the parameters.

    >>> import torch, ftrain as ft
    >>> ft.optim.apply_updates({"w": torch.ones(2)}, {"w": torch.ones(2)})
    {'w': tensor([2., 2.])}
    """
    return over(lambda p, u: p + u, params, updates)


class CountState(NamedTuple):
    """State of a transform that keeps nothing but the time. `count`: int64 (), updates made."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax


def new_count(params: Any) -> Tensor:
    """A count of updates, zero, on the device of the parameters: int64 ()."""
    found = tree.tensors(params)
    return torch.zeros((), dtype=torch.int64, device=found[0].device if found else None)


def is_schedule(value: object) -> bool:
    """Whether a hyper-parameter is a function of the step rather than a number."""
    return getattr(value, "is_schedule", False) is True


def value_at(hyper: float | Tensor | Schedule, count: Tensor) -> float | Tensor:
    """A hyper-parameter at this update: schedules are called with the count, numbers and tensors stand for themselves.

    A tensor comes in float64, so that products of hyper-parameters are not rounded before they meet the leaves.
    """
    if isinstance(hyper, (int, float)):
        return hyper
    value = hyper if isinstance(hyper, Tensor) else hyper(count)
    if not isinstance(value, Tensor):
        raise ArgumentError(
            explain(
                "a schedule did not give a tensor.",
                where=getattr(hyper, "__name__", type(hyper).__name__),
                expected="a 0-d tensor, computed from the tensor of the step without a look at its value",
                got=type(value).__name__,
                cause="a number that was chosen by `if step < ...`, which would be read on the host at every update",
                fix="lambda step: torch.where(step < 100, 0.1, 0.01)   # or ft.schedules.piecewise_constant(0.1, {100: 0.1})",
            )
        )
    return value.to(torch.float64)


def nonnegative(**hyper: Any) -> None:
    """Raise unless each hyper-parameter that is a plain number is at least 0.

    >>> from ftrain.optim.transform import nonnegative
    >>> nonnegative(lr=-1.0)
    Traceback (most recent call last):
    ftrain.errors.LimitError: lr=-1.0 is negative.
      expected: a number >= 0, a 0-d tensor or a schedule
      got:      -1.0
      fix:      lr=1.0
    """
    for name, value in hyper.items():
        vector = isinstance(value, Tensor) and value.ndim > 0
        if vector or isinstance(value, bool) or not (isinstance(value, (int, float, Tensor)) or callable(value)):
            raise ArgumentError(
                explain(
                    f"{name}={value!r} is not a hyper-parameter.",
                    expected="a number >= 0, a 0-d tensor or a schedule",
                    got=type(value).__name__,
                    fix=f"{name}=0.001",
                )
            )
        if isinstance(value, (int, float)) and not value >= 0:
            shown = 0.001 if math.isnan(value) else abs(value)
            raise LimitError(
                explain(
                    f"{name}={value!r} is negative." if value < 0 else f"{name}={value!r} is not a number.",
                    expected="a number >= 0, a 0-d tensor or a schedule",
                    got=repr(value),
                    fix=f"{name}={shown!r}",
                )
            )
