"""Lion."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, over
from ..masks import Mask, put, resolve, take
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import fractions, is_zero, no_complex

__all__ = ["LionState", "lion"]


class LionState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `mu`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def lion(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.99,
    weight_decay: float | Tensor | Schedule = 1e-3,
    mask: Mask | None = None,
) -> Transform:
    """Lion: the sign of a momentum, as `optax.lion`.

    Update, with g the gradient and p the parameter: `p -= lr * (sign(b1 mu + (1 - b1) g) + weight_decay * p)`;
    then `mu = b2 mu + (1 - b2) g`.

    Every element moves by `lr`, so a good learning rate is a third to a tenth of that of AdamW, and the decay as many times larger.

    Args:
        lr: learning rate.
        b1: how much of the old momentum is in the direction.
        b2: decay of the momentum.
        weight_decay: strength of the decay, times the learning rate.
        mask: which parameters decay: a pattern (`"*.weight"`), several, a predicate `(path, parameter) -> bool` such as
            `ft.optim.no_bias_or_norm`, or a tree of bools. Default: all.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.
        ModelError: from `init`, a complex parameter, or a mask that does not fit the parameters.

    Source: Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.lion(0.1, weight_decay=0.0)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.tensor([5.0, -0.1])}, tx.init(params), params)
    >>> updates["w"], state.mu["w"]
    (tensor([-0.1000,  0.1000]), tensor([ 0.0500, -0.0010]))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> LionState:
        no_complex("lion", params)
        if mask is not None:
            resolve(mask, params, "lion: mask")
        count = new_count(params)
        return LionState(count, lr_leaf(lr, count), tree.map(torch.zeros_like, params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, decay = (value_at(h, state.count) for h in (lr, b1, b2, weight_decay))

        def rule(g: Any, p: Any, mu: Any, rate: Any, shrink: Any) -> tuple[Any, Any]:
            direction = lerp(mu, g, 1.0 - beta1).sign()
            change = direction * -rate
            return (change - p * shrink if decays and mask is None else change), lerp(mu, g, 1.0 - beta2)

        updates, mu = over(rule, grads, params, state.mu, scalars=(rate, rate * decay))
        if decays and mask is not None:
            chosen = resolve(mask, params, "lion: mask")
            shrunk = over(
                lambda u, p, s: u - p * s, take(updates, chosen), take(params, chosen), scalars=(rate * decay,)
            )
            updates = put(updates, shrunk)
        return updates, LionState(state.count + 1, lr_at(rate, state.lr), mu)

    return Transform(init, update)
