"""Groups of parameters that stand still until somebody lets them go, by a flag in the state.

Laws, for a group whose flag is not set
----
- Its updates are -0.0, so its parameters stay bit for bit as they are; its optimizer's state stays as `init` made it.
- Once the flag is set it moves as with a new optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..errors import ModelError, explain
from ..types import Transform
from .guard import select
from .masking import part_of
from .masks import check_patterns, matches, names, put, take
from .transform import check_transforms, forwarding, new_count

__all__ = ["FreezableState", "freezable"]


class FreezableState(NamedTuple):
    """`active`: bool () for each group, whether it trains; `groups`: their states; `rest`: the state of all other leaves."""

    active: dict[str, Tensor]
    groups: dict[str, Any]
    rest: Any


def freezable(inner: Transform, groups: str | Iterable[str], *, active: bool = False) -> Transform:
    """Give groups of leaves a state of their own and a flag that says whether they train; `ft.hooks.unfreeze` sets it.

    A frozen group has no weight decay and no moments; its gradient is computed all the same, since the flag is a value and the
    step's program is one. The optimizer of a group counts its own updates: a warm-up begins when it is let go. Where another rate
    is wanted for a group, use this in a group of `partition`. What works on all leaves together, as `clip_by_global_norm`, goes
    before it in a chain, or it works on each group alone.

    Args:
        inner: any transform; each group has one.
        groups: path patterns: a group for each, of the leaves that match it and none before it. All other leaves train always.
        active: whether the groups train at first: True for those that are to be frozen later.

    Returns:
        A transform with a `FreezableState`. `state.opt.active["body.*"]` is the flag of a group.

    Raises:
        ModelError: now, if these are no patterns; from `init`, if one matches nothing that another has not taken.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.freezable(ft.optim.sgd(0.1), ["body.*"])
    >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
    >>> state = tx.init(params)
    >>> tx.update(params, state, params)[0]
    {'body.w': tensor([-0.]), 'head.w': tensor([-0.1000])}
    >>> state = state._replace(active={"body.*": torch.tensor(True)})
    >>> tx.update(params, state, params)[0]["body.w"]
    tensor([-0.1000])
    """
    check_transforms("freezable", inner)
    patterns = (groups,) if isinstance(groups, str) else tuple(groups) if isinstance(groups, Iterable) else ()
    if not patterns or not all(isinstance(one, str) for one in patterns) or len(set(patterns)) < len(patterns):
        raise ModelError(
            explain(
                "freezable: groups= are different path patterns.",
                expected="a str, or several",
                got=repr(groups),
                fix='ft.optim.freezable(tx, ["body.*"])',
            )
        )

    def chosen(params: Any) -> dict[str | None, list[bool]]:
        """Which leaves belong to each group, and under None all others."""
        found = names(params)
        own = [next((one for one in patterns if matches(name, (one,))), None) for name in found]
        return {label: [one == label for one in own] for label in (*patterns, None)}

    def init(params: Any, /) -> FreezableState:
        check_patterns(patterns, names(params), "freezable: groups")
        flags = chosen(params)
        for label in patterns:
            if not any(flags[label]):
                raise ModelError(
                    explain(
                        f"freezable: other patterns have taken all leaves of {label!r}.",
                        expected="the narrower pattern first",
                        got=f"groups={list(patterns)!r}",
                    )
                )
        flag = torch.full_like(new_count(params), active, dtype=torch.bool)
        rest = take(params, flags[None])
        return FreezableState(
            {label: flag.clone() for label in patterns},
            {label: inner.init(take(params, flags[label])) for label in patterns},
            inner.init(rest) if rest else (),
        )

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        flags = chosen(params)
        merged: dict[str, Any] = {}
        after: dict[str | None, Any] = {None: state.rest}
        for label, own in flags.items():
            if not any(own):
                continue
            before = state.rest if label is None else state.groups[label]
            given = part_of(more, params, own)
            updates, new = inner.update(take(grads, own), before, take(params, own), **given)
            if label is not None:
                trains = state.active[label]
                # -0.0, not 0.0: x + (-0.0) is x for every x, while -0.0 + 0.0 is 0.0.
                updates = tree.map(lambda u, t=trains: torch.where(t, u, -0.0), updates)
                new = select(trains, new, before)
            merged |= updates
            after[label] = new
        groups_after = {label: after[label] for label in patterns}
        return put(grads, merged), FreezableState(dict(state.active), groups_after, after[None])

    return forwarding(init, update, inner)
