"""Clipping of gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..types import Schedule, Transform
from .lists import norms, over
from .transform import new_count, nonnegative, value_at

__all__ = ["clip_by_global_norm", "global_norm"]


def global_norm(values: Any) -> Tensor:
    """The 2-norm of all leaves together: 0-d, in the leaves' dtype.

    >>> import torch, ftrain as ft
    >>> ft.optim.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms(tree.leaves(values))))
    return total


def clip_by_global_norm(max_norm: float | Tensor | Schedule) -> Transform:
    """Scale the whole gradient down so that its global norm is at most `max_norm`.

    Update: `g *= min(1, max_norm / (norm + 1e-6))`, as `torch.nn.utils.clip_grad_norm_`.

    Args:
        max_norm: the largest norm, in units of the gradient.

    Raises:
        LimitError: a negative norm.

    Source: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.clip_by_global_norm(1.0)
    >>> grads = {"w": torch.tensor([0.3, 0.4])}
    >>> tx.update(grads, tx.init(grads), grads)[0]["w"]
    tensor([0.3000, 0.4000])
    """
    nonnegative(max_norm=max_norm)
    scheduled = not isinstance(max_norm, (int, float, Tensor))

    def init(params: Any, /) -> Any:
        return (new_count(params),) if scheduled else ()

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        limit: Any = value_at(max_norm, state[0]) if scheduled else max_norm
        # scale: the one factor by which the whole gradient shrinks
        factor = (limit / (global_norm(grads) + 1e-6)).clamp(max=1.0)
        return over(lambda g: g * factor, grads), ((state[0] + 1,) if scheduled else ())

    return Transform(init, update)
