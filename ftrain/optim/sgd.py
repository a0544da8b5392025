"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import LimitError, explain
from ..types import Schedule, Transform
from .lists import over
from .report import lr_at, lr_leaf
from .transform import new_count, nonnegative, value_at

__all__ = ["SgdState", "sgd"]


class SgdState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float64 (), that of the last one; `momentum`: like the parameters, or None without."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    momentum: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def sgd(
    lr: float | Tensor | Schedule,
    momentum: float | Tensor | Schedule = 0.0,
    nesterov: bool = False,
    weight_decay: float | Tensor | Schedule = 0.0,
) -> Transform:
    """Stochastic gradient descent, with momentum as in `torch.optim.SGD` (without dampening).

    Update, with g the gradient, p the parameter, b the momentum buffer (0 at the start):
    `g' = g + weight_decay * p`; `b = momentum * b + g'`; `p -= lr * b`, or `p -= lr * (g' + momentum * b)` with `nesterov`.

    Args:
        lr: learning rate.
        momentum: 0 keeps no buffer.
        nesterov: look ahead along the momentum.
        weight_decay: L2 penalty, added to the gradient.

    Raises:
        LimitError: a negative hyper-parameter, or `nesterov` without momentum.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.sgd(0.1, momentum=0.9)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
    >>> updates["w"]
    tensor([-0.1000])
    """
    nonnegative(lr=lr, momentum=momentum, weight_decay=weight_decay)
    keeps = not _is_zero(momentum)
    if nesterov and not keeps:
        raise LimitError(
            explain(
                "sgd: nesterov=True needs a momentum.", got="momentum=0.0", fix="sgd(lr, momentum=0.9, nesterov=True)"
            )
        )

    def init(params: Any, /) -> SgdState:
        count = new_count(params)
        return SgdState(count, lr_leaf(lr, count), tree.map(torch.zeros_like, params) if keeps else None)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        scalars = [value_at(h, state.count) for h in (lr, momentum, weight_decay)]

        def plain(g: Any, p: Any, rate: Any, mu: Any, decay: Any) -> Any:
            return (g if _is_zero(weight_decay) else g + p * decay) * -rate

        def heavy(g: Any, p: Any, b: Any, rate: Any, mu: Any, decay: Any) -> tuple[Any, Any]:
            g = g if _is_zero(weight_decay) else g + p * decay
            b = b * mu + g
            return (g + b * mu if nesterov else b) * -rate, b

        if keeps:
            updates, buffer = over(heavy, grads, params, state.momentum, scalars=scalars)
        else:
            updates, buffer = over(plain, grads, params, scalars=scalars), None
        return updates, SgdState(state.count + 1, lr_at(scalars[0], state.lr), buffer)

    return Transform(init, update)


def _is_zero(hyper: object) -> bool:
    return isinstance(hyper, (int, float)) and hyper == 0
