"""Compiling in the order in which another process did.

torch compiles a step for the shapes of its first batch, and at the second shape for all others. So what is computed for a short
last batch depends, in its last bits, on which of the two came first. A run that goes on elsewhere, just before such a batch, would
compile for it first: it rehearses the other one's order before its own first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..data import Window
from ..types import Batch

__all__ = ["Shapes", "imitate", "shapes"]

Shapes = list[list[Any]]  # a [dtype, [dimensions]] for each leaf of a batch, in the tree's order


def shapes(batch: Batch) -> Shapes:
    """The dtypes and shapes of a batch's leaves, as JSON.

    >>> import torch
    >>> from ftrain.steps.rehearsal import shapes
    >>> shapes({"x": torch.zeros(2, 3)})
    [['float32', [2, 3]]]
    """
    return [[str(leaf.dtype).removeprefix("torch."), list(leaf.shape)] for leaf in tree.leaves(batch)]


def imitate(batch: Batch, wanted: Sequence[Sequence[Any]]) -> Batch | None:
    """A batch of zeros made like `batch`, but of the wanted dtypes and shapes; None where it cannot be made like that.

    >>> import torch
    >>> from ftrain.steps.rehearsal import imitate
    >>> imitate({"x": torch.ones(3)}, [["float32", [2]]])
    {'x': tensor([0., 0.])}
    """
    if isinstance(batch, Window):  # windows differ in how many batches they have
        one = batch.batches[0]
        size = len(tree.leaves(one))
        parts = [imitate(one, wanted[i : i + size]) for i in range(0, len(wanted), size)]
        return None if any(part is None for part in parts) else Window(tuple(parts))
    leaves: list[Tensor] = tree.leaves(batch)
    if len(leaves) != len(wanted):
        return None
    zeros = [
        torch.zeros(shape, dtype=getattr(torch, dtype), device=leaf.device)
        for leaf, (dtype, shape) in zip(leaves, wanted, strict=True)
    ]
    return tree.unflatten(tree.structure(batch), zeros)
