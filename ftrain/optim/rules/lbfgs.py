"""L-BFGS as a transform.

The history is two matrices of fixed size, filled in a circle, so that the state has one form from the start. The algorithm decides
on the host, by values, how often it evaluates the loss: it runs outside of a graph, and waits for the device at each of its
iterations (see `quasi_newton.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import LimitError, explain
from ...types import Schedule, Transform, ValueFn
from ..opaque import no_value_fn, refuse_trace
from ..report import lr_at, lr_leaf
from ..transform import new_count, nonnegative, value_at
from .quasi_newton import LbfgsState, Run, Settings, flatten

__all__ = ["LbfgsState", "lbfgs"]


def lbfgs(
    lr: float | Tensor | Schedule = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
) -> Transform:
    """L-BFGS, as `torch.optim.LBFGS`; for losses without noise, on one batch.

    Update, `max_iter` times at most, with g the gradient and H the inverse Hessian that the last pairs `s = change of p`,
    `y = change of g` make of `(y s) / (y y)` times the identity (two-loop recursion): `p -= t H g`, where t is `lr` (at the very first
    iteration `min(1, 1 / |g|_1) lr`), or what the line search finds from there.

    One update evaluates the loss up to `max_eval` times through the step's `value_fn`; with `max_iter=1` and no line search it needs
    the gradient alone. The history takes `2 history_size` times the memory of the parameters, from the start.

    Args:
        lr: learning rate: the length of a step, or of the first that a line search tries.
        max_iter: iterations of an update.
        max_eval: evaluations of the loss in an update, at which it ends; default: 1.25 times `max_iter`.
        tolerance_grad: an update ends where no element of the gradient is larger.
        tolerance_change: it ends where parameters or loss change by less.
        history_size: how many pairs are kept.
        line_search_fn: `"strong_wolfe"`, or None for steps of fixed length.

    Raises:
        LimitError: a hyper-parameter out of its range, or an unknown line search.
        ModelError: an update without `value_fn` where it is needed, or a gradient that is not that of the loss, because transforms
            before this one in a chain have changed it: the search would go down on another function than it measures.

    Source: Liu & Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; for the line search Nocedal &
    Wright, "Numerical optimization", 2006, chapter 3.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.lbfgs(line_search_fn="strong_wolfe")
    >>> def value_fn(params):
    ...     return (params["w"] - 3.0).square().sum(), {"w": 2.0 * (params["w"] - 3.0)}
    >>> params = {"w": torch.zeros(2)}
    >>> updates, state = tx.update(value_fn(params)[1], tx.init(params), params, value_fn=value_fn)
    >>> updates["w"]
    tensor([3., 3.])
    """
    nonnegative(lr=lr, tolerance_grad=tolerance_grad, tolerance_change=tolerance_change)
    _check_whole(max_iter=max_iter, history_size=history_size, **({} if max_eval is None else {"max_eval": max_eval}))
    if line_search_fn not in (None, "strong_wolfe"):
        raise LimitError(
            explain(
                f"lbfgs: there is no line search {line_search_fn!r}.",
                expected='None or "strong_wolfe"',
                fix='line_search_fn="strong_wolfe"',
            )
        )
    settings = Settings(
        max_iter,
        max_iter * 5 // 4 if max_eval is None else max_eval,
        float(tolerance_grad),
        float(tolerance_change),
        history_size,
        line_search_fn is not None,
    )

    def init(params: Any, /) -> LbfgsState:
        flat = flatten(params, params)
        count = new_count(params)
        zero = flat.new_zeros(())
        return LbfgsState(
            count,
            lr_leaf(lr, count),
            torch.zeros_like(count),
            torch.zeros_like(count),
            torch.zeros_like(flat),
            torch.zeros_like(flat),
            torch.zeros_like(count, dtype=torch.float64),
            torch.ones_like(zero),
            flat.new_zeros(history_size, flat.numel()),
            flat.new_zeros(history_size, flat.numel()),
            flat.new_zeros(history_size),
        )

    def update(grads: Any, state: Any, params: Any, /, *, value_fn: ValueFn | None = None) -> tuple[Any, Any]:
        refuse_trace("L-BFGS", "reads values on the host")
        if value_fn is None and (max_iter > 1 or line_search_fn is not None):
            raise no_value_fn("ft.optim.lbfgs", "lbfgs(lr, max_iter=1)   # needs the gradient alone")
        rate = value_at(lr, state.count)
        run = Run(settings, float(rate), state, params, grads, value_fn)  # sync: L-BFGS decides on the host
        with torch.no_grad():
            updates = run.update()
        return updates, run.state(state.count + 1, lr_at(rate, state.lr))

    return Transform(init, update)


def _check_whole(**limits: int) -> None:
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LimitError(
                explain(f"lbfgs: {name}={value!r} makes no sense.", expected="an integer from 1 on", fix=f"{name}=20")
            )
