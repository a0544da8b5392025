"""Nodes: what a `Source` is made of. A node gives the items at any positions of any epoch, without looking at what came before.

Laws (for a node `n`, and `at = (seed, epoch)`)
----
- `n.items(at, indices)` is a function of its arguments, for `indices` within `range(n.size(at))`; so is `n.size(at)`.
- Where `n.columnar`, `n.gather(at, indices)` is `collate(n.items(at, indices))`, made with one fetch for all rows.
- Where not `n.varies`, neither depends on `at`. Where `n.steady`, the size does not.
- `n.fixed()` is `(base, where)`, if there is such a base that does not vary: `n.items(at, i) == base.items(any, where(at, i))`.

Tables (an order, a mask) are made once for an epoch and kept for the newest few; they hold nothing that a new object would not
compute again. Below, user functions that draw from the global generators count as functions of the position: whoever asks a node
for items does so inside `streams(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from .. import tree
from ..rng import fold_in_host
from .collating import collate

__all__ = [
    "ENDLESS",
    "At",
    "Indices",
    "Memo",
    "Node",
    "Part",
    "Routed",
    "Seeded",
    "Where",
    "as_array",
    "name_of",
    "shift",
]

ENDLESS = math.inf
T = TypeVar("T")

Array = np.ndarray[Any, np.dtype[np.int64]]
Indices = range | Array


class At(NamedTuple):
    """An epoch under a seed.

    >>> from ftrain.data.node import At
    >>> At(seed=0, epoch=2).epoch
    2
    """

    seed: int
    epoch: int


Where = Callable[[At, Indices], Array]


class Memo:
    """The newest results of a function of a key. A copy or a pickle of it is empty.

    >>> from ftrain.data.node import Memo
    >>> memo = Memo(1)
    >>> memo.get(1, lambda: "made"), memo.get(1, lambda: "made again")
    ('made', 'made')
    """

    __slots__ = ("_found", "_size")

    def __init__(self, size: int = 2) -> None:
        self._size = size
        self._found: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What belongs to a key, made where it is not known."""
        if key not in self._found:  # not in an `except`: an error of `make` has nothing to do with a missing key
            made = make()
            while len(self._found) >= self._size:
                self._found.pop(next(iter(self._found)), None)
            self._found[key] = made
        found: T = self._found[key]
        return found

    def __reduce__(self) -> tuple[type[Memo], tuple[int]]:
        return Memo, (self._size,)


class Node:
    """Base of all nodes.

    Attributes:
        inputs: the nodes from which this one takes its items.
        batched: whether an item is a batch.
        columnar: whether `gather` works.
        varies: whether what stands at a position, or the size, depends on `at`.
        steady: whether the size is the same in every epoch.
        even: whether how often an item of `fixed()`'s base comes is the same in every epoch.
        endless: whether the size is `ENDLESS`.
        foreign: whether making items runs code of the user, which may draw from the global generators.
        maps: how many functions with random numbers of their own stand in the chain up to here.
        shuffles: how many shuffles do.
    """

    inputs: tuple[Node, ...] = ()
    batched: bool = False
    columnar: bool = False
    varies: bool = False
    steady: bool = True
    even: bool = True
    endless: bool = False
    foreign: bool = False
    maps: int = 0
    shuffles: int = 0

    def _take_after(self, *inputs: Node) -> None:
        """Set the attributes to what they are where nothing but the choice of items changes (for constructors)."""
        self.inputs = inputs
        self.batched = inputs[0].batched
        self.columnar = all(one.columnar for one in inputs)
        self.varies = any(one.varies for one in inputs)
        self.steady = all(one.steady for one in inputs)
        self.even = not self.varies
        self.endless = any(one.endless for one in inputs)
        self.foreign = any(one.foreign for one in inputs)
        self.maps = max(one.maps for one in inputs)
        self.shuffles = max(one.shuffles for one in inputs)

    def size(self, at: At) -> float:
        """How many items there are: an integer, or `ENDLESS`."""
        raise NotImplementedError

    def items(self, at: At, indices: Indices) -> list[Any]:
        """The items at these positions."""
        raise NotImplementedError

    def gather(self, at: At, indices: Indices) -> Any:
        """The items at these positions as one batch."""
        raise NotImplementedError

    def fixed(self) -> tuple[Node, Where] | None:
        """See the laws."""
        return None if self.varies else (self, lambda at, indices: as_array(indices))

    def rows(self) -> tuple[int, ...] | None:
        """How many samples its batches have, each number once, or None where that is not known beforehand."""
        return None

    def name(self) -> str:
        """This node alone, as it is written."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What tells this node from others beside its name, as JSON."""
        return {}

    def chain(self) -> list[str]:
        """The names from the data to here."""
        return [*(self.inputs[0].chain() if self.inputs else []), self.name()]


