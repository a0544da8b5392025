"""Another input for each epoch, as a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .node import At, Indices, Memo, Node, Part, Routed, name_of
from .streams import streams

__all__ = ["Curriculum"]

_CURRICULUM = 0xC0881C


class Curriculum(Routed):
    """Epoch e is epoch e of what `fn(e)` gives.

    Args:
        fn: the user's function of the epoch.
        as_node: makes a node of what it gives, or raises.
    """

    def __init__(self, fn: Callable[[int], Any], as_node: Callable[[Any, int], Node]) -> None:
        self.fn, self.as_node = fn, as_node
        self._nodes = Memo(4)
        first = self.node(0)
        self._take_after(first)
        self.inputs = ()
        self.varies, self.even, self.steady, self.foreign = True, False, False, True
        self.batched, self.endless = first.batched, first.endless

    def node(self, epoch: int) -> Node:
        """What is read in an epoch."""

        def make() -> Node:
            with streams(epoch, _CURRICULUM):
                return self.as_node(self.fn(epoch), epoch)

        return self._nodes.get(epoch, make)

    def size(self, at: At) -> float:
        return self.node(at.epoch).size(at)

    def route(self, at: At, indices: Indices) -> list[Part]:
        return [Part(self.node(at.epoch), at, indices)]

    def items(self, at: At, indices: Indices) -> list[Any]:
        return self.node(at.epoch).items(at, indices)

    def rows(self) -> tuple[int, ...] | None:
        return None

    def name(self) -> str:
        return f"curriculum({name_of(self.fn)})"

    def facts(self) -> dict[str, Any]:
        return {"kind": "curriculum"}
