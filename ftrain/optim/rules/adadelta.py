"""Adadelta."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, over
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, fractions, is_zero, no_complex

__all__ = ["AdadeltaState", "adadelta"]


class AdadeltaState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `e_g`, `e_x`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    e_g: Any
    e_x: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adadelta(
    lr: float | Tensor | Schedule = 1.0,
    rho: float | Tensor | Schedule = 0.9,
    eps: float | Tensor | Schedule = 1e-6,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """Steps in the units of the parameters, by the running size of past steps and gradients, as `torch.optim.Adadelta`.

    Update, with g the gradient and p the parameter: `g' = g + weight_decay * p`; `e_g = rho e_g + (1 - rho) g'^2`;
    `x = sqrt(e_x + eps) / sqrt(e_g + eps) * g'`; `e_x = rho e_x + (1 - rho) x^2`; `p -= lr * x`.

    Args:
        lr: factor of the step.
        rho: decay of both averages.
        eps: added under the roots; the first steps are about as large as its root.
        weight_decay: L2 penalty, added to the gradient.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `rho` not below 1.

    Source: Zeiler, "ADADELTA: An adaptive learning rate method", arXiv 1212.5701, 2012.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adadelta(eps=1e-2)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)[0]["w"]
    tensor([-0.3156])
    """
    nonnegative(lr=lr, rho=rho, eps=eps, weight_decay=weight_decay)
    fractions(rho=rho)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> AdadeltaState:
        no_complex("adadelta", params)
        count = new_count(params)
        e_g, e_x = (tree.map(torch.zeros_like, params) for _ in range(2))
        return AdadeltaState(count, lr_leaf(lr, count), e_g, e_x)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, keep, epsilon, decay = (value_at(h, state.count) for h in (lr, rho, eps, weight_decay))

        def rule(g: Any, p: Any, e_g: Any, e_x: Any, rate: Any, decay: Any) -> tuple[Any, Any, Any]:
            g = descent(g, p, decay, decays=decays, maximize=maximize)
            e_g = lerp(e_g, g * g, 1.0 - keep)
            x = (e_x + epsilon).sqrt() / (e_g + epsilon).sqrt() * g
            return x * -rate, e_g, lerp(e_x, x * x, 1.0 - keep)

        updates, e_g, e_x = over(rule, grads, params, state.e_g, state.e_x, scalars=(rate, decay))
        return updates, AdadeltaState(state.count + 1, lr_at(rate, state.lr), e_g, e_x)

    return Transform(init, update)
