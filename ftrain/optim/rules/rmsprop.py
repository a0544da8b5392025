"""RMSprop."""

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

__all__ = ["RmspropState", "rmsprop"]


class RmspropState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `nu`: like the parameters.

    `mu` (the mean gradient, when centered) and `momentum`: like the parameters, or `()` without.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    nu: Any
    mu: Any
    momentum: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def rmsprop(
    lr: float | Tensor | Schedule,
    decay: float | Tensor | Schedule = 0.99,
    eps: float | Tensor | Schedule = 1e-8,
    centered: bool = False,
    momentum: float | Tensor | Schedule = 0.0,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """The gradient over its root mean square, as `torch.optim.RMSprop`.

    Update, with g the gradient, p the parameter, b the momentum buffer: `g' = g + weight_decay * p`;
    `nu = decay nu + (1 - decay) g'^2`; `d = sqrt(nu) + eps`, or `d = sqrt(nu - mu^2) + eps` with
    `mu = decay mu + (1 - decay) g'` when centered; `b = momentum * b + g' / d`; `p -= lr * b`.

    Args:
        lr: learning rate.
        decay: decay of the averages (`alpha` in torch).
        eps: added to the root.
        centered: divide by the standard deviation of the gradient, which keeps its mean as well.
        momentum: 0 keeps no buffer.
        weight_decay: L2 penalty, added to the gradient.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `decay` not below 1.

    Source: Tieleman & Hinton, Coursera "Neural networks for machine learning", lecture 6.5, 2012; centered: Graves,
    "Generating sequences with recurrent neural networks", arXiv 1308.0850, 2013.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.rmsprop(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)[0]["w"]
    tensor([-1.])
    """
    nonnegative(lr=lr, decay=decay, eps=eps, momentum=momentum, weight_decay=weight_decay)
    fractions(decay=decay)
    decays, heavy = not is_zero(weight_decay), not is_zero(momentum)

    def init(params: Any, /) -> RmspropState:
        no_complex("rmsprop", params)
        count = new_count(params)
        nu, mu, buffer = (tree.map(torch.zeros_like, params) if kept else () for kept in (True, centered, heavy))
        return RmspropState(count, lr_leaf(lr, count), nu, mu, buffer)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, keep, epsilon, factor, penalty = (
            value_at(h, state.count) for h in (lr, decay, eps, momentum, weight_decay)
        )

        def rule(g: Any, p: Any, nu: Any, *more: Any) -> tuple[Any, ...]:
            *kept, rate, factor, penalty = more
            g = descent(g, p, penalty, decays=decays, maximize=maximize)
            nu = lerp(nu, g * g, 1.0 - keep)
            variance, new = nu, []
            if centered:
                mu = lerp(kept[0], g, 1.0 - keep)
                # Rounding can leave less than nothing, whose root would be NaN (in torch it is).
                variance, new = maximum(nu - mu * mu, 0.0), [mu]
            step = g / (variance.sqrt() + epsilon)
            if heavy:
                step = kept[-1] * factor + step
                new.append(step)
            return step * -rate, nu, *new

        kept = [one for one, on in ((state.mu, centered), (state.momentum, heavy)) if on]
        updates, nu, *kept = over(rule, grads, params, state.nu, *kept, scalars=(rate, factor, penalty))
        mu, buffer = kept[0] if centered else (), kept[-1] if heavy else ()
        return updates, RmspropState(state.count + 1, lr_at(rate, state.lr), nu, mu, buffer)

    return Transform(init, update)
