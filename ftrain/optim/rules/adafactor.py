"""Adafactor: second moments of matrices as an outer product of two vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import tree
from ...errors import LimitError, explain
from ...types import Schedule, Transform
from ..lists import leafwise, lerp, over
from ..masks import put, take
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .gradient import is_zero, no_complex

__all__ = ["AdafactorState", "adafactor"]


class AdafactorState(NamedTuple):
    """`count`: int64 (), updates made; `lr`: float32 (), that of the last one.

    `row_var`, `col_var`: for each parameter of shape (..., m, n), by path, the second moment's means (..., m, 1) and (..., 1, n);
    `variance`: for each parameter with fewer than two dimensions, by path, its second moment.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    lr: Tensor
    row_var: dict[str, Tensor]
    col_var: dict[str, Tensor]
    variance: dict[str, Tensor]

    def metrics(self) -> dict[str, Tensor]:
        return {"lr": self.lr}


def adafactor(
    lr: float | Tensor | Schedule = 1e-2,
    beta2_decay: float | Tensor | Schedule = -0.8,
    eps: tuple[float | Tensor | Schedule | None, float | Tensor | Schedule] = (None, 1e-3),
    d: float | Tensor | Schedule = 1.0,
    weight_decay: float | Tensor | Schedule = 0.0,
    maximize: bool = False,
) -> Transform:
    """Adafactor, as `torch.optim.Adafactor`: Adam without momentum, whose memory is the square root of Adam's.

    Update, with g the gradient, p the parameter, t the update, from 1 on, and RMS the root of the mean square:
    `w = t^beta2_decay`; for a matrix `R += w (mean of g^2 over a row - R)`, `C += w (mean of g^2 over a column - C)` and
    `V = R C / max(mean(R), e1)`, for a vector `V += w (g^2 - V)`; `u = g / max(sqrt(V), e1)`;
    `p -= lr * weight_decay * p + max(e2, RMS(p)) * min(lr, 1 / sqrt(t)) * u / max(1, RMS(u) / d)`.

    Args:
        lr: the largest step, in units of RMS(p).
        beta2_decay: exponent of the second moment's decay, at most 0.
        eps: `(e1, e2)`; e1 None is the machine epsilon of the parameter's dtype.
        d: the largest RMS of `u`, at least 1.
        weight_decay: strength of the decay, times the learning rate.
        maximize: climb instead: `-g` in place of `g`.

    Raises:
        LimitError: a hyper-parameter out of its range.
        ModelError: from `init`, a complex parameter.

    Source: Shazeer & Stern, "Adafactor: adaptive learning rates with sublinear memory cost", ICML 2018.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adafactor(0.1)
    >>> params = {"w": torch.full((2, 3), 2.0), "b": torch.zeros(3)}
    >>> grads = {"w": torch.ones(2, 3), "b": torch.ones(3)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> updates["w"][0], updates["b"], state.row_var["w"].shape
    (tensor([-0.2000, -0.2000, -0.2000]), tensor([-0.0001, -0.0001, -0.0001]), torch.Size([2, 1]))
    """
    nonnegative(lr=lr, weight_decay=weight_decay)
    _check(beta2_decay, eps, d)
    decays = not is_zero(weight_decay)

    def init(params: Any, /) -> AdafactorState:
        no_complex("adafactor", params)
        count = new_count(params)
        matrices, vectors = _split(params, params)
        return AdafactorState(
            count,
            lr_leaf(lr, count),
            {name: torch.zeros_like(p[..., :1]) for name, p in matrices.items()},
            {name: torch.zeros_like(p[..., :1, :]) for name, p in matrices.items()},
            {name: torch.zeros_like(p) for name, p in vectors.items()},
        )

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        rate, power, limit, decay, e2 = (value_at(h, state.count) for h in (lr, beta2_decay, d, weight_decay, eps[1]))
        e1 = None if eps[0] is None else value_at(eps[0], state.count)
        count = state.count + 1
        t = count.to(torch.float64)
        # The largest relative step: min(lr, 1 / sqrt(t)).
        scalars = (t**power, torch.clamp(t.rsqrt(), max=rate), limit, rate * decay)

        def change(g: Tensor, p: Tensor, v: Tensor, floor: Any, rho: Any, limit: Any, shrink: Any) -> Tensor:
            u = g * v.clamp(min=floor * floor).rsqrt()
            length = torch.clamp(_rms(p), min=e2) * rho / torch.clamp(_rms(u) / limit, min=1.0)
            step: Tensor = -u * length
            if decays:
                step = step - p * shrink
            return step

        def of_matrix(
            g: Tensor, p: Tensor, row: Tensor, col: Tensor, weight: Any, rho: Any, limit: Any, shrink: Any
        ) -> tuple[Tensor, ...]:
            g, floor = -g if maximize else g, torch.finfo(p.dtype).eps if e1 is None else e1
            square = g * g
            row = lerp(row, square.mean(-1, keepdim=True), weight)
            col = lerp(col, square.mean(-2, keepdim=True), weight)
            v = row * col / row.mean(-2, keepdim=True).clamp(min=floor)
            return change(g, p, v, floor, rho, limit, shrink), row, col

        def of_vector(
            g: Tensor, p: Tensor, v: Tensor, weight: Any, rho: Any, limit: Any, shrink: Any
        ) -> tuple[Tensor, ...]:
            g, floor = -g if maximize else g, torch.finfo(p.dtype).eps if e1 is None else e1
            v = lerp(v, g * g, weight)
            return change(g, p, v, floor, rho, limit, shrink), v

        (g_matrices, g_vectors), (matrices, vectors) = _split(grads, params), _split(params, params)
        moved, row_var, col_var, variance = {}, {}, {}, {}
        if matrices:
            moved, row_var, col_var = over(
                lambda *row: leafwise(of_matrix, *row),
                g_matrices,
                matrices,
                state.row_var,
                state.col_var,
                scalars=scalars,
            )
        if vectors:
            found, variance = over(
                lambda *row: leafwise(of_vector, *row), g_vectors, vectors, state.variance, scalars=scalars
            )
            moved = {**moved, **found}
        return put(grads, moved), AdafactorState(count, lr_at(rate, state.lr), row_var, col_var, variance)

    return Transform(init, update)


def _split(values: Any, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves that are matrices, or stacks of them, and the others."""
    matrices = [leaf.ndim > 1 for leaf in tree.leaves(params)]
    return take(values, matrices), take(values, [not one for one in matrices])


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _check(beta2_decay: Any, eps: Any, d: Any) -> None:
    if isinstance(beta2_decay, (int, float)) and not beta2_decay <= 0:
        raise LimitError(
            explain(
                f"adafactor: beta2_decay={beta2_decay!r} is an exponent above 0.",
                expected="a number <= 0, a 0-d tensor or a schedule",
                got=repr(beta2_decay),
                fix="beta2_decay=-0.8",
            )
        )
    nonnegative(d=d)
    if isinstance(d, (int, float)) and not d >= 1:
        raise LimitError(explain(f"adafactor: d={d!r} is below 1.", expected="d >= 1", got=repr(d), fix="d=1.0"))
    if not (isinstance(eps, (tuple, list)) and len(eps) == 2):
        raise LimitError(
            explain("adafactor: eps is a pair.", expected="(e1, e2)", got=repr(eps), fix="eps=(None, 1e-3)")
        )
    if eps[0] is not None:
        nonnegative(e1=eps[0])
    nonnegative(e2=eps[1])
