"""Clipping of gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..types import Schedule, Transform
from .lists import norms, over
from .transform import new_count, nonnegative, value_at

__all__ = ["ClipState", "clip_by_global_norm", "global_norm"]


class ClipState(NamedTuple):
    """`count`: int64 (), updates made; `norm`: (), the global norm before the last clipping, in the gradients' dtype."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    norm: Tensor

    def metrics(self) -> dict[str, Tensor]:
        return {"grad_norm": self.norm}


def global_norm(values: Any) -> Tensor:
    """The 2-norm of all leaves together: 0-d, in the leaves' dtype.

    >>> import torch, ftrain as ft
    >>> ft.optim.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms(tree.leaves(values))))
    return total


def norm_dtype(params: Any) -> torch.dtype:
    """In what a norm over these leaves is kept: float64 where a leaf is, else float32."""
    return torch.float64 if any(leaf.dtype == torch.float64 for leaf in tree.tensors(params)) else torch.float32


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

    def init(params: Any, /) -> ClipState:
        count = new_count(params)
        return ClipState(count, torch.zeros_like(count, dtype=norm_dtype(params)))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        norm = global_norm(grads)
        limit: Any = value_at(max_norm, state.count)
        # scale: the one factor by which the whole gradient shrinks
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        return over(lambda g: g * factor, grads), ClipState(state.count + 1, norm.to(state.norm.dtype))

    return Transform(init, update)