class Part(NamedTuple):
    """Some of the items that were asked for: where they come from, and at which places of the result they belong (None: all)."""

    node: Node
    at: At
    indices: Indices
    places: Array | None = None


class Routed(Node):
    """A node whose items are those of its inputs, at other positions."""

    def route(self, at: At, indices: Indices) -> list[Part]:
        """Where the items at these positions come from."""
        raise NotImplementedError

    def items(self, at: At, indices: Indices) -> list[Any]:
        parts = self.route(at, indices)
        if len(parts) == 1 and parts[0].places is None:
            return parts[0].node.items(parts[0].at, parts[0].indices)
        found: list[Any] = [None] * len(indices)
        for node, own, rows, places in parts:
            assert places is not None, "a part that is not everything has places"
            for place, item in zip(places, node.items(own, rows), strict=True):
                found[place] = item
        return found

    def gather(self, at: At, indices: Indices) -> Any:
        parts = self.route(at, indices)
        if len(parts) == 1 and parts[0].places is None:
            return parts[0].node.gather(parts[0].at, parts[0].indices)
        pieces = [node.gather(own, rows) for node, own, rows, _ in parts]
        first = [_kind(leaf) for leaf in tree.leaves(pieces[0])]
        for piece in pieces[1:]:
            if not tree.same_structure(pieces[0], piece) or [_kind(leaf) for leaf in tree.leaves(piece)] != first:
                return collate(self.items(at, indices), indices)  # which says what differs, and where
        back = torch.from_numpy(np.argsort(np.concatenate([part.places for part in parts])))
        return tree.map(lambda *rows: torch.cat(rows).index_select(0, back.to(rows[0].device)), *pieces)

    def fixed(self) -> tuple[Node, Where] | None:
        if not self.varies or len(self.inputs) != 1:
            return super().fixed()
        inner = self.inputs[0].fixed()
        if inner is None:
            return None
        base, where = inner

        def through(at: At, indices: Indices) -> Array:
            parts = self.route(at, indices)
            found = np.empty(len(indices), dtype=np.int64)
            for _, own, rows, places in parts:
                found[slice(None) if places is None else places] = where(own, rows)
            return found

        return base, through

    def rows(self) -> tuple[int, ...] | None:
        known = {one.rows() for one in self.inputs}
        one = known.pop() if len(known) == 1 else None
        return one if one is not None and len(one) == 1 else None


class Seeded(Routed):
    """Its input under another seed: a fixed one, or one derived from the seed that comes along.

    Args:
        inner: the input.
        seed: the fixed seed, or None.
        salt: where `seed` is None: what sets the derived seed apart from those of other inputs.
    """

    def __init__(self, inner: Node, seed: int | None, *salt: int) -> None:
        self._take_after(inner)
        self.even = inner.even
        self.inner, self.seed, self.salt = inner, seed, salt

    def _at(self, at: At) -> At:
        return At(fold_in_host(at.seed, *self.salt) if self.seed is None else self.seed, at.epoch)

    def size(self, at: At) -> float:
        return self.inner.size(self._at(at))

    def route(self, at: At, indices: Indices) -> list[Part]:
        return [Part(self.inner, self._at(at), indices)]

    def rows(self) -> tuple[int, ...] | None:
        return self.inner.rows()

    def name(self) -> str:
        return self.inner.name()

    def facts(self) -> dict[str, Any]:
        return self.inner.facts()

    def chain(self) -> list[str]:
        return self.inner.chain()


def _kind(leaf: Any) -> tuple[Any, ...]:
    return (leaf.dtype, leaf.shape[1:], leaf.device)


def as_array(indices: Indices) -> Array:
    """Positions as an array.

    >>> from ftrain.data.node import as_array
    >>> as_array(range(2, 4))
    array([2, 3])
    """
    if isinstance(indices, range):
        return np.arange(indices.start, indices.stop, indices.step, dtype=np.int64)
    return indices


def shift(indices: Indices, by: int) -> Indices:
    """Positions moved by a number; a range stays one, so that arrays can be sliced.

    >>> from ftrain.data.node import shift
    >>> shift(range(2, 4), 3)
    range(5, 7)
    """
    if isinstance(indices, range):
        return range(indices.start + by, indices.stop + by, indices.step)
    return indices + by


def name_of(fn: Any) -> str:
    """A function's name, for descriptions.

    >>> from ftrain.data.node import name_of
    >>> name_of(len)
    'len'
    """
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


def same(nodes: Sequence[Node], attribute: str) -> bool:
    """Whether an attribute is the same for all nodes."""
    return len({getattr(node, attribute) for node in nodes}) == 1
