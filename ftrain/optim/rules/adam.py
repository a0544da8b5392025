"""Adam and AdamW."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import lerp, maximum, over
from ..masks import Mask, put, resolve, take
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import descent, fractions, is_zero, no_complex

__all__ = ["AdamState", "adam", "adamw"]


class AdamState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last update; `mu`, `nu`: like the parameters.

    `nu_max`: like the parameters with `amsgrad`, else `()`: no leaf at all, where None would be one to `torch.func.vmap`.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any
    nu: Any
    nu_max: Any = ()

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adam(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam, as `torch.optim.Adam`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `mu = b1 mu + (1 - b1) g'`; `nu = b2 nu + (1 - b2) g'^2`;
    `p -= lr * (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)`. With `amsgrad` the largest `nu` so far stands in place of `nu`.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient (for decoupled decay see `adamw`).
        amsgrad: divide by the largest second moment so far, which keeps one more moment.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.

    Source: Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015; Reddi, Kale & Kumar, "On the convergence of
    Adam and beyond", ICLR 2018 (AMSGrad).

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)
    >>> updates["w"], state.count
    (tensor([-0.1000]), tensor(1))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    return _adam(lr, b1, b2, eps, weight_decay, decoupled=False, mask=None, amsgrad=amsgrad, maximize=maximize)


def adamw(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-8,
    weight_decay: float | Tensor | Schedule = 1e-2,
    mask: Mask | None = None,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Transform:
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

    Update: as `adam` without its penalty, and `p -= lr * weight_decay * p` with the parameter before the update.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: strength of the decay, times the learning rate.
        mask: which parameters decay: a path pattern (`"*.weight"`), several, a predicate `(path, parameter) -> bool` such as
            `ft.optim.no_bias_or_norm`, or a tree of bools. Default: all.
        amsgrad: divide by the largest second moment so far, which keeps one more moment.
        maximize: climb instead: `-g` in place of `g`; the decay stays a decay.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.
        ModelError: from `init`, a mask that does not fit the parameters.

    Source: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adamw(0.1, weight_decay=0.5, mask=ft.optim.no_bias_or_norm)
    >>> params = {"w": torch.ones(1, 1), "b": torch.ones(1)}
    >>> grads = {"w": torch.ones(1, 1), "b": torch.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> updates["w"], updates["b"]
    (tensor([[-0.1500]]), tensor([-0.1000]))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    return _adam(lr, b1, b2, eps, weight_decay, decoupled=True, mask=mask, amsgrad=amsgrad, maximize=maximize)


def _adam(
    lr: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    weight_decay: Any,
    *,
    decoupled: bool,
    mask: Mask | None,
    amsgrad: bool,
    maximize: bool,
) -> Transform:
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> AdamState:
        if mask is not None:
            resolve(mask, params, "adamw: mask")
        no_complex("adam", params)
        count = new_count(params)
        mu, nu, *top = (tree.map(torch.zeros_like, params) for _ in range(3 if amsgrad else 2))
        return AdamState(count, lr_leaf(lr, count), mu, nu, *top)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, decay = (value_at(h, state.count) for h in (lr, b1, b2, eps, weight_decay))
        count = state.count + 1
        # float64: 1 - b2 is lost to cancellation in float32 (6e-5 of it at b2 = 0.999, t = 1).
        t = count.to(torch.float64)
        root2 = (1.0 - beta2**t).sqrt()
        size = rate / (1.0 - beta1**t)

        def rule(g: Any, p: Any, mu: Any, nu: Any, *more: Any) -> tuple[Any, ...]:
            *top, size, root2, decay, shrink = more
            g = descent(g, p, decay, decays=decays and not decoupled, maximize=maximize)
            mu = lerp(mu, g, 1.0 - beta1)
            nu = lerp(nu, g * g, 1.0 - beta2)
            top = [maximum(one, nu) for one in top]
            change = mu / ((top[0] if amsgrad else nu).sqrt() / root2 + epsilon) * -size
            return (change - p * shrink if decays and decoupled and mask is None else change), mu, nu, *top

        scalars = (size, root2, decay, rate * decay)
        moments = (state.mu, state.nu, state.nu_max) if amsgrad else (state.mu, state.nu)
        updates, *moments = over(rule, grads, params, *moments, scalars=scalars)
        if decays and decoupled and mask is not None:
            chosen = resolve(mask, params, "adamw: mask")
            shrunk = over(
                lambda u, p, s: u - p * s, take(updates, chosen), take(params, chosen), scalars=(rate * decay,)
            )
            updates = put(updates, shrunk)
        return updates, AdamState(count, lr_at(rate, state.lr), *moments)

    return Transform(init, update)
