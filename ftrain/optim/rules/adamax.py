"""Adamax."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, maximum, over
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, fractions, is_zero, no_complex

__all__ = ["AdamaxState", "adamax"]


class AdamaxState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `mu`, `nu` (the norm): like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any
    nu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adamax(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """Adam with the infinity norm in place of the second moment, as `torch.optim.Adamax`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `mu = b1 mu + (1 - b1) g'`; `nu = max(b2 nu, |g'| + eps)`; `p -= lr / (1 - b1^t) * mu / nu`.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the norm.
        eps: added to the absolute gradient.
        weight_decay: L2 penalty, added to the gradient.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.

    Source: Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015, section 7.1.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adamax(0.1)
    >>> params = {"w": torch.ones(2)}
    >>> tx.update({"w": torch.tensor([5.0, -0.2])}, tx.init(params), params)[0]["w"]
    tensor([-0.1000,  0.1000])
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> AdamaxState:
        no_complex("adamax", params)
        count = new_count(params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return AdamaxState(count, lr_leaf(lr, count), mu, nu)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, decay = (value_at(h, state.count) for h in (lr, b1, b2, eps, weight_decay))
        count = state.count + 1
        size = rate / (1.0 - beta1 ** count.to(torch.float64))

        def rule(g: Any, p: Any, mu: Any, nu: Any, size: Any, decay: Any) -> tuple[Any, Any, Any]:
            g = descent(g, p, decay, decays=decays, maximize=maximize)
            mu = lerp(mu, g, 1.0 - beta1)
            nu = maximum(nu * beta2, g.abs() + epsilon)
            return mu / nu * -size, mu, nu

        updates, mu, nu = over(rule, grads, params, state.mu, state.nu, scalars=(size, decay))
        return updates, AdamaxState(count, lr_at(rate, state.lr), mu, nu)

    return Transform(init, update)
