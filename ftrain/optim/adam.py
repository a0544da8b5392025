"""Adam and AdamW."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain
from ..types import Schedule, Transform
from .lists import lerp, over
from .report import lr_at, lr_leaf
from .transform import new_count, nonnegative, value_at

__all__ = ["AdamState", "adam", "adamw"]

DecayMask = str | Iterable[str] | Callable[[str, Tensor], bool]


class AdamState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float64 (), that of the last update; `mu`, `nu`: like the parameters."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    mu: Any
    nu: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adam(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor | Schedule = 0.0,
) -> Transform:
    """Adam, as `torch.optim.Adam`.

    Update, with g the gradient, p the parameter and t the update, from 1 on: `g' = g + weight_decay * p`;
    `mu = b1 mu + (1 - b1) g'`; `nu = b2 nu + (1 - b2) g'^2`;
    `p -= lr * (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps)`.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: L2 penalty, added to the gradient (for decoupled decay see `adamw`).

    Raises:
        LimitError: a negative hyper-parameter.

    Source: Kingma & Ba, "Adam: A method for stochastic optimization", ICLR 2015.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adam(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = tx.update({"w": torch.full((1,), 5.0)}, tx.init(params), params)
    >>> updates["w"], state.count
    (tensor([-0.1000]), tensor(1))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _adam(lr, b1, b2, eps, weight_decay, decoupled=False, mask=None)


def adamw(
    lr: float | Tensor | Schedule,
    b1: float | Tensor | Schedule = 0.9,
    b2: float | Tensor | Schedule = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Tensor | Schedule = 1e-2,
    mask: DecayMask | None = None,
) -> Transform:
    """Adam with decoupled weight decay, as `torch.optim.AdamW`.

    Update: as `adam` without its penalty, and `p -= lr * weight_decay * p` with the parameter before the update.

    Args:
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        weight_decay: strength of the decay, times the learning rate.
        mask: which parameters decay: a path pattern (`"*.weight"`), several, or a predicate `(path, parameter) -> bool`, e.g.
            `lambda path, p: p.ndim >= 2` to leave out biases and norms. Default: all.

    Raises:
        LimitError: a negative hyper-parameter.
        ModelError: a mask pattern that matches nothing.

    Source: Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adamw(0.1, weight_decay=0.5, mask=lambda path, p: p.ndim >= 2)
    >>> params = {"w": torch.ones(1, 1), "b": torch.ones(1)}
    >>> grads = {"w": torch.ones(1, 1), "b": torch.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> updates["w"], updates["b"]
    (tensor([[-0.1500]]), tensor([-0.1000]))
    """
    nonnegative(lr=lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _adam(lr, b1, b2, eps, weight_decay, decoupled=True, mask=mask)


def _adam(
    lr: Any, b1: Any, b2: Any, eps: Any, weight_decay: Any, *, decoupled: bool, mask: DecayMask | None
) -> Transform:
    decays = not (isinstance(weight_decay, (int, float)) and weight_decay == 0)

    def init(params: Any, /) -> AdamState:
        _decaying(mask, params)
        for path, leaf in tree.items(params, root="params"):
            if leaf.is_complex():
                raise ModelError(
                    explain(
                        "adam: complex parameters are not supported.",
                        where=path,
                        expected="a real floating dtype",
                        got=tree.describe(leaf),
                        fix="keep the real and the imaginary part as one real parameter: torch.view_as_real(parameter)",
                    )
                )
        count = new_count(params)
        zeros = [tree.map(torch.zeros_like, params) for _ in range(2)]
        return AdamState(count, lr_leaf(lr, count), *zeros)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, beta1, beta2, epsilon, decay = (value_at(h, state.count) for h in (lr, b1, b2, eps, weight_decay))
        count = state.count + 1
        # float64: 1 - b2 is lost to cancellation in float32 (6e-5 of it at b2 = 0.999, t = 1).
        t = count.to(torch.float64)
        root2 = (1.0 - beta2**t).sqrt()
        size = rate / (1.0 - beta1**t)

        def rule(
            g: Any, p: Any, mu: Any, nu: Any, size: Any, root2: Any, decay: Any, shrink: Any
        ) -> tuple[Any, Any, Any]:
            if decays and not decoupled:
                g = g + p * decay
            mu = lerp(mu, g, 1.0 - beta1)
            nu = lerp(nu, g * g, 1.0 - beta2)
            change = mu / (nu.sqrt() / root2 + epsilon) * -size
            return (change - p * shrink if decays and decoupled and mask is None else change), mu, nu

        scalars = (size, root2, decay, rate * decay)
        updates, mu, nu = over(rule, grads, params, state.mu, state.nu, scalars=scalars)
        if decays and decoupled and mask is not None:
            updates = _add_decay(updates, params, _decaying(mask, params), rate * decay)
        return updates, AdamState(count, lr_at(rate, state.lr), mu, nu)

    return Transform(init, update)


def _decaying(mask: DecayMask | None, params: Any) -> list[bool]:
    """Which leaves decay, in the order of the leaves. Known from paths and shapes alone, so constant under compile."""
    names = _names(params)
    if mask is None:
        return [True] * len(names)
    if callable(mask):
        return [bool(mask(name, leaf)) for name, leaf in zip(names, tree.leaves(params), strict=True)]
    patterns = [mask] if isinstance(mask, str) else list(mask)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                explain(
                    f"adamw: the pattern mask={pattern!r} matches no parameter.",
                    expected=f"a pattern for some of: {', '.join(names[:6])}",
                    fix='mask="*.weight"',
                )
            )
    return [any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) for name in names]


def _names(params: Any) -> list[str]:
    if isinstance(params, dict) and all(isinstance(leaf, Tensor) for leaf in params.values()):
        return sorted(params)
    return tree.paths(params, root="params")


def _add_decay(updates: Any, params: Any, decaying: list[bool], strength: Any) -> Any:
    new, old = tree.leaves(updates), tree.leaves(params)
    at = [i for i, chosen in enumerate(decaying) if chosen]
    decayed = over(lambda u, p, s: u - p * s, [new[i] for i in at], [old[i] for i in at], scalars=(strength,))
    for i, leaf in zip(at, decayed, strict=True):
        new[i] = leaf
    return tree.unflatten(tree.structure(updates), new)
