"""Items kept in the host's memory once they were made."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from .. import tree
from .node import At, Indices, Node
from .streams import streams

__all__ = ["Cached"]

_CACHE = 0xCAC4E


class Cached(Node):
    """Its input's items, each made once in a process: as those of epoch 0 under seed 0, whichever epoch asks first.

    What is handed out is a copy, so that a later function may change an item in place.

    Args:
        inner: an input that does not vary.
    """

    def __init__(self, inner: Node) -> None:
        self._take_after(inner)
        self.columnar = self.foreign = False
        self.inner = inner
        self._kept: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # each process has its own

    def size(self, at: At) -> float:
        return self.inner.size(at)

    def items(self, at: At, indices: Indices) -> list[Any]:
        wanted = [int(i) for i in indices]
        missing = [i for i in dict.fromkeys(wanted) if i not in self._kept]
        if not self.inner.foreign and missing:
            self._kept.update(zip(missing, self.inner.items(At(0, 0), np.array(missing)), strict=True))
            missing = []
        for i in missing:
            with streams(_CACHE, i):
                self._kept[i] = self.inner.items(At(0, 0), range(i, i + 1))[0]
        return [tree.map(_copy, self._kept[i]) for i in wanted]

    def rows(self) -> tuple[int, ...] | None:
        return self.inner.rows()

    def name(self) -> str:
        return "cache()"


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
