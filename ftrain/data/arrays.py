"""Arrays as a node: a tree of tensors and numpy arrays of equal length, gathered row by row with one fetch for each leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import DataError, explain
from .node import At, Indices, Node, as_array

__all__ = ["Arrays", "rows_of"]


class Arrays(Node):
    """The rows of arrays.

    Args:
        data: a tree of tensors and numeric numpy arrays with the same number of rows. Nothing is copied; a numpy array that may
            not be written to (a memory map, say) is read where it lies, row by row.
        what: how errors call the caller.

    Raises:
        DataError: a leaf is no array, or has another length, with its path.

    >>> import torch
    >>> from ftrain.data.arrays import Arrays
    >>> from ftrain.data.node import At
    >>> Arrays({"x": torch.arange(5) * 10}, "f").gather(At(0, 0), range(1, 3))
    {'x': tensor([10, 20])}
    """

    columnar = True

    def __init__(self, data: Any, what: str) -> None:
        self.n = _length(data, what)
        leaves = [torch.from_numpy(leaf) if _writable(leaf) else leaf for leaf in tree.leaves(data)]
        self.data = tree.unflatten(tree.structure(data), leaves)

    def size(self, at: At) -> float:
        return self.n

    def gather(self, at: At, indices: Indices) -> Any:
        if isinstance(indices, range) and indices.step == 1:
            return tree.map(lambda leaf: _slice(leaf, indices.start, indices.stop), self.data)
        rows = as_array(indices)
        devices: dict[torch.device, Tensor] = {}
        return tree.map(lambda leaf: _take(leaf, rows, devices), self.data)

    def items(self, at: At, indices: Indices) -> list[Any]:
        return rows_of(self.gather(at, indices), len(indices))

    def name(self) -> str:
        leaves = tree.items(self.data, root="")
        return f"arrays({', '.join(f'{path}: {tree.describe(leaf)}' for path, leaf in leaves)})"

    def facts(self) -> dict[str, Any]:
        return {"kind": "arrays", "samples": self.n}


def rows_of(batch: Any, n: int) -> list[Any]:
    """The `n` rows of a tree of tensors, each a tree.

    >>> import torch
    >>> from ftrain.data.arrays import rows_of
    >>> rows_of({"x": torch.tensor([1, 2])}, 2)
    [{'x': tensor(1)}, {'x': tensor(2)}]
    """
    leaves, structure = tree.leaves(batch), tree.structure(batch)
    columns = [leaf.unbind(0) for leaf in leaves]
    return [tree.unflatten(structure, [column[i] for column in columns]) for i in range(n)]


def _writable(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.flags.writeable


def _slice(leaf: Any, start: int, stop: int) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf[start:stop]
    return torch.from_numpy(np.array(leaf[start:stop]))


def _take(leaf: Any, rows: Any, devices: dict[torch.device, Tensor]) -> Tensor:
    if not isinstance(leaf, Tensor):
        return torch.from_numpy(np.asarray(leaf)[rows])
    if leaf.device not in devices:
        chosen = torch.from_numpy(np.ascontiguousarray(rows))
        if leaf.device.type == "cuda":
            chosen = chosen.pin_memory().to(leaf.device, non_blocking=True)
        devices[leaf.device] = chosen.to(leaf.device)
    return leaf.index_select(0, devices[leaf.device])


def _length(data: Any, what: str) -> int:
    sizes: dict[str, int] = {}
    for path, leaf in tree.items(data, root="data"):
        odd = isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufc"
        if not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim == 0 or odd:
            raise DataError(
                explain(
                    f"{what}: a leaf of the data is no array.",
                    where=path,
                    expected="a tensor or numeric numpy array with at least one dimension",
                    got=tree.describe(leaf),
                    cause="a tuple or dict is taken as arrays of equal length; only a list is taken as a list of samples",
                    fix=_fix(leaf, path, what),
                )
            )
        sizes[path] = len(leaf)
    if not sizes:
        raise DataError(explain(f"{what}: the data holds no arrays.", got=repr(data)))
    first, n = next(iter(sizes.items()))
    for path, size in sizes.items():
        if size != n:
            raise DataError(
                explain(
                    f"{what}: the arrays differ in length.", where=path, expected=f"{n} rows, as {first}", got=f"{size}"
                )
            )
    return n


def _fix(leaf: Any, path: str, what: str) -> str:
    if isinstance(leaf, Mapping):  # splits of a dataset
        return f"{what}({path}[{next(iter(leaf), None)!r}])   # one of {', '.join(map(repr, leaf))}"
    return f"{what}(list(samples))   # or np.asarray(...) of each entry"
