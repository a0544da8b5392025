"""Functions of the user over items: on the host as a node, on the device as what an epoch's `finish` does.

Law: the random numbers that a function is given are a function of (seed, epoch, position of the item) and of the function's
place among those of the chain; so two functions draw independent numbers, and a sought item is the item that was read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import ArgumentError, explain
from .node import At, Indices, Node, Where, name_of
from .order import generator
from .streams import streams

__all__ = ["DeviceMap", "Finish", "Mapped", "takes_rng"]

_MAP, _DEVICE, _GLOBAL = 0x3A9, 0xDE71CE, 0x610BA1


def takes_rng(fn: object, what: str) -> bool:
    """Whether a function declares a second positional argument for random numbers: one that it needs, or one called `rng`.

    Raises:
        ArgumentError: it is no function, or cannot be called with one or two arguments.

    >>> from ftrain.data.mapping import takes_rng
    >>> (
    ...     takes_rng(lambda item: item, "f"),
    ...     takes_rng(lambda item, rng: item, "f"),
    ...     takes_rng(lambda item, scale=2: item, "f"),
    ... )
    (False, True, False)
    """
    if not callable(fn):
        raise ArgumentError(
            explain(f"{what}: this is no function.", expected="fn(item) or fn(item, rng)", got=tree.describe(fn))
        )
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in places if p.default is p.empty]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if (not places and not star) or len(required) > 2 or keyword:
        raise ArgumentError(
            explain(
                f"{what}: the function takes other arguments than it will be given.",
                expected="fn(item) or fn(item, rng)",
                got=f"{name_of(fn)}({', '.join(str(p) for p in parameters)})",
                fix="functools.partial(fn, other=value)   # fixes what is the same for all items",
            )
        )
    return len(required) == 2 or (len(places) > 1 and places[1].name == "rng")


class Mapped(Node):
    """`fn` of each item of its input.

    Args:
        inner: the input.
        fn: `fn(item)` or `fn(item, rng)`, with a generator of numpy.
        wants_rng: which of the two.
    """

    def __init__(self, inner: Node, fn: Callable[..., Any], *, wants_rng: bool) -> None:
        self._take_after(inner)
        self.inner, self.fn, self.wants_rng = inner, fn, wants_rng
        self.columnar, self.foreign = False, True
        self.varies, self.even = inner.varies or wants_rng, inner.even and not wants_rng
        self.level, self.maps = inner.maps, inner.maps + wants_rng

    def size(self, at: At) -> float:
        return self.inner.size(at)

    def items(self, at: At, indices: Indices) -> list[Any]:
        found = []
        for i, item in zip(indices, self.inner.items(at, indices), strict=True):
            try:
                if self.wants_rng:
                    key = rng.fold_in_host(at.seed, at.epoch, _MAP, self.level, int(i))
                    found.append(self.fn(item, generator(key)))
                else:
                    found.append(self.fn(item))
            except Exception as error:
                error.add_note(f"ftrain: raised by map({name_of(self.fn)}) at item {int(i)}.")
                raise
        return found

    def fixed(self) -> tuple[Node, Where] | None:
        inner = None if self.wants_rng else self.inner.fixed()
        return None if inner is None else (Mapped(inner[0], self.fn, wants_rng=False), inner[1])

    def name(self) -> str:
        return f"map({name_of(self.fn)})"


class DeviceMap(NamedTuple):
    """A function that is applied to a batch once it lies on the device; it may take this batch's key."""

    fn: Callable[..., Any]
    wants_rng: bool

    def name(self) -> str:
        return f"map({name_of(self.fn)}, device=True)"


@dataclass(frozen=True)
class Finish:
    """`(batch, epoch, position) -> batch`: device maps in order, under generators that are a function of (seed, epoch, position)."""

    maps: Sequence[DeviceMap]
    seed: int

    def __call__(self, batch: Any, epoch: int, position: int) -> Any:
        device = next((leaf.device for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))
        root = rng.fold_in_host(self.seed, epoch, _DEVICE, position)
        with streams(root, _GLOBAL), rng.seeded(rng.fold_in_host(root, _GLOBAL), device):
            for level, (fn, wants_rng) in enumerate(self.maps):
                try:
                    if wants_rng:
                        # filled there, not copied there: a copy would wait for the device
                        key = torch.full((), rng.fold_in_host(root, level), dtype=torch.int64, device=device)
                        batch = fn(batch, key)
                    else:
                        batch = fn(batch)
                except Exception as error:
                    error.add_note(
                        f"ftrain: raised by map({name_of(fn)}, device=True) at batch {position} of epoch {epoch}."
                    )
                    raise
        return batch
