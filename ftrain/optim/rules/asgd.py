"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, over
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, is_zero, no_complex

__all__ = ["AsgdState", "asgd"]


class AsgdState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one, after its decay; `ax`: like the parameters.

    `ax` is the average of the parameters over the updates after `t0`: `state.opt.ax` is what one evaluates in the end.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    ax: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def asgd(
    lr: float | Tensor | Schedule,
    lambd: float | Tensor | Schedule = 1e-4,
    alpha: float | Tensor | Schedule = 0.75,
    t0: float | Tensor | Schedule = 1e6,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """Gradient descent with a falling learning rate that also averages the parameters, as `torch.optim.ASGD`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `eta = lr / (1 + lambd * lr * (t - 1))^alpha`; `p = (1 - lambd * eta) p - eta g'`; `ax += (p - ax) / max(1, t - 1 - t0)`.

    Args:
        lr: learning rate before its decay.
        lambd: decay of parameters and learning rate.
        alpha: power of the fall of the learning rate.
        t0: updates before the average starts; until then `ax` is the parameters themselves.
        weight_decay: L2 penalty, added to the gradient.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter.

    Source: Polyak & Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control Optim. 1992; Bottou,
    "Stochastic gradient descent tricks", 2012.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.asgd(0.1, lambd=0.0, t0=0.0)
    >>> params, grads = {"w": torch.zeros(1)}, {"w": torch.full((1,), -1.0)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(grads, state, params)
    ...     params = ft.optim.apply_updates(params, updates)
    >>> params["w"], state.ax["w"]
    (tensor([0.3000]), tensor([0.2500]))
    """
    nonnegative(lr=lr, lambd=lambd, alpha=alpha, t0=t0, weight_decay=weight_decay)
    decays, shrinks = not is_zero(weight_decay), not is_zero(lambd)

    def init(params: Any, /) -> AsgdState:
        no_complex("asgd", params)
        count = new_count(params)
        return AsgdState(count, lr_leaf(lr, count), tree.map(torch.clone, params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, lam, power, start, decay = (value_at(h, state.count) for h in (lr, lambd, alpha, t0, weight_decay))
        before = state.count.to(torch.float64)  # t - 1
        eta = rate / (1.0 + before * lam * rate) ** power
        taken = 1.0 / (before - start).clamp(min=1.0)

        def rule(g: Any, p: Any, ax: Any, eta: Any, shrink: Any, taken: Any, decay: Any) -> tuple[Any, Any]:
            g = descent(g, p, decay, decays=decays, maximize=maximize)
            change = -(g * eta + p * shrink) if shrinks else g * -eta
            return change, lerp(ax, p + change, taken)

        scalars = (eta, lam * eta, taken, decay)
        updates, average = over(rule, grads, params, state.ax, scalars=scalars)
        return updates, AsgdState(state.count + 1, lr_at(eta, state.lr), average)

    return Transform(init, update)
