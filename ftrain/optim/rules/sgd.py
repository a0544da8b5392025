"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, explain
from ...types import Schedule, Transform
from ..lists import over
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, is_zero

__all__ = ["SgdState", "sgd"]


class SgdState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `momentum`: like the parameters, or `()`."""

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
    dampening: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """Stochastic gradient descent, with momentum as in `torch.optim.SGD`.

    Update, with g the gradient, p the parameter, b the momentum buffer (0 at the start):
    `g' = g + weight_decay * p`; `b = momentum * b + (1 - dampening) g'`, but `b = g'` at the first update; `p -= lr * b`, or
    `p -= lr * (g' + momentum * b)` with `nesterov`.

    Args:
        lr: learning rate.
        momentum: 0 keeps no buffer.
        nesterov: look ahead along the momentum.
        weight_decay: L2 penalty, added to the gradient.
        dampening: the part of each gradient after the first that the buffer does not take in.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, `nesterov` without momentum or with dampening, or dampening without momentum.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.sgd(0.1, momentum=0.9)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
    >>> updates["w"]
    tensor([-0.1000])
    """
    nonnegative(lr=lr, momentum=momentum, weight_decay=weight_decay, dampening=dampening)
    keeps, dampens, decays = (not is_zero(hyper) for hyper in (momentum, dampening, weight_decay))
    _check_momentum(keeps, dampens, nesterov)

    def init(params: Any, /) -> SgdState:
        count = new_count(params)
        return SgdState(count, lr_leaf(lr, count), tree.map(torch.zeros_like, params) if keeps else ())

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, mu, decay, damp = (value_at(h, state.count) for h in (lr, momentum, weight_decay, dampening))

        def plain(g: Any, p: Any, rate: Any, decay: Any) -> Any:
            return descent(g, p, decay, decays=decays, maximize=maximize) * -rate

        def heavy(g: Any, p: Any, b: Any, rate: Any, mu: Any, decay: Any, taken: Any) -> tuple[Any, Any]:
            g = descent(g, p, decay, decays=decays, maximize=maximize)
            b = b * mu + (g * taken if dampens else g)
            return (g + b * mu if nesterov else b) * -rate, b

        if keeps:
            taken = 1.0 - (state.count > 0).to(torch.float64) * damp if dampens else 1.0
            updates, buffer = over(heavy, grads, params, state.momentum, scalars=(rate, mu, decay, taken))
        else:
            updates, buffer = over(plain, grads, params, scalars=(rate, decay)), ()
        return updates, SgdState(state.count + 1, lr_at(rate, state.lr), buffer)

    return Transform(init, update)


def _check_momentum(keeps: bool, dampens: bool, nesterov: bool) -> None:
    if nesterov and not keeps:
        raise LimitError(
            explain(
                "sgd: nesterov=True needs a momentum.", got="momentum=0.0", fix="sgd(lr, momentum=0.9, nesterov=True)"
            )
        )
    if nesterov and dampens:
        raise LimitError(
            explain(
                "sgd: nesterov=True allows no dampening.",
                expected="dampening=0.0",
                cause="looking ahead supposes that the buffer takes in each gradient whole",
                fix="sgd(lr, momentum=0.9, nesterov=True)",
            )
        )
    if dampens and not keeps:
        raise LimitError(
            explain(
                "sgd: dampening needs a momentum.",
                got="momentum=0.0",
                cause="dampening acts on what the momentum buffer takes in, and there is none",
                fix="sgd(lr, momentum=0.9, dampening=0.5)",
            )
        )
