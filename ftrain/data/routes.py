"""Nodes that choose among the items of one input: shuffled, sliced, strided, repeated, filtered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DataError, explain
from ..rng import fold_in_host
from .node import ENDLESS, At, Indices, Memo, Node, Part, Routed, as_array, name_of, shift
from .order import permutation
from .streams import streams

__all__ = ["Filtered", "Repeated", "Shuffled", "Sliced", "Strided"]

_SHUFFLE, _FILTER = 0x5F1E, 0xF117E2
_SCAN = 256  # items that a scan holds at a time
PASS = 1 << 32  # passes of an endless repetition that belong to one epoch


class Shuffled(Routed):
    """Its input in another order for each epoch. The innermost shuffle of a chain has the order of `order.permutation`.

    Args:
        inner: a finite input.
        seed: of this order; None: that which comes along.
    """

    def __init__(self, inner: Node, seed: int | None) -> None:
        self._take_after(inner)
        self.varies = True
        self.even = inner.even
        self.inner, self.seed = inner, seed
        self.level, self.shuffles = inner.shuffles, inner.shuffles + 1
        self._orders = Memo()

    def size(self, at: At) -> float:
        return self.inner.size(at)

    def order(self, at: At) -> Any:
        """The order of an epoch."""

        def make() -> Any:
            seed = at.seed if self.seed is None else self.seed
            if self.level:
                seed = fold_in_host(seed, _SHUFFLE, self.level)
            return permutation(int(self.inner.size(at)), seed, at.epoch)

        return self._orders.get(at, make)

    def route(self, at: At, indices: Indices) -> list[Part]:
        order = self.order(at)
        if isinstance(indices, range) and indices.step == 1:
            return [Part(self.inner, at, order[indices.start : indices.stop])]
        return [Part(self.inner, at, order[as_array(indices)])]

    def rows(self) -> tuple[int, ...] | None:
        return self.inner.rows()

    def name(self) -> str:
        return "shuffle()" if self.seed is None else f"shuffle(seed={self.seed})"


class Sliced(Routed):
    """`take` and `skip`: a number of items, or a fraction of them, is where it ends or begins."""

    def __init__(self, inner: Node, amount: float, *, take: bool) -> None:
        self._take_after(inner)
        self.endless = inner.endless and not take
        self.inner, self.amount, self.take = inner, amount, take

    def _cut(self, n: float) -> float:
        if isinstance(self.amount, float):
            return float(math.floor(n * self.amount + 1e-9))  # 0.7 * 10 is 6.999...
        return min(self.amount, n)

    def size(self, at: At) -> float:
        n = self.inner.size(at)
        size = self._cut(n) if self.take else n - self._cut(n)
        return size if size == ENDLESS else int(size)

    def route(self, at: At, indices: Indices) -> list[Part]:
        return [Part(self.inner, at, indices if self.take else shift(indices, int(self._cut(self.inner.size(at)))))]

    def name(self) -> str:
        return f"{'take' if self.take else 'skip'}({self.amount!r})"


class Strided(Routed):
    """`shard`: items `index`, `index + count`, ... of its input."""

    def __init__(self, inner: Node, index: int, count: int) -> None:
        self._take_after(inner)
        self.inner, self.index, self.count = inner, index, count

    def size(self, at: At) -> float:
        n = self.inner.size(at)
        return n if n == ENDLESS else max(0, -(-(int(n) - self.index) // self.count))

    def route(self, at: At, indices: Indices) -> list[Part]:
        return [Part(self.inner, at, as_array(indices) * self.count + self.index)]

    def name(self) -> str:
        return f"shard({self.index}, {self.count})"


class Repeated(Routed):
    """Its input several times in one epoch, each time as an epoch of its own: pass r of epoch e is the input's epoch `e * k + r`.

    Args:
        inner: a finite input, of the same size in every epoch where `k` is None.
        k: how often; None: without end, where pass r of epoch e is the input's epoch `e * 2**32 + r`.
    """

    def __init__(self, inner: Node, k: int | None) -> None:
        self._take_after(inner)
        self.inner, self.k = inner, k
        self.even, self.endless = inner.even and k is not None, k is None
        self._ends = Memo()

    def _passes(self, at: At) -> Any:
        """Where each pass ends."""

        def make() -> Any:
            assert self.k is not None, "only counted passes may differ in size"
            return np.cumsum([int(self.inner.size(At(at.seed, at.epoch * self.k + r))) for r in range(self.k)])

        return self._ends.get(at, make)

    def size(self, at: At) -> float:
        if not self.inner.steady:
            return int(self._passes(at)[-1])
        n = self.inner.size(at)
        if self.k is None:
            return ENDLESS if n else 0
        return n * self.k

    def route(self, at: At, indices: Indices) -> list[Part]:
        rows = as_array(indices)
        if self.inner.steady:
            passes, rows = np.divmod(rows, int(self.inner.size(at)))
        else:
            ends = self._passes(at)
            passes = np.searchsorted(ends, rows, side="right")
            rows = rows - np.concatenate(([0], ends))[passes]
        if not self.inner.varies:
            return [Part(self.inner, at, rows)]
        first = at.epoch * (PASS if self.k is None else self.k)
        parts = []
        for r in np.unique(passes):
            places = np.flatnonzero(passes == r)
            parts.append(Part(self.inner, At(at.seed, first + int(r)), rows[places], places))
        return parts

    def rows(self) -> tuple[int, ...] | None:
        return self.inner.rows()

    def name(self) -> str:
        return f"repeat({'' if self.k is None else self.k})"


class Filtered(Routed):
    """The items for which a function says yes, found by a scan: one for all epochs, where the items are the same in all of them."""

    def __init__(self, inner: Node, fn: Callable[[Any], Any]) -> None:
        self._take_after(inner)
        self.inner, self.fn = inner, fn
        self.even = inner.even
        self.steady = inner.steady and (not inner.varies or (inner.fixed() is not None and inner.even))
        self._mask: Any = None  # of the items that are the same in every epoch; goes along into pickles
        self._kept = Memo()

    def kept(self, at: At) -> Any:
        """The positions in the input that are kept."""

        def make() -> Any:
            n = int(self.inner.size(at))
            fixed = self.inner.fixed()
            if fixed is None:
                return np.flatnonzero(self._scan(self.inner, at))
            base, where = fixed
            if self._mask is None:
                self._mask = self._scan(base, At(0, 0))
            return np.flatnonzero(self._mask[where(at, range(n))])

        return self._kept.get(at if self.varies else 0, make)

    def _scan(self, node: Node, at: At) -> Any:
        n = int(node.size(at))
        mask = np.zeros(n, dtype=bool)
        step = 1 if node.batched else _SCAN
        with streams(at.seed, at.epoch, _FILTER):
            for start in range(0, n, step):
                wanted = range(start, min(start + step, n))
                for i, item in zip(wanted, node.items(at, wanted), strict=True):
                    mask[i] = self._verdict(item, i)
        return mask

    def _verdict(self, item: Any, i: int) -> bool:
        try:
            found = self.fn(item)
        except Exception as error:
            error.add_note(f"ftrain: raised by filter({name_of(self.fn)}) at item {i}.")
            raise
        arrays = isinstance(found, (Tensor, np.ndarray))
        if not isinstance(found, (bool, np.bool_)) and not (arrays and math.prod(found.shape) == 1):
            raise DataError(
                explain(
                    f"Source.filter: {name_of(self.fn)} gave no answer.",
                    where=f"item {i}",
                    expected="True or False",
                    got=f"an array of shape {list(found.shape)}" if arrays else repr(found),
                    fix='source.filter(lambda item: bool(item["y"] > 0))',
                )
            )
        return bool(found)

    def size(self, at: At) -> float:
        return len(self.kept(at))

    def route(self, at: At, indices: Indices) -> list[Part]:
        kept = self.kept(at)
        return [Part(self.inner, at, kept[as_array(indices)])]

    def name(self) -> str:
        return f"filter({name_of(self.fn)})"
