"""Muon: momentum made orthogonal, for the hidden matrices of a network; AdamW for the rest."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, ModelError, explain
from ...types import Schedule, Transform
from ..groups import Partition, partition
from ..lists import leafwise, lerp, over
from ..masks import Mask, no_bias_or_norm
from ..report import lr_at, lr_leaf
from ..transform import check_transforms, new_count, nonnegative, value_at
from .adam import adamw
from .gradient import fractions, is_zero, no_complex

__all__ = ["MuonState", "muon"]

AdjustLr = Literal["original", "match_rms_adamw"]


class MuonState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one; `momentum`: like the matrices."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    momentum: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def muon(
    lr: float | Tensor | Schedule = 1e-3,
    weight_decay: float | Tensor | Schedule = 0.1,
    momentum: float | Tensor | Schedule = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float | Tensor | Schedule = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: AdjustLr | None = None,
    *,
    mask: Mask | None = None,
    rest: Transform | None = None,
) -> Partition:
    """Muon, as `torch.optim.Muon`, for the matrices, and another optimizer for all other parameters.

    Update, with G the gradient and P the parameter of shape (m, n): `B = momentum B + (1 - momentum) G`;
    `X = momentum B + (1 - momentum) G` again with `nesterov`, else `X = B`; then in bfloat16 `X /= max(|X|, eps)` and
    `ns_steps` times `A = X X'`, `X = a X + (b A + c A A) X`, which brings all singular values near 1;
    `P -= lr * (weight_decay * P + s X)`, with `s = sqrt(max(1, m / n))`.

    Embeddings and the output layer are matrices too, but do better with AdamW; shapes do not tell them, so name the matrices:
    `mask="blocks.*.weight"`.

    Args:
        lr: learning rate.
        weight_decay: strength of the decay, times the learning rate.
        momentum: decay of the momentum.
        nesterov: look ahead along the momentum.
        ns_coefficients: `(a, b, c)` of the iteration (Newton and Schulz's).
        eps: the smallest norm that is divided by.
        ns_steps: how many iterations.
        adjust_lr_fn: `"original"` (None), as above; `"match_rms_adamw"`: `s = 0.2 sqrt(max(m, n))`, with which learning rate and
            decay that suit AdamW suit Muon.
        mask: which parameters Muon takes, as a pattern, several, a predicate `(path, parameter) -> bool` or a tree of bools.
            Default: those with two dimensions.
        rest: the optimizer of the others. Default: `adamw(lr, weight_decay=weight_decay, mask=no_bias_or_norm)`.

    Returns:
        A `Partition` with the labels `muon` and `adamw`, so that the learning rates are the metrics `lr/muon` and `lr/adamw`.

    Raises:
        LimitError: a hyper-parameter out of its range.
        ModelError: from `init`, a mask that fits nothing or takes something that is no matrix.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is scalable for LLM
    training", 2025 (`match_rms_adamw`).

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.muon(0.02, weight_decay=0.0, rest=ft.optim.adamw(1e-3))
    >>> params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    >>> updates, state = tx.update({"w": torch.eye(2), "b": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"].diagonal().abs() > 0.01, sorted(ft.optim.metrics(state))
    (tensor([True, True]), ['lr/adamw', 'lr/muon'])
    """
    nonnegative(lr=lr, weight_decay=weight_decay, momentum=momentum, eps=eps)
    fractions(momentum=momentum)
    _check(ns_coefficients, ns_steps, adjust_lr_fn)
    if rest is None:
        rest = adamw(lr, weight_decay=weight_decay, mask=no_bias_or_norm)
    check_transforms("muon: rest=", rest)
    own = _muon(lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn)
    return partition(_labels(mask), {"muon": own, "adamw": rest}, allow_empty=True)


def _muon(
    lr: Any, weight_decay: Any, momentum: Any, nesterov: bool, ns: Any, eps: Any, steps: int, adjust: AdjustLr | None
) -> Transform:
    """Muon for a tree of nothing but matrices."""
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> MuonState:
        no_complex("muon", params)
        for path, leaf in tree.items(params, root="params"):
            if leaf.ndim != 2:
                raise ModelError(
                    explain(
                        "muon: its mask takes a parameter that is no matrix.",
                        where=path,
                        expected="two dimensions",
                        got=tree.describe(leaf),
                        fix="mask=lambda path, p: p.ndim == 2 and ...",
                    )
                )
        count = new_count(params)
        return MuonState(count, lr_leaf(lr, count), tree.map(torch.zeros_like, params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, mu, decay, floor = (value_at(h, state.count) for h in (lr, momentum, weight_decay, eps))

        def direction(x: Tensor) -> Tensor:
            # scale: longer steps for tall matrices, see `adjust_lr_fn`
            return _orthogonal(x, ns, floor, steps).to(x.dtype) * _factor(x, adjust)

        def rule(g: Any, p: Any, b: Any, rate: Any, shrink: Any) -> tuple[Any, Any]:
            b = lerp(b, g, 1.0 - mu)
            change = leafwise(direction, lerp(g, b, mu) if nesterov else b) * -rate
            return (change - p * shrink if decays else change), b

        updates, new = over(rule, grads, params, state.momentum, scalars=(rate, rate * decay))
        return updates, MuonState(state.count + 1, lr_at(rate, state.lr), new)

    return Transform(init, update)


def _orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], eps: Any, steps: int) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: bfloat16, of the same shape."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x  # the products below are of the smaller side
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _factor(matrix: Tensor, adjust: AdjustLr | None) -> float:
    rows, columns = matrix.shape
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _labels(mask: Mask | None) -> Any:
    """The mask in the language of `partition`."""
    if mask is None:
        return lambda path, leaf: "muon" if leaf.ndim == 2 else "adamw"
    if isinstance(mask, str) or (isinstance(mask, (list, tuple)) and all(isinstance(one, str) for one in mask)):
        # "**" matches all that "*" does, and leaves "*" to the user.
        return {**dict.fromkeys([mask] if isinstance(mask, str) else mask, "muon"), "**": "adamw"}
    if callable(mask):
        return lambda path, leaf: "muon" if mask(path, leaf) else "adamw"
    return tree.map(lambda chosen: "muon" if chosen is True else "adamw", mask)


def _check(ns_coefficients: Any, ns_steps: Any, adjust_lr_fn: Any) -> None:
    if len(ns_coefficients) != 3:
        raise LimitError(
            explain(
                "muon: the iteration has three coefficients.",
                expected="(a, b, c)",
                got=repr(ns_coefficients),
                fix="ns_coefficients=(3.4445, -4.7750, 2.0315)",
            )
        )
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 0 <= ns_steps < 100:
        raise LimitError(
            explain(
                f"muon: ns_steps={ns_steps!r} makes no sense.", expected="an integer from 0 to 99", fix="ns_steps=5"
            )
        )
    if adjust_lr_fn is not None and adjust_lr_fn not in get_args(AdjustLr):
        raise LimitError(
            explain(
                f"muon: there is no adjust_lr_fn={adjust_lr_fn!r}.",
                expected=", ".join(map(repr, (None, *get_args(AdjustLr)))),
                fix='adjust_lr_fn="match_rms_adamw"',
            )
        )
