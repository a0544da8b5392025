"""Parameters in half precision, with updates that are not lost to rounding.

A bfloat16 number has 8 bits: an update smaller than 1/512 of its parameter vanishes when the sum is rounded to nearest. Two ways out:
a float32 copy that collects the updates (`master_weights`), or rounding up or down at random, so that the sum is right on average
(`stochastic_rounding`, without the copy). In both the inner transform works in float32: its moments are float32.

Laws
----
- After each update under `master_weights`, `params == master.to(params.dtype)` bit for bit, and the masters are what the inner
  transform makes of float32 parameters; parameters that were changed from outside take their masters with them.
- Under `stochastic_rounding` the expected new parameter is the float32 sum; a sum that bfloat16 can hold is not changed.
- Leaves of float32 and float64 are left to the inner transform as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import LimitError, ModelError, explain
from ..types import Transform
from .masks import names, put, take
from .transform import apply_updates, check_transforms, forwarding, new_count

__all__ = ["MasterState", "RoundingState", "master_weights", "stochastic_rounding"]

_HALF = (torch.bfloat16, torch.float16)


class MasterState(NamedTuple):
    """`master`: the half-precision parameters in float32, by path; `inner`: the state of the inner transform, which works on them."""

    master: dict[str, Tensor]
    inner: Any


class RoundingState(NamedTuple):
    """`count`: int64 (), updates made; `key`: int64 (), the root of the random bits; `inner`: the state of the inner transform."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    key: Tensor
    inner: Any


def master_weights(inner: Transform) -> Transform:
    """Keep a float32 copy of the parameters of half precision, let the inner transform work on it, and round it to the parameters.

    Update, with m the masters: `m += inner's update of (g, m)`; `p = round(m)`. Put it around the whole chain. A parameter
    that is not its rounded master when the update begins was changed from outside, and becomes its own master.

    Args:
        inner: any transform; it sees float32 gradients and parameters.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.master_weights(ft.optim.sgd(1e-3))
    >>> params, grads = {"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.ones(1, dtype=torch.bfloat16)}
    >>> state = tx.init(params)
    >>> for _ in range(4):  # 1 - 0.001 would be rounded to 1 again, four times
    ...     updates, state = tx.update(grads, state, params)
    ...     params = ft.optim.apply_updates(params, updates)
    >>> state.master["w"], params["w"]
    (tensor([0.9960]), tensor([0.9961], dtype=torch.bfloat16))
    """
    check_transforms("master_weights", inner)

    def init(params: Any, /) -> MasterState:
        wide = _widened(params)
        return MasterState(take(wide, _half(params)), inner.init(wide))

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        chosen = _half(params)
        small = take(params, chosen)
        old = {name: _master(state.master[name], p) for name, p in small.items()}
        updates, after = inner.update(_widened(grads), state.inner, put(params, old), **_rounded(more, params))
        new = apply_updates(old, take(updates, chosen))
        # The difference of two numbers of so few bits is exact in float32, and so is the sum that becomes the parameter.
        moved = {name: new[name].to(p.dtype).to(torch.float32) - p.to(torch.float32) for name, p in small.items()}
        return put(updates, moved), MasterState(new, after)

    return forwarding(init, update, inner)


def stochastic_rounding(inner: Transform, seed: int = 0) -> Transform:
    """Round new bfloat16 parameters up or down at random, with the probabilities that make the result right on average.

    Update, with s the float32 sum of parameter and update, between the neighbours a < b in bfloat16:
    `p = b` with probability `(s - a) / (b - a)`, else `a`. Put it around the whole chain.

    Args:
        inner: any transform; it sees float32 gradients and parameters.
        seed: the random bits are a function of it, the count of updates and the leaf's place.

    Raises:
        LimitError: a seed that is no integer.
        ModelError: from `init`, float16 parameters: their range is too small for training without masters.

    Source: Gupta et al., "Deep learning with limited numerical precision", ICML 2015; Zamirai et al., "Revisiting BFloat16
    training", 2020.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.stochastic_rounding(ft.optim.sgd(1e-3))
    >>> params, grads = {"w": torch.ones(10_000, dtype=torch.bfloat16)}, {"w": torch.ones(10_000, dtype=torch.bfloat16)}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> params = ft.optim.apply_updates(params, updates)
    >>> params["w"].unique(), abs(params["w"].double().mean() - 0.999) < 1e-4
    (tensor([0.9961, 1.0000], dtype=torch.bfloat16), tensor(True))
    """
    check_transforms("stochastic_rounding", inner)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise LimitError(
            explain(f"stochastic_rounding: {seed!r} is no seed.", expected="an integer", got=type(seed).__name__)
        )

    def init(params: Any, /) -> RoundingState:
        for path, leaf in zip(names(params), tree.leaves(params), strict=True):
            if leaf.dtype == torch.float16:
                raise ModelError(
                    explain(
                        "stochastic_rounding is for bfloat16.",
                        where=path,
                        got=tree.describe(leaf),
                        fix="ft.optim.master_weights(tx)   # for float16",
                    )
                )
        count = new_count(params)
        return RoundingState(count, torch.full_like(count, rng.fold_in_host(seed)), inner.init(_widened(params)))

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        small, wide = take(params, _half(params)), _widened(params)
        updates, after = inner.update(_widened(grads), state.inner, wide, **_rounded(more, params))
        step_key = rng.fold_in(state.key, state.count)
        sums = apply_updates(take(wide, _half(params)), take(updates, _half(params)))
        moved = {
            name: _round(sums[name], rng.fold_in(step_key, i)) - small[name].to(torch.float32)
            for i, name in enumerate(sorted(small))
        }
        return put(updates, moved), RoundingState(state.count + 1, state.key, after)

    return forwarding(init, update, inner)


def _half(params: Any) -> list[bool]:
    return [leaf.dtype in _HALF for leaf in tree.leaves(params)]


def _widened(values: Any) -> Any:
    return tree.map(lambda leaf: leaf.to(torch.float32) if leaf.dtype in _HALF else leaf, values)


def _master(master: Tensor, p: Tensor) -> Tensor:
    return torch.where(master.to(p.dtype) == p, master, p.to(torch.float32))


def _round(x: Tensor, key: Tensor) -> Tensor:
    """Float32 rounded at random to what bfloat16 can hold, as float32.

    The upper 16 bits of a float32 are a bfloat16, and the lower ones its distance from the next one: a random number of 16 bits,
    added to them, carries with just the right probability, for both signs.
    """
    noise = (rng.bits(key, tuple(x.shape)) & 0xFFFF).to(torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


def _rounded(more: dict[str, Any], params: Any) -> dict[str, Any]:
    """The `value_fn` of a transform that works in float32: the loss is that of the rounded parameters."""
    if not more:
        return {}

    def value_fn(wide: Any, /) -> tuple[Tensor, Any]:
        value, grads = more["value_fn"](tree.map(lambda w, p: w.to(p.dtype), wide, params))
        return value, _widened(grads)

    return {"value_fn": value_fn}
