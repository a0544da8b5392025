"""Clipping of gradients.

Laws
----
- What lies within the limit comes back bit for bit.
- Norms are computed in float32 at least, in float64 where a leaf is; the gradients keep their dtypes.
- The norm that is reported is the one that the clipping needs anyway.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain
from ..types import Schedule, Transform
from .lists import maximum, minimum, norms, over, wide_dtype
from .transform import CountState, new_count, nonnegative, value_at

__all__ = ["ClipState", "adaptive_grad_clip", "clip", "clip_by_global_norm", "clip_by_norm", "global_norm"]


class ClipState(NamedTuple):
    """`count`: int64 (), updates made; `norm`: (), the global norm before the last clipping, float64 where a leaf is, else float32."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    norm: Tensor

    def metrics(self) -> dict[str, Tensor]:
        return {"grad_norm": self.norm}


def global_norm(values: Any) -> Tensor:
    """The 2-norm of all leaves together: 0-d, float64 where a leaf is, else float32.

    >>> import torch, ftrain as ft
    >>> ft.optim.global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    found = tree.leaves(values)
    if not found:
        return torch.zeros(())
    return _joined(norms(found))


def norm_dtype(params: Any) -> torch.dtype:
    """In what a norm over these leaves is kept: float64 where a leaf is, else float32.

    >>> import torch
    >>> from ftrain.optim.clipping import norm_dtype
    >>> norm_dtype({"w": torch.ones(1, dtype=torch.bfloat16)})
    torch.float32
    """
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(leaf.dtype in wide for leaf in tree.tensors(params)) else torch.float32


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

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        norm = global_norm(grads)
        limit: Any = value_at(max_norm, state.count)
        # scale: the one factor by which the whole gradient shrinks
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        return over(lambda g: g * factor, grads), ClipState(state.count + 1, norm.to(state.norm.dtype))

    return Transform(_init, update)


def clip_by_norm(max_norm: float | Tensor | Schedule) -> Transform:
    """Scale the gradient of each parameter down so that its own norm is at most `max_norm`.

    Update: `g *= min(1, max_norm / (norm(g) + 1e-6))` for each parameter, as `torch.nn.utils.clip_grad_norm_` called on one
    after the other. The global norm before clipping is reported all the same.

    Args:
        max_norm: the largest norm of one parameter's gradient.

    Raises:
        LimitError: a negative norm.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.clip_by_norm(1.0)
    >>> grads = {"a": torch.tensor([30.0, 40.0]), "b": torch.tensor([0.5])}
    >>> tx.update(grads, tx.init(grads), grads)[0]
    {'a': tensor([0.6000, 0.8000]), 'b': tensor([0.5000])}
    """
    nonnegative(max_norm=max_norm)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        found = norms(tree.leaves(grads))
        if not found:
            return grads, state._replace(count=state.count + 1)
        limit: Any = value_at(max_norm, state.count)
        # scale: one factor for each parameter
        factors = tree.unflatten(tree.structure(grads), [(limit / (norm + 1e-6)).clamp(max=1.0) for norm in found])
        clipped = over(lambda g, factor: g * factor, grads, factors)
        return clipped, ClipState(state.count + 1, _joined(found).to(state.norm.dtype))

    return Transform(_init, update)


def clip(max_delta: float | Tensor | Schedule) -> Transform:
    """Clip each element: `g = min(max(g, -max_delta), max_delta)`, as `torch.nn.utils.clip_grad_value_`.

    Args:
        max_delta: the largest absolute value.

    Raises:
        LimitError: a negative value.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.clip(1.0)
    >>> grads = {"w": torch.tensor([-3.0, 0.5])}
    >>> tx.update(grads, tx.init(grads), grads)[0]["w"]
    tensor([-1.0000,  0.5000])
    """
    nonnegative(max_delta=max_delta)

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        limit = value_at(max_delta, state.count)
        clipped = over(lambda g, m: minimum(maximum(g, -m), m), grads, scalars=(limit,))
        return clipped, CountState(state.count + 1)

    return Transform(lambda params: CountState(new_count(params)), update)


def adaptive_grad_clip(
    clipping: float | Tensor | Schedule,
    eps: float | Tensor | Schedule = 1e-3,
    dim: int | tuple[int, ...] | None = None,
) -> Transform:
    """Adaptive gradient clipping: limit the norm of each unit's gradient to a fraction of the norm of its parameters.

    Update, for each unit with gradient G and parameters W: `G *= min(1, clipping * max(norm(W), eps) / max(norm(G), 1e-6))`.
    A unit is what belongs to one output: a slice along the first dimension of a weight (torch's layout), or a whole vector.

    Args:
        clipping: the largest ratio of the norms.
        eps: the smallest norm of parameters that counts, so that those that begin at zero can move.
        dim: the dimensions over which norms are taken, in place of all but the first, e.g. 0 for weights of shape (in, out).

    Raises:
        LimitError: a negative `clipping` or `eps`.
        ModelError: from `init`, a parameter that has no such dimension.

    Source: Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.adaptive_grad_clip(0.1)
    >>> params, grads = {"w": torch.ones(2, 2)}, {"w": torch.tensor([[1.0, 0.0], [0.1, 0.0]])}
    >>> tx.update(grads, tx.init(params), params)[0]["w"]
    tensor([[0.1414, 0.0000],
            [0.1000, 0.0000]])
    """
    nonnegative(clipping=clipping, eps=eps)
    dims = None if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)

    def init(params: Any, /) -> CountState:
        for path, leaf in tree.items(params, root="params"):
            wrong = [one for one in dims or () if not -leaf.ndim <= one < leaf.ndim]
            if wrong:
                raise ModelError(
                    explain(
                        f"adaptive_grad_clip: a parameter has no dimension {wrong[0]}.",
                        where=path,
                        got=tree.describe(leaf),
                        fix="ft.optim.masked(ft.optim.adaptive_grad_clip(0.01, dim=0), lambda path, p: p.ndim >= 2)",
                    )
                )
        return CountState(new_count(params))

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        ratio: Any = value_at(clipping, state.count)
        floor: Any = value_at(eps, state.count)

        def one(g: Tensor, p: Tensor) -> Tensor:
            limit = _unit_norms(p, dims).clamp(min=floor) * ratio
            norm = _unit_norms(g, dims)
            # scale: one factor for each unit
            return torch.where(norm < limit, g, g * (limit / norm.clamp(min=1e-6)).to(g.dtype))

        return tree.map(one, grads, params), CountState(state.count + 1)

    return Transform(init, update)


def _init(params: Any, /) -> ClipState:
    count = new_count(params)
    return ClipState(count, torch.zeros_like(count, dtype=norm_dtype(params)))


def _joined(found: list[Tensor]) -> Tensor:
    """The norm of all from the norms of each, in the widest of their dtypes."""
    wide = torch.float64 if any(norm.dtype == torch.float64 for norm in found) else found[0].dtype
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(wide) for norm in found]))
    return total


def _unit_norms(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """The 2-norms over these dimensions, kept as dimensions of size 1; by default all but the first, or all of a vector."""
    if dims is None:
        vector = sum(size != 1 for size in x.shape) <= 1
        dims = tuple(range(0 if vector else 1, x.ndim))
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims or None, keepdim=True, dtype=wide_dtype(x.dtype))
    return norm
