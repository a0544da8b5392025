"""Rprop: resilient backpropagation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, explain
from ...types import Schedule, Transform
from ..lists import maximum, minimum, over, where
from ..report import lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import at_the_start, filled, no_complex

__all__ = ["RpropState", "rprop"]


class RpropState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), the first step size; `prev`, `step_size`: like the parameters.

    `prev` is the gradient before, with zeros where the step was taken back.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    prev: Any
    step_size: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def rprop(
    lr: float | Tensor,
    eta_minus: float | Tensor | Schedule = 0.5,
    eta_plus: float | Tensor | Schedule = 1.2,
    min_step_size: float | Tensor | Schedule = 1e-6,
    max_step_size: float | Tensor | Schedule = 50.0,
    maximize: bool = False,
) -> Transform:
    """A step size for each element, by the signs of its gradients alone, as `torch.optim.Rprop`. For whole batches.

    Update, with g the gradient, p the parameter, s the step size (`lr` at the start), within its limits, and `prev` the g before:
    `s = eta_plus s` where `g prev > 0`; `s = eta_minus s` and `g = 0` where `g prev < 0`; `p -= sign(g) s`.

    Args:
        lr: the first step size, in units of the parameters; without influence after `init`, hence no schedule.
        eta_minus: factor of the step size after a change of sign.
        eta_plus: factor of the step size after the same sign.
        min_step_size: the smallest step size.
        max_step_size: the largest step size.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, not `0 < eta_minus < 1 < eta_plus`, or a schedule as `lr`.

    Source: Riedmiller & Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", ICNN 1993.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.rprop(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.tensor([5.0, -3.0])}, tx.init(params), params)
    >>> again, state = tx.update({"w": torch.tensor([5.0, 3.0])}, state, params)
    >>> updates["w"], again["w"]
    (tensor([-0.1000,  0.1000]), tensor([-0.1200, -0.0000]))
    """
    nonnegative(eta_minus=eta_minus, eta_plus=eta_plus, min_step_size=min_step_size, max_step_size=max_step_size)
    at_the_start(lr=lr)
    _check_factors(eta_minus, eta_plus)

    def init(params: Any, /) -> RpropState:
        no_complex("rprop", params)
        count = new_count(params)
        return RpropState(count, lr_leaf(lr, count), tree.map(torch.zeros_like, params), filled(params, lr))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        hypers = (eta_minus, eta_plus, min_step_size, max_step_size)

        def rule(g: Any, prev: Any, s: Any, less: Any, more: Any, low: Any, high: Any) -> tuple[Any, Any, Any]:
            g = -g if maximize else g
            # Of the signs, since the product of two small gradients is 0 in half precision.
            same = g.sign() * prev.sign()
            s = where(same > 0.0, s * more, where(same < 0.0, s * less, s))
            s = minimum(maximum(s, low), high)
            g = where(same < 0.0, 0.0, g)
            return -(g.sign() * s), g, s

        scalars = [value_at(h, state.count) for h in hypers]
        updates, prev, step_size = over(rule, grads, state.prev, state.step_size, scalars=scalars)
        return updates, RpropState(state.count + 1, state.lr.clone(), prev, step_size)

    return Transform(init, update)


def _check_factors(eta_minus: Any, eta_plus: Any) -> None:
    wrong = (isinstance(eta_minus, (int, float)) and not 0 < eta_minus < 1) or (
        isinstance(eta_plus, (int, float)) and not eta_plus > 1
    )
    if wrong:
        raise LimitError(
            explain(
                "rprop: the step sizes would not shrink and grow.",
                expected="0 < eta_minus < 1 < eta_plus",
                got=f"eta_minus={eta_minus!r}, eta_plus={eta_plus!r}",
                fix="rprop(lr, eta_minus=0.5, eta_plus=1.2)",
            )
        )
