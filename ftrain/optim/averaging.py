"""Averages of parameters over training: the arithmetic, as pure functions of trees.

Laws
----
- The first average is a copy of what is averaged; averaging a constant gives the constant.
- Where `where` is false nothing changes, bitwise. Integer leaves (counts) are copied, not averaged.
- Averages of half-precision leaves are kept in float32, since steps smaller than their last digit would be lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import tree
from .lists import over

__all__ = ["first_average", "moved_average"]


def first_average(values: Any) -> Any:
    """The average before anything was averaged: the values, in memory of their own.

    >>> import torch
    >>> from ftrain.optim.averaging import first_average
    >>> first_average({"w": torch.ones(2, dtype=torch.bfloat16)})
    {'w': tensor([1., 1.])}
    """
    return tree.map(lambda leaf: leaf.to(_kept(leaf.dtype), copy=True), values)


def moved_average(average: Any, values: Any, weight: Tensor, where: Tensor | None) -> Any:
    """`average + weight (values - average)`, for floating leaves; others are copied.

    Args:
        average: as made by `first_average`.
        values: a tree of its structure.
        weight: (), how much the new values count; 1 copies them.
        where: bool (), whether anything changes; None: it does.

    >>> import torch
    >>> from ftrain.optim.averaging import moved_average
    >>> moved_average({"w": torch.zeros(1)}, {"w": torch.ones(1)}, torch.tensor(0.25), None)
    {'w': tensor([0.2500])}
    """
    structure = tree.structure(average)
    old, new = tree.leaves(average), tree.leaves(values)
    floating = [i for i, leaf in enumerate(old) if leaf.is_floating_point()]
    moved = over(
        lambda a, v, w: a + (v - a) * w, [old[i] for i in floating], [new[i] for i in floating], scalars=(weight,)
    )
    found = [leaf.clone() for leaf in new]
    for i, leaf in zip(floating, moved, strict=True):
        found[i] = leaf
    if where is not None:
        found = [torch.where(where, one, before) for one, before in zip(found, old, strict=True)]
    return tree.unflatten(structure, found)


def _kept(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
