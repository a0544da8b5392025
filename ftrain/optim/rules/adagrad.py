"""Adagrad."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import Schedule, Transform
from ..lists import over
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import at_the_start, descent, filled, is_zero, no_complex

__all__ = ["AdagradState", "adagrad"]


class AdagradState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `sum_of_squares`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    sum_of_squares: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adagrad(
    lr: float | Tensor | Schedule,
    initial_accumulator_value: float | Tensor = 0.0,
    eps: float | Tensor | Schedule = 1e-10,
    lr_decay: float | Tensor | Schedule = 0.0,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """A learning rate for each element, by all of its gradients so far, as `torch.optim.Adagrad`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`; `s = s + g'^2`;
    `p -= lr / (1 + (t - 1) lr_decay) * g' / (sqrt(s) + eps)`.

    Args:
        lr: learning rate; the state shows it after its decay.
        initial_accumulator_value: s before the first update.
        eps: added to the root.
        lr_decay: how fast the learning rate falls, per update.
        weight_decay: L2 penalty, added to the gradient.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter.

    Source: Duchi, Hazan & Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 2011.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adagrad(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)
    >>> updates["w"], state.sum_of_squares["w"]
    (tensor([-0.1000]), tensor([25.]))
    """
    nonnegative(lr=lr, eps=eps, lr_decay=lr_decay, weight_decay=weight_decay)
    at_the_start(initial_accumulator_value=initial_accumulator_value)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> AdagradState:
        no_complex("adagrad", params)
        count = new_count(params)
        return AdagradState(count, lr_leaf(lr, count), filled(params, initial_accumulator_value))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, epsilon, fall, decay = (value_at(h, state.count) for h in (lr, eps, lr_decay, weight_decay))
        size = rate if is_zero(fall) else rate / (1.0 + state.count.to(torch.float64) * fall)

        def rule(g: Any, p: Any, s: Any, size: Any, decay: Any) -> tuple[Any, Any]:
            g = descent(g, p, decay, decays=decays, maximize=maximize)
            s = s + g * g
            return g / (s.sqrt() + epsilon) * -size, s

        updates, total = over(rule, grads, params, state.sum_of_squares, scalars=(size, decay))
        return updates, AdagradState(state.count + 1, lr_at(size, state.lr), total)

    return Transform(init, update)
