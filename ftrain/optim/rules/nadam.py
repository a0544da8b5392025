"""NAdam: Adam with Nesterov momentum."""

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

__all__ = ["NadamState", "nadam"]


class NadamState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `mu`, `nu`: like the parameters.

    `mu_product`: float64 (), the product of the momentum factors so far.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu_product: Tensor
    mu: Any
    nu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def nadam(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.0,
    momentum_decay: float | Tensor | Schedule = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with Nesterov momentum, as `torch.optim.NAdam`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `mu = b1 mu + (1 - b1) g'`; `nu = b2 nu + (1 - b2) g'^2`; with the momentum factors
    `m_t = b1 (1 - 0.96^(t * momentum_decay) / 2)` and `M_t = m_1 m_2 ... m_t`,
    `p -= lr * ((1 - m_t) / (1 - M_t) g' + m_(t+1) / (1 - M_(t+1)) mu) / (sqrt(nu / (1 - b2^t)) + eps)`.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient.
        momentum_decay: how fast the momentum factor rises from b1/2 to b1.
        decoupled_weight_decay: `p -= lr * weight_decay * p` (as in `adamw`) in place of the penalty.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.

    Source: Dozat, "Incorporating Nesterov momentum into Adam", ICLR 2016 workshop.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.nadam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)
    >>> updates["w"], state.mu_product
    (tensor([-0.1056]), tensor(0.4501, dtype=torch.float64))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, momentum_decay=momentum_decay)
    fractions(b1=b1, b2=b2)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> NadamState:
        no_complex("nadam", params)
        count = new_count(params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return NadamState(count, lr_leaf(lr, count), torch.ones_like(count, dtype=torch.float64), mu, nu)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, decay, slow = (
            value_at(h, state.count) for h in (lr, b1, b2, eps, weight_decay, momentum_decay)
        )
        count = state.count + 1
        t = count.to(torch.float64)
        root2 = (1.0 - beta2**t).sqrt()
        now, ahead = (beta1 * (1.0 - 0.5 * 0.96 ** (step * slow)) for step in (t, t + 1.0))
        product = state.mu_product * now
        of_gradient = rate * (1.0 - now) / (1.0 - product)
        of_momentum = rate * ahead / (1.0 - product * ahead)

        def rule(
            g: Any, p: Any, mu: Any, nu: Any, root2: Any, of_gradient: Any, of_momentum: Any, decay: Any, shrink: Any
        ) -> tuple[Any, Any, Any]:
            g = descent(g, p, decay, decays=decays and not decoupled_weight_decay, maximize=maximize)
            mu = lerp(mu, g, 1.0 - beta1)
            nu = lerp(nu, g * g, 1.0 - beta2)
            change = -(g * of_gradient + mu * of_momentum) / (nu.sqrt() / root2 + epsilon)
            return (change - p * shrink if decays and decoupled_weight_decay else change), mu, nu

        scalars = (root2, of_gradient, of_momentum, decay, rate * decay)
        updates, mu, nu = over(rule, grads, params, state.mu, state.nu, scalars=scalars)
        return updates, NadamState(count, lr_at(rate, state.lr), product, mu, nu)

    return Transform(init, update)
