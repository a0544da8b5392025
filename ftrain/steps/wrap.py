"""What wrappers have in common: they hand on what the function inside them carries.

- A loss-level wrapper keeps `scope`, and `outer`, with which the grad level tells a foreign parameter by its name.
- A grad-level wrapper keeps `states`, the sub-states that wrappers inside it keep in `state.extra`, and `guards`, the names of
  those whose `finite` decides whether an update is made.

A wrapper that is a plain function keeps them with `functools.wraps(inner)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor, nn

from ..errors import ArgumentError, LimitError, StateError, explain
from ..state import TrainState
from ..types import GradFn, LossFn, Params, Transform

__all__ = ["GradWrapper", "LossWrapper", "check_level", "check_name", "step_result"]

_LEVELS = {
    "loss": (4, "(params, buffers, batch, rng) -> (loss, (metrics, buffers)), with a scope", "ft.bind(model, loss_fn)"),
    "grad": (
        4,
        "(params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))",
        "ft.value_and_grad(ft.bind(model, loss_fn))",
    ),
    "step": (2, "(state, batch) -> (state, metrics)", "ft.train_step(model, loss_fn, tx)"),
}


def check_level(fn: object, level: Literal["loss", "grad", "step"], what: str) -> None:
    """Raise unless a function can be of this level, as far as its form tells before it is called.

    Raises:
        ArgumentError: it is of another level, or no function.

    >>> import torch, ftrain as ft
    >>> from ftrain.steps.wrap import check_level
    >>> check_level(ft.bind(torch.nn.Linear(1, 1), lambda model, batch: model(batch).mean()), "grad", "ft.with_sam")
    Traceback (most recent call last):
    ftrain.errors.ArgumentError: ft.with_sam wants a function of the grad level.
      expected: (params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))
      got:      one of the loss level, bind(Linear, <lambda>)
      fix:      ft.with_sam(ft.value_and_grad(ft.bind(model, loss_fn)))
    """
    count, expected, made = _LEVELS[level]
    scoped = hasattr(fn, "scope")
    right = callable(fn) and not isinstance(fn, nn.Module) and scoped == (level == "loss") and _takes(fn, count)
    if right:
        return
    raise ArgumentError(
        explain(
            f"{what} wants a function of the {level} level.",
            expected=expected,
            got=_described(fn),
            cause="a wrapper of the loss that is a plain function has to keep its scope: functools.wraps(inner)"
            if level == "loss" and callable(fn) and not isinstance(fn, nn.Module) and _takes(fn, count)
            else None,
            fix=f"{what}({made})",
        )
    )


def check_name(name: object, what: str) -> None:
    """Raise unless this can be the name of a sub-state.

    >>> from ftrain.steps.wrap import check_name
    >>> check_name("ema", "ft.with_ema")
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(
            explain(
                f"{what}: name={name!r} is no name.",
                expected="a str, the key in state.extra",
                got=type(name).__name__,
                fix='name="ema"',
            )
        )


def step_result(out: Any, what: str) -> tuple[TrainState, Any]:
    """What a step gave, if it is `(state, metrics)`.

    >>> from ftrain.steps.wrap import step_result
    >>> step_result({"loss": 1.0}, "ft.loop")
    Traceback (most recent call last):
    ftrain.errors.StateError: the step did not return (state, metrics).
      where:    ft.loop
      expected: (TrainState, dict of metrics)
      got:      dict
      fix:      return state.replace(params=params), {"loss": loss}
    """
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState):
        return out
    raise StateError(
        explain(
            "the step did not return (state, metrics).",
            where=what,
            expected="(TrainState, dict of metrics)",
            got=f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__,
            fix='return state.replace(params=params), {"loss": loss}',
        )
    )


def _takes(fn: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(fn).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a callable without a signature, as some in C
        return True
    return True


def _described(fn: object) -> str:
    if isinstance(fn, nn.Module):
        return f"a module, {type(fn).__name__}"
    if isinstance(fn, Transform):
        return "an optimizer (a Transform)"
    if not callable(fn):
        return type(fn).__name__
    name = str(getattr(fn, "__name__", None) or repr(fn))
    if hasattr(fn, "scope"):
        return f"one of the loss level, {name}"
    if _takes(fn, 4):
        return f"one of the grad level, {name}"
    return f"a function of two arguments, {name}" if _takes(fn, 2) else name


class LossWrapper:
    """Base of the loss-level wrappers."""

    made_by = "a wrapper of the loss"

    def __init__(self, inner: LossFn) -> None:
        check_level(inner, "loss", self.made_by)
        self.inner = inner

    def scope(self, params: Params, buffers: Params) -> AbstractContextManager[Any]:
        """The scope of the function inside."""
        return self.inner.scope(params, buffers)

    def outer(self, tensor: Tensor) -> str | None:
        """The name that a tensor has in the module outside, if it is one of its parameters."""
        found = getattr(self.inner, "outer", None)
        return None if found is None else found(tensor)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


class GradWrapper:
    """Base of the grad-level wrappers."""

    made_by = "a wrapper of the gradient"

    def __init__(self, inner: GradFn) -> None:
        check_level(inner, "grad", self.made_by)
        self.inner = inner
        self.states: Mapping[str, Callable[[Params], Any]] = dict(getattr(inner, "states", {}))
        self.guards: tuple[str, ...] = tuple(getattr(inner, "guards", ()))

    def refuse_guards(self) -> None:
        """Raise where a guard stands inside of a wrapper that calls it several times: only its last word would count.

        Raises:
            LimitError: with the right order.
        """
        if self.guards:
            raise LimitError(
                explain(
                    f"{self.made_by} stands inside of ft.with_loss_scale, not around it.",
                    expected=f"ft.with_loss_scale({self.made_by}(grad))",
                    got=f"{self.made_by}(ft.with_loss_scale(grad))",
                    cause="a part that overflows, and others that do not, would make an update with inf or NaN",
                    fix=f"grad = ft.with_loss_scale({self.made_by}(grad))",
                )
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"
