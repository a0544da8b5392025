"""A weighted mixture of inputs, as a node that can be sought.

The mixture is cut into blocks of B items. Of its first n items, input s (with weights w, W their running sums, W_0 = 0) has

    c_s(n) = floor(n W_{s+1}) - floor(n W_s)

so that every prefix that ends with a block holds each input in its share, to less than one item, and the counts before any block are
known without looking at it. Inside a block the order is random, a function of (seed, epoch, block). Weights are exact fractions;
so are the counts, however far the mixture goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from ..rng import fold_in_host
from .node import ENDLESS, At, Indices, Memo, Node, Part, Routed, as_array
from .order import generator

__all__ = ["End", "Mixed"]

End = Literal["first", "all", "never"]

_MIX = 0x313C
_BLOCK = 256


class Mixed(Routed):
    """Items of several inputs in a random order, each input's own in the order that they have there.

    Args:
        nodes: the inputs, each as often repeated as is needed.
        sizes: of the inputs before they were repeated; `ENDLESS` for those that are.
        weights: positive, with sum 1.
        seed: of the order; None: that which comes along.
        end: see `length`.
    """

    def __init__(
        self, nodes: Sequence[Node], sizes: Sequence[float], weights: Sequence[Fraction], seed: int | None, end: End
    ) -> None:
        self._take_after(*nodes)
        self.varies, self.even, self.steady = True, False, True
        self.weights, self.seed, self.end = tuple(weights), seed, end
        self.sums = [sum(weights[:s], Fraction(0)) for s in range(len(weights) + 1)]
        self.block = max(
            _BLOCK, math.ceil(2 / min(weights))
        )  # with two of each in it, no count falls from block to block
        self.total = length(sizes, weights, end)
        self.endless = self.total == ENDLESS
        self._blocks = Memo(8)

    def size(self, at: At) -> float:
        return self.total

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` items belong to each input."""
        return _counts(self.sums, n)

    def _made(self, at: At, k: int) -> tuple[Any, Any]:
        """For each item of a block: which input it comes from, and the position in it."""

        def make() -> tuple[Any, Any]:
            first = k * self.block
            end = first + self.block if k + 1 < self._count() else int(self.total)
            before, after = self.counts(first), self.counts(end)
            seed = at.seed if self.seed is None else self.seed
            order = generator(fold_in_host(seed, at.epoch, _MIX, k))
            which = order.permutation(np.repeat(np.arange(len(before)), np.subtract(after, before)))
            rank = np.empty(len(which), dtype=np.int64)
            for s, start in enumerate(before):
                own = np.flatnonzero(which == s)
                rank[own] = start + np.arange(len(own))
            return which, rank

        return self._blocks.get((at, k), make)

    def _count(self) -> float:
        """How many blocks there are; what is left over belongs to the last one."""
        return self.total if self.endless else max(1, int(self.total) // self.block)

    def route(self, at: At, indices: Indices) -> list[Part]:
        rows = as_array(indices)
        blocks = np.minimum(rows // self.block, min(self._count(), 1 << 62) - 1).astype(np.int64)
        which, rank = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        for k in np.unique(blocks):
            here = np.flatnonzero(blocks == k)
            inputs, ranks = self._made(at, int(k))
            inside = rows[here] - int(k) * self.block
            which[here], rank[here] = inputs[inside], ranks[inside]
        parts = []
        for s in np.unique(which):
            places = np.flatnonzero(which == s)
            parts.append(Part(self.inputs[s], at, rank[places], places))
        return parts

    def name(self) -> str:
        inside = ", ".join(
            f"{float(w):g} * {'.'.join(n.chain())}" for n, w in zip(self.inputs, self.weights, strict=True)
        )
        seed = "" if self.seed is None else f", seed={self.seed}"
        return f"mix({inside}{seed}, end={self.end!r})"

    def chain(self) -> list[str]:
        return [self.name()]

    def facts(self) -> dict[str, Any]:
        return {"kind": "mix"}


def _counts(sums: Sequence[Fraction], n: int) -> list[int]:
    ends = [n * one.numerator // one.denominator for one in sums]
    return [b - a for a, b in itertools.pairwise(ends)]


def length(sizes: Sequence[float], weights: Sequence[Fraction], end: End) -> float:
    """How many items a mixture has.

    `"first"`: as many as there are before an input would have to begin again. `"all"`: as many as it takes until each finite
    input was read whole. `"never"`: endless. Inputs that are endless themselves decide nothing.

    >>> from fractions import Fraction
    >>> from ftrain.data.mixing import length
    >>> half = [Fraction(1, 2)] * 2
    >>> length([10, 4], half, "first"), length([10, 4], half, "all"), length([10, 4], half, "never")
    (8, 20, inf)
    """
    finite = [(s, int(n)) for s, n in enumerate(sizes) if n != ENDLESS]
    if end == "never" or not finite:
        return ENDLESS
    sums = [sum(weights[:s], Fraction(0)) for s in range(len(weights) + 1)]
    if end == "first":
        found = min(math.floor((n + 1) / weights[s]) for s, n in finite)
        while found and any(_counts(sums, found)[s] > n for s, n in finite):
            found -= 1
        return found
    found = max(math.ceil((n - 1) / weights[s]) for s, n in finite)
    while any(_counts(sums, found)[s] < n for s, n in finite):
        found += 1
    return found
