"""RAdam: Adam with a rectified adaptive learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, over, where
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, fractions, is_zero, no_complex

__all__ = ["RadamState", "radam"]


class RadamState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `mu`, `nu`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any
    nu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def radam(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam that does not divide by the second moment while too few gradients are in it, as `torch.optim.RAdam`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `mu = b1 mu + (1 - b1) g'`; `nu = b2 nu + (1 - b2) g'^2`; `m = mu / (1 - b1^t)`. The length of the average is
    `r = R - 2 t b2^t / (1 - b2^t)` with `R = 2 / (1 - b2) - 1`. Where r > 5,
    `p -= lr * m * sqrt((r - 4)(r - 2) R / ((R - 4)(R - 2) r)) * sqrt(1 - b2^t) / (sqrt(nu) + eps)`, and `p -= lr * m` before that.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient.
        decoupled_weight_decay: `p -= lr * weight_decay * p` (as in `adamw`) in place of the penalty.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.

    Source: Liu et al., "On the variance of the adaptive learning rate and beyond", ICLR 2020.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.radam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)[0]["w"]
    tensor([-0.5000])
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> RadamState:
        no_complex("radam", params)
        count = new_count(params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return RadamState(count, lr_leaf(lr, count), mu, nu)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, decay = (value_at(h, state.count) for h in (lr, b1, b2, eps, weight_decay))
        count = state.count + 1
        t = count.to(torch.float64)
        adaptive, factor = _rectified(beta2, t)
        size = rate / (1.0 - beta1**t) * factor

        def rule(
            g: Any, p: Any, mu: Any, nu: Any, size: Any, adaptive: Any, decay: Any, shrink: Any
        ) -> tuple[Any, Any, Any]:
            g = descent(g, p, decay, decays=decays and not decoupled_weight_decay, maximize=maximize)
            mu = lerp(mu, g, 1.0 - beta1)
            nu = lerp(nu, g * g, 1.0 - beta2)
            change = mu / where(adaptive > 0.5, nu.sqrt() + epsilon, 1.0) * -size
            return (change - p * shrink if decays and decoupled_weight_decay else change), mu, nu

        # as a number: scalars go together into one buffer under compile
        scalars = (size, adaptive.to(torch.float64), decay, rate * decay)
        updates, mu, nu = over(rule, grads, params, state.mu, state.nu, scalars=scalars)
        return updates, RadamState(count, lr_at(rate, state.lr), mu, nu)

    return Transform(init, update)


def _rectified(b2: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    """Whether update t is adaptive, and the factor of its learning rate: 0-d."""
    power = b2**t
    longest = 2.0 / (1.0 - b2) - 1.0 + torch.zeros_like(t)  # a tensor, since `where` makes float32 of two numbers
    length = longest - 2.0 * t * power / (1.0 - power)
    adaptive = length > 5.0
    r = torch.where(adaptive, length, 6.0)  # no root of a negative number on the branch that is not taken
    top = torch.where(adaptive, longest, 6.0)
    rectified = ((r - 4.0) * (r - 2.0) * top / ((top - 4.0) * (top - 2.0) * r)).sqrt() * (1.0 - power).sqrt()
    return adaptive, torch.where(adaptive, rectified, 1.0)
