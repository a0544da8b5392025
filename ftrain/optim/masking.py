"""Transforms for some of the leaves, or for some of the time.

Laws
----
- `masked(tx, everything)` is `tx`, and `masked(tx, nothing)` is `identity()`, as far as the updates go.
- After `freeze(mask)` in a chain the chosen leaves stay bit for bit as they are.
- `conditionally_mask(tx, fn)` where `fn` always holds is `tx`; where it holds from step n on, `tx` begins at step n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain
from ..types import Transform
from .guard import select
from .masks import Mask, put, resolve, take
from .transform import check_transforms, forwarding, new_count

__all__ = ["ConditionState", "conditionally_mask", "freeze", "masked", "part_of", "set_to_zero"]


def masked(inner: Transform, mask: Mask) -> Transform:
    """Apply a transform to the chosen leaves alone; the gradients of the others pass through as they are.

    To keep the others from moving, freeze them (`freeze`), or give them no transform of their own (`partition`).

    Args:
        inner: what works on the chosen leaves, which it sees as a flat dict by path. Its state is the state of the whole.
        mask: path pattern(s), a predicate `(path, leaf) -> bool`, or a tree of bools.

    Raises:
        ModelError: from `init`, a mask that does not fit the parameters.

    Source: `optax.masked`.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.chain(ft.optim.masked(ft.optim.add_decayed_weights(0.5), "*.weight"), ft.optim.sgd(1.0))
    >>> params = {"a.weight": torch.ones(1), "a.bias": torch.ones(1)}
    >>> tx.update({"a.weight": torch.zeros(1), "a.bias": torch.zeros(1)}, tx.init(params), params)[0]
    {'a.weight': tensor([-0.5000]), 'a.bias': tensor([-0.])}
    """
    check_transforms("masked", inner)

    def init(params: Any, /) -> Any:
        part = take(params, resolve(mask, params, "masked: mask"))
        return inner.init(part) if part else ()

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        chosen = resolve(mask, params, "masked: mask")
        if not any(chosen):
            return grads, state
        updates, state = inner.update(take(grads, chosen), state, take(params, chosen), **part_of(more, params, chosen))
        return put(grads, updates), state

    return forwarding(init, update, inner)


def part_of(more: dict[str, Any], params: Any, chosen: list[bool]) -> dict[str, Any]:
    """A `value_fn` for some of the leaves, made from one for all: the others stay where they are.

    >>> import torch
    >>> from ftrain.optim.masking import part_of
    >>> more = {"value_fn": lambda params: (params["a"] + params["b"], params)}
    >>> part_of(more, {"a": torch.ones(()), "b": torch.ones(())}, [False, True])["value_fn"]({"b": torch.zeros(())})
    (tensor(1.), {'b': tensor(0.)})
    """
    if not more:
        return {}

    def value_fn(part: Any, /) -> tuple[Tensor, Any]:
        value, grads = more["value_fn"](put(params, part))
        return value, take(grads, chosen)

    return {"value_fn": value_fn}


def set_to_zero() -> Transform:
    """Updates of zero, whatever the gradients: for a group of `partition` that is to stand still.

    The zero is -0.0 here as in all that holds parameters still: x + (-0.0) is x for every x, while -0.0 + 0.0 is 0.0.

    >>> import torch, ftrain as ft
    >>> ft.optim.set_to_zero().update({"w": torch.ones(2)}, (), {"w": torch.ones(2)})
    ({'w': tensor([-0., -0.])}, ())
    """
    return Transform(lambda params: (), lambda grads, state, params: (tree.map(_still, grads), state))


def freeze(mask: Mask) -> Transform:
    """Set the updates of the chosen leaves to zero: last in a chain, so that nothing after it moves them.

    The optimizer before it keeps a state for them all the same. Parameters that are frozen for the whole run had better be left out
    by `ft.init(..., trainable=...)`, which keeps no state and computes no gradient for them.

    Args:
        mask: path pattern(s), a predicate `(path, leaf) -> bool`, or a tree of bools: what is frozen.

    Raises:
        ModelError: from `init`, a mask that does not fit the parameters.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.chain(ft.optim.adamw(0.1), ft.optim.freeze("body.*"))
    >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
    >>> tx.update(params, tx.init(params), params)[0]
    {'body.w': tensor([-0.]), 'head.w': tensor([-0.1010])}
    """

    def init(params: Any, /) -> Any:
        resolve(mask, params, "freeze: mask")
        return ()

    def update(grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]:
        still = take(grads, resolve(mask, params, "freeze: mask"))
        return put(grads, {name: _still(leaf) for name, leaf in still.items()}), state

    return Transform(init, update)


class ConditionState(NamedTuple):
    """`count`: int64 (), updates asked for; `active`: bool (), whether the last one was made; `inner`: the state of what is masked."""

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, as in optax
    active: Tensor
    inner: Any


def conditionally_mask(inner: Transform, should_transform_fn: Callable[[Tensor], Tensor]) -> Transform:
    """Apply a transform only at steps at which a function of the count holds; at the others nothing moves and its state is held.

    In a group of `partition`, or under `masked`, this is an unfreeze schedule. The inner transform counts its own updates: its
    learning rate's warm-up begins when it is let go.

    Args:
        inner: any transform.
        should_transform_fn: of the count of updates asked for (int64, 0-d, 0 at first) to a bool, 0-d, on the device.

    Raises:
        ModelError: from `init`, a function that gives something else than one bool.

    Source: `optax.conditionally_mask`.

    >>> import torch, ftrain as ft
    >>> body = ft.optim.conditionally_mask(ft.optim.sgd(0.1), lambda t: t >= 2)
    >>> params = {"w": torch.zeros(1)}
    >>> state = body.init(params)
    >>> for _ in range(3):
    ...     updates, state = body.update({"w": torch.ones(1)}, state, params)
    ...     print(float(updates["w"]))
    -0.0
    -0.0
    -0.10000000149011612
    """
    check_transforms("conditionally_mask", inner)

    def init(params: Any, /) -> ConditionState:
        count = new_count(params)
        active = should_transform_fn(count)
        if not (isinstance(active, Tensor) and active.dtype == torch.bool and active.ndim == 0):
            raise ModelError(
                explain(
                    "conditionally_mask: should_transform_fn does not give one bool on the device.",
                    expected="bool[]",
                    got=tree.describe(active),
                    fix="conditionally_mask(tx, lambda t: t >= 1000)",
                )
            )
        return ConditionState(count, torch.zeros_like(active), inner.init(params))

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        active = should_transform_fn(state.count)
        updates, after = inner.update(grads, state.inner, params, **more)
        updates = tree.map(lambda u: torch.where(active, u, -0.0), updates)
        return updates, ConditionState(state.count + 1, active, select(active, after, state.inner))

    return forwarding(init, update, inner)


def _still(leaf: Tensor) -> Tensor:
    return torch.full_like(leaf, -0.0)
