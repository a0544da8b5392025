"""Collation: items of the same structure as one batch, leaf by leaf.

Laws
----
- The batch has the structure of an item; each leaf is the stack of the items' leaves, along a new first dimension.
- Tensors and numpy arrays keep their dtype. Python numbers become int64, bool, or torch's default floating dtype.
- A list of numbers (as Hugging Face datasets give them) is a leaf, an array; any other list, tuple or dict is structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from .. import tree
from ..errors import DataError, explain

__all__ = ["collate", "is_leaf"]

_NUMBERS = (bool, int, float, complex)
Positions = Sequence[int] | np.ndarray[Any, np.dtype[np.int64]] | None


def is_leaf(node: Any) -> bool:
    """Whether a node of an item is one value although it is a list: a list of numbers, of any depth.

    >>> from ftrain.data.collating import is_leaf
    >>> is_leaf([[1, 2], [3, 4]]), is_leaf([{"x": 1}])
    (True, False)
    """
    while type(node) is list:
        if not node:
            return True
        node = node[0]
        if isinstance(node, _NUMBERS):
            return True
    return False


def collate(items: Sequence[Any], positions: Positions = None) -> Any:
    """Make one batch of items: pytrees of tensors, numpy arrays, numbers and lists of numbers, all of the same structure.

    Args:
        items: at least one item.
        positions: what errors call the items; default: 0, 1, 2 ...

    Returns:
        A tree of tensors, with one dimension more in front.

    Raises:
        DataError: an item that cannot be collated, with its index, the path in it, and what was expected there.

    >>> import torch, ftrain as ft
    >>> ft.data.collate([{"x": torch.zeros(2), "y": 1}, {"x": torch.ones(2), "y": 2}])
    {'x': tensor([[0., 0.],
            [1., 1.]]), 'y': tensor([1, 2])}
    """
    if not items:
        raise DataError(explain("ft.data.collate: there are no items.", expected="at least one item"))
    structure = optree.tree_structure(items[0], is_leaf=is_leaf, namespace=tree.NAMESPACE)
    columns = _columns(items, structure, positions)
    made = [_column(column, items[0], j, positions) for j, column in enumerate(columns)]
    if not made:
        raise DataError(
            explain(
                "the items hold nothing that could be collated.",
                where=_called(0, positions),
                expected="tensors, numpy arrays or numbers",
                got=repr(items[0]),
            )
        )
    return optree.tree_unflatten(structure, made)


def _columns(items: Sequence[Any], structure: Any, positions: Positions) -> list[list[Any]]:
    """The leaves of the items, by their place in the structure."""
    first = items[0]
    if type(first) is dict and structure.num_leaves == structure.num_children == structure.num_nodes - 1:
        # the usual item, a dict of arrays, without the cost of a general tree
        keys = first.keys()
        for i, item in enumerate(items):
            if type(item) is not dict or item.keys() != keys:
                raise DataError(_other_structure(items, i, positions))
        return [[item[key] for item in items] for key in structure.entries()]
    # Asking `is_leaf` about every node of every item takes most of the time, so it is done only where the first item has lists.
    leaf = None if structure == tree.structure(first) else is_leaf
    columns: list[list[Any]] = [[] for _ in range(structure.num_leaves)]
    for i, item in enumerate(items):
        leaves, other = optree.tree_flatten(item, is_leaf=leaf, namespace=tree.NAMESPACE)
        if other != structure:
            raise DataError(_other_structure(items, i, positions))
        for column, one in zip(columns, leaves, strict=True):
            column.append(one)
    return columns


def _column(values: list[Any], item: Any, leaf: int, positions: Positions) -> Tensor:
    """One leaf of the batch."""
    kind = type(values[0])
    if kind in (int, float, bool, complex) and all(type(value) is kind for value in values):
        return torch.tensor(values)
    tensors = [_tensor(value, item, leaf, i, positions) for i, value in enumerate(values)]
    first = tensors[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if all(tensor.shape == shape and tensor.dtype == dtype and tensor.device == device for tensor in tensors):
        return torch.stack(tensors)
    for i, tensor in enumerate(tensors):
        if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.device != first.device:
            shapes = tensor.shape != first.shape
            raise DataError(
                explain(
                    f"the items of a batch differ in {'shape' if shapes else 'dtype or device'}, and cannot be collated.",
                    where=f"{_called(i, positions)}, {_path(item, leaf)}",
                    expected=f"{tree.describe(first)}, as in {_called(0, positions)}",
                    got=tree.describe(tensor),
                    fix="source.map(fn)   # that pads or cuts to one shape; or batch(n, collate=fn); for tokens: source.pack(length)"
                    if shapes
                    else "source.map(fn)   # that gives every item the same dtype, on the CPU",
                )
            )
    raise AssertionError("some item differs from the first")


def _tensor(value: Any, item: Any, leaf: int, i: int, positions: Positions) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, _NUMBERS) and not isinstance(value, np.generic):
        return torch.tensor(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if type(value) is list:
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(_not_numeric(item, leaf, i, positions, f"a list ({error})")) from None
    raise DataError(_not_numeric(item, leaf, i, positions, tree.describe(value)))


def _not_numeric(item: Any, leaf: int, i: int, positions: Positions, got: str) -> str:
    return explain(
        "an item holds something that cannot be collated.",
        where=f"{_called(i, positions)}, {_path(item, leaf)}",
        expected="a tensor, a numeric numpy array, a number, or a list of numbers of equal lengths",
        got=got,
        fix='source.map(lambda item: {"x": ..., "y": ...})   # keeps what is numeric; or batch(n, collate=fn)',
    )


def _other_structure(items: Sequence[Any], i: int, positions: Positions) -> str:
    def written(item: Any) -> str:
        found, _, structure = optree.tree_flatten_with_path(item, is_leaf=is_leaf, namespace=tree.NAMESPACE)
        return ", ".join(accessor.codify("item") for accessor in structure.accessors()) if found else repr(item)

    return explain(
        "the items of a batch differ in structure, and cannot be collated.",
        where=_called(i, positions),
        expected=f"{written(items[0])}, as in {_called(0, positions)}",
        got=written(items[i]),
        fix="source.map(fn)   # that gives every item the same entries",
    )


def _called(i: int, positions: Positions) -> str:
    return f"item {i if positions is None else int(positions[i])}"


def _path(item: Any, leaf: int) -> str:
    structure = optree.tree_structure(item, is_leaf=is_leaf, namespace=tree.NAMESPACE)
    return str(structure.accessors()[leaf].codify("item"))
