"""Steps whose gradient is not finite, skipped on the device.

Laws
----
- On finite gradients `skip_nonfinite(tx)` computes bit for bit what `tx` does.
- A run in which some gradients hold inf or NaN ends with the parameters and the inner state of the run without those batches.
- The host is never asked: what happened is counted in the state, and `ft.hooks.nonfinite` reads the counts at log points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..types import Transform
from .lists import one_by_one
from .transform import check_transforms, forwarding, new_count

__all__ = ["SkipState", "all_finite", "select", "skip_nonfinite"]


class SkipState(NamedTuple):
    """`skipped`, `consecutive`: int64 (), updates skipped in all, and the last ones in a row; `finite`: bool (); `inner`: its state.

    `finite` says whether the last gradient was.
    """

    skipped: Tensor
    consecutive: Tensor
    finite: Tensor
    inner: Any

    def metrics(self) -> dict[str, Tensor]:
        return {"skipped": self.skipped}


def skip_nonfinite(inner: Transform) -> Transform:
    """Leave out the updates whose gradient holds an inf or a NaN: nothing moves, and `inner` does not learn of it.

    Update, with f whether all gradients are finite: `updates = where(f, inner's updates, 0)`; `state = where(f, inner's, the old)`.

    Put it around the whole chain: a clipping outside of it would turn one inf into many NaN, and into its own norm.

    Args:
        inner: any transform.

    Source: Micikevicius et al., "Mixed precision training", ICLR 2018 (skipped steps).

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.skip_nonfinite(ft.optim.sgd(0.1, momentum=0.9))
    >>> params = {"w": torch.zeros(2)}
    >>> updates, state = tx.update({"w": torch.tensor([1.0, torch.inf])}, tx.init(params), params)
    >>> updates["w"], state.skipped, state.inner.momentum["w"]
    (tensor([-0., -0.]), tensor(1), tensor([0., 0.]))
    """
    check_transforms("skip_nonfinite", inner)

    def init(params: Any, /) -> SkipState:
        count = new_count(params)
        return SkipState(count, count.clone(), torch.ones_like(count, dtype=torch.bool), inner.init(params))

    def update(grads: Any, state: Any, params: Any, more: dict[str, Any]) -> tuple[Any, Any]:
        finite = all_finite(grads)
        updates, after = inner.update(grads, state.inner, params, **more)
        updates = tree.map(lambda u: torch.where(finite, u, -0.0), updates)  # x + (-0.0) is x for every x
        skipped = (~finite).to(torch.int64)
        return updates, SkipState(
            state.skipped + skipped,
            (state.consecutive + 1) * skipped,
            finite,
            select(finite, after, state.inner),
        )

    return forwarding(init, update, inner)


def all_finite(values: Any) -> Tensor:
    """Whether no floating or complex leaf holds an inf or a NaN: bool (), on their device.

    >>> import torch, ftrain as ft
    >>> ft.optim.all_finite({"w": torch.tensor([1.0, torch.nan]), "n": torch.tensor(3)})
    tensor(False)
    """
    found = tree.tensors(values)
    leaves = [leaf for leaf in found if (leaf.is_floating_point() or leaf.is_complex()) and leaf.numel()]
    if not leaves:
        return torch.ones((), dtype=torch.bool, device=found[0].device if found else None)
    if one_by_one() or any(leaf.is_complex() for leaf in leaves):
        return torch.stack([torch.isfinite(leaf).all() for leaf in leaves]).all()
    # The extremes are NaN where one of the values is. One launch for all leaves on a GPU; on a CPU, where that operation is not
    # vectorised (2.13: 20 times the time), one pass over each.
    if leaves[0].is_cuda:
        extremes = list(torch._foreach_norm(leaves, float("inf")))
    else:
        extremes = [end for leaf in leaves for end in leaf.aminmax()]
    wide = torch.float64 if any(end.dtype == torch.float64 for end in extremes) else torch.float32
    return torch.isfinite(torch.stack([end.to(wide) for end in extremes])).all()


def select(flag: Tensor, new: Any, old: Any) -> Any:
    """The tree `new` where the flag holds, else `old`, leaf by leaf: a `where` on the device.

    Args:
        flag: bool ().
        new: a tree of tensors.
        old: a tree of its structure, shapes and dtypes.

    >>> import torch, ftrain as ft
    >>> ft.optim.select(torch.tensor(False), {"n": torch.tensor(2)}, {"n": torch.tensor(1)})
    {'n': tensor(1)}
    """

    def one(a: Tensor, b: Tensor) -> Tensor:
        # Leaves that an optimizer of torch keeps on the CPU stay there, whatever device the others are on.
        own = flag if flag.device == a.device else flag.to(a.device)
        return torch.where(own, a, b)

    return tree.map(lambda a, b: a if a is b else one(a, b), new, old)
