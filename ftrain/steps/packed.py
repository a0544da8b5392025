"""Metrics of a compiled step as one tensor.

A graph that gives one vector of numbers instead of two small tensors for each metric spends less time on allocating outputs, and
a meter stacks one tensor a step instead of many. The metrics themselves are made when somebody asks for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import optree
from torch import Tensor

from ..metrics import Metric
from ..tree import NAMESPACE, fields

__all__ = ["Packed"]


class Packed(Mapping[str, Metric]):
    """A read-only dict of metrics over one vector: `values` holds the fields of all metrics, one after the other.

    >>> import torch
    >>> from ftrain.metrics import Mean
    >>> from ftrain.steps.packed import Packed
    >>> Packed(("loss",), (Mean,), torch.tensor([6.0, 3.0]))["loss"].compute()
    tensor(2.)
    """

    __slots__ = ("kinds", "names", "values_")

    def __init__(self, names: tuple[str, ...], kinds: tuple[type[Metric], ...], values: Tensor) -> None:
        self.names = names
        self.kinds = kinds
        self.values_ = values

    def __getitem__(self, name: str) -> Metric:
        at = 0
        for own, kind in zip(self.names, self.kinds, strict=True):
            width = len(fields(kind))
            if own == name:
                return kind(*self.values_[at : at + width].unbind())
            at += width
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return repr(dict(self))


def _flatten(packed: Packed) -> tuple[tuple[Tensor], tuple[Any, Any], tuple[str]]:
    return (packed.values_,), (packed.names, packed.kinds), ("values_",)


def _unflatten(names_and_kinds: tuple[Any, Any], children: Any) -> Packed:
    return Packed(*names_and_kinds, *children)


optree.register_pytree_node(
    Packed,
    _flatten,  # type: ignore[arg-type]  # optree wants the base type's own signature
    _unflatten,  # type: ignore[arg-type]
    path_entry_type=optree.GetAttrEntry,
    namespace=NAMESPACE,
)
