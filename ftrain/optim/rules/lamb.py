"""LAMB: Adam with a trust ratio for each parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...types import Schedule, Transform
from ..lists import leafwise, lerp, over, where
from ..masks import Mask, put, resolve, take
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import fractions, is_zero, no_complex

__all__ = ["LambState", "lamb"]


class LambState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `mu`, `nu`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any
    nu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def lamb(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float | Tensor | Schedule = 1e-6,
    eps_root: float | Tensor | Schedule = 0.0,
    weight_decay: float | Tensor | Schedule = 0.0,
    mask: Mask | None = None,
) -> Transform:
    """Adam for large batches, as `optax.lamb`: each parameter moves by `lr` times its own norm.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `mu = b1 mu + (1 - b1) g`;
    `nu = b2 nu + (1 - b2) g^2`; `u = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps) + weight_decay * p`;
    `p -= lr * |p| / |u| * u`, with the 2-norms of the whole parameter, and without their ratio where one of them is 0.

    Args:
        lr: learning rate: the length of a step in units of the parameter's norm.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        eps_root: added under the root.
        weight_decay: strength of the decay, which takes part in the norm of the update.
        mask: which parameters decay: a pattern (`"*.weight"`), several, a predicate `(path, parameter) -> bool` such as
            `ft.optim.no_bias_or_norm`, or a tree of bools. Default: all.

    Raises:
        LimitError: a negative hyper-parameter, or `b1`, `b2` not below 1.
        ModelError: from `init`, a complex parameter, or a mask that does not fit the parameters.

    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.lamb(0.1)
    >>> params = {"w": torch.tensor([3.0, 4.0])}
    >>> updates, _ = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"], updates["w"].norm()
    (tensor([-0.3536, -0.3536]), tensor(0.5000))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, eps_root=eps_root, weight_decay=weight_decay)
    fractions(b1=b1, b2=b2)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> LambState:
        no_complex("lamb", params)
        if mask is not None:
            resolve(mask, params, "lamb: mask")
        count = new_count(params)
        mu, nu = (tree.map(torch.zeros_like, params) for _ in range(2))
        return LambState(count, lr_leaf(lr, count), mu, nu)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, under, decay = (
            value_at(h, state.count) for h in (lr, b1, b2, eps, eps_root, weight_decay)
        )
        count = state.count + 1
        t = count.to(torch.float64)

        def adam(g: Any, p: Any, mu: Any, nu: Any, bias1: Any, bias2: Any, under: Any, decay: Any) -> tuple[Any, ...]:
            mu = lerp(mu, g, 1.0 - beta1)
            nu = lerp(nu, g * g, 1.0 - beta2)
            second = nu / bias2
            root = (second if is_zero(eps_root) else second + under).sqrt()
            u = mu / bias1 / (root + epsilon)
            return (u + p * decay if decays and mask is None else u), mu, nu

        def trust(u: Any, p: Any, rate: Any) -> Any:
            size, length = leafwise(torch.linalg.vector_norm, p), leafwise(torch.linalg.vector_norm, u)
            ratio = size / length
            # scale: to the norm of the parameter, but a parameter that is zero, or does not move, keeps its update
            ratio = where(size > 0.0, where(length > 0.0, ratio, 1.0), 1.0)
            return u * ratio * -rate

        biases = (1.0 - beta1**t, 1.0 - beta2**t)
        raw, mu, nu = over(adam, grads, params, state.mu, state.nu, scalars=(*biases, under, decay))
        if decays and mask is not None:
            chosen = resolve(mask, params, "lamb: mask")
            decayed = over(lambda u, p, s: u + p * s, take(raw, chosen), take(params, chosen), scalars=(decay,))
            raw = put(raw, decayed)
        updates = over(trust, raw, params, scalars=(rate,))
        return updates, LambState(count, lr_at(rate, state.lr), mu, nu)

    return Transform(init, update)
