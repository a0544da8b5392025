"""Several inputs side by side, or one after the other, as a node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from .. import tree
from .node import ENDLESS, At, Indices, Memo, Node, Part, Routed, as_array

__all__ = ["Chained", "Zipped"]

Policy = Literal["equal", "shortest", "longest", "cycle"]


class Zipped(Node):
    """One item of each input, in a structure. With `"longest"`, None stands for the items of an input that is at its end.

    Args:
        structure: a tree structure with a leaf for each input.
        nodes: the inputs; for `"cycle"` repeated by the caller as often as is needed.
        policy: how long it is.
    """

    def __init__(self, structure: Any, nodes: Sequence[Node], policy: Policy) -> None:
        self._take_after(*nodes)
        self.structure, self.policy = structure, policy
        self.columnar = self.columnar and policy != "longest"
        some_end = policy in ("equal", "shortest")
        self.endless = all(node.endless for node in nodes) if some_end else any(node.endless for node in nodes)

    def size(self, at: At) -> float:
        sizes = [node.size(at) for node in self.inputs]
        return min(sizes) if self.policy in ("equal", "shortest") else max(sizes)

    def items(self, at: At, indices: Indices) -> list[Any]:
        columns = []
        for node in self.inputs:
            if self.policy != "longest":
                columns.append(node.items(at, indices))
                continue
            rows = as_array(indices)
            here = rows[rows < node.size(at)]
            found = dict(zip((int(i) for i in here), node.items(at, here) if len(here) else [], strict=True))
            columns.append([found.get(int(i)) for i in rows])
        return [tree.unflatten(self.structure, row) for row in zip(*columns, strict=True)]

    def gather(self, at: At, indices: Indices) -> Any:
        return tree.unflatten(self.structure, [node.gather(at, indices) for node in self.inputs])

    def name(self) -> str:
        policy = "" if self.policy == "equal" else f"_{self.policy}"
        return f"zip{policy}({', '.join('.'.join(node.chain()) for node in self.inputs)})"

    def chain(self) -> list[str]:
        return [self.name()]

    def facts(self) -> dict[str, Any]:
        return {"kind": "zip"}


class Chained(Routed):
    """All items of the first input, then those of the second, and so on; only the last may be endless."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._take_after(*nodes)
        self._ends = Memo()

    def _bounds(self, at: At) -> Any:
        """Where each input ends; the last one's end is left out."""
        return self._ends.get(
            at, lambda: np.cumsum([0, *(int(node.size(at)) for node in self.inputs[:-1])], dtype=np.int64)
        )

    def size(self, at: At) -> float:
        last = self.inputs[-1].size(at)
        return ENDLESS if last == ENDLESS else int(self._bounds(at)[-1]) + last

    def route(self, at: At, indices: Indices) -> list[Part]:
        begins, rows = self._bounds(at), as_array(indices)
        which = np.searchsorted(begins, rows, side="right") - 1
        parts = []
        for k in np.unique(which):
            places = np.flatnonzero(which == k)
            parts.append(Part(self.inputs[k], at, rows[places] - begins[k], places))
        return parts

    def name(self) -> str:
        return f"chain({', '.join('.'.join(node.chain()) for node in self.inputs)})"

    def chain(self) -> list[str]:
        return [self.name()]

    def facts(self) -> dict[str, Any]:
        return {"kind": "chain"}
