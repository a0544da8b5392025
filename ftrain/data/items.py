"""Map-style datasets as a node: anything with `__len__` and `__getitem__`, and `__getitems__` where there is one."""

from __future__ import annotations

from typing import Any

from ..errors import DataError, explain
from .node import At, Indices, Node

__all__ = ["Items"]


class Items(Node):
    """The items of a dataset (torch's, Hugging Face's, a list).

    Args:
        data: anything with `__len__` and `__getitem__`; its length is read once.
        batched: whether its items are batches already.

    >>> from ftrain.data.items import Items
    >>> from ftrain.data.node import At
    >>> Items("abc", batched=False).items(At(0, 0), range(1, 3))
    ['b', 'c']
    """

    def __init__(self, data: Any, *, batched: bool) -> None:
        self.data = data
        self.n = len(data)
        self.batched = batched
        self.many = getattr(data, "__getitems__", None) is not None
        self.foreign = type(data) is not list

    def size(self, at: At) -> float:
        return self.n

    def items(self, at: At, indices: Indices) -> list[Any]:
        wanted = [int(i) for i in indices]
        if self.many and len(wanted) > 1:
            return self._several(wanted)
        found = []
        for i in wanted:
            try:
                found.append(self.data[i])
            except Exception as error:
                error.add_note(f"ftrain: raised by {type(self.data).__name__}.__getitem__({i}).")
                raise
        return found

    def _several(self, wanted: list[int]) -> list[Any]:
        kind = type(self.data).__name__
        try:
            found = list(self.data.__getitems__(wanted))
        except Exception as error:
            error.add_note(f"ftrain: raised by {kind}.__getitems__({wanted}).")
            raise
        if len(found) != len(wanted):
            raise DataError(
                explain(
                    f"{kind}.__getitems__ gave another number of items than were asked for.",
                    expected=f"{len(wanted)} items, for {wanted[:8]}{' ...' if len(wanted) > 8 else ''}",
                    got=f"{len(found)}",
                )
            )
        return found

    def name(self) -> str:
        return f"{type(self.data).__name__}({self.n})"

    def facts(self) -> dict[str, Any]:
        return {"kind": type(self.data).__name__, "samples": self.n}
