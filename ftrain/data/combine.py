"""Several sources as one: one after the other, mixed, or another one for each epoch; `zips.py` has them side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from .. import tree
from ..errors import ArgumentError, DataError, explain
from .checks import integer, one_of
from .curricula import Curriculum
from .inputs import as_input, check_steady, inputs, joined, often, several
from .joining import Chained
from .mixing import End, Mixed, length
from .node import ENDLESS, At, Node
from .reading import Options
from .sources import Source
from .streams import streams

__all__ = ["chain", "curriculum", "mix"]


def chain(sources: Sequence[Source]) -> Source:
    """All items of the first source, then those of the second, and so on; only the last may be endless.

    >>> import torch, ftrain as ft
    >>> [int(x) for x in ft.data.chain([ft.data.source(torch.arange(2)), ft.data.source(torch.arange(3))])]
    [0, 1, 0, 1, 2]
    """
    found = several(sources, "ft.data.chain")
    for i, one in enumerate(found[:-1]):
        if one.node.endless:
            raise DataError(
                explain(
                    "ft.data.chain: a source that is not the last one is endless.", where=f"sources[{i}]", got=repr(one)
                )
            )
    return joined(Chained(inputs(found)), found)


def mix(
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    *,
    seed: int | None = None,
    end: End = "first",
) -> Source:
    """Items of several sources in a random order, each source in its share.

    The shares hold in every stretch of the mixture (each block of 256 items, or of `2 / smallest weight`, is as the weights say, to
    less than one item), not only on average. Within it, each source's items come in their own order.

    Args:
        sources: all batched or all not; of the same length in every epoch.
        weights: positive, one for each source, of any sum; default: the lengths, so that each item comes exactly once in an epoch
            (equal weights, where a source is endless).
        seed: of the order; default: the source's, or the state's.
        end: when an epoch ends: before a source would have to begin again (`"first"`), once each was read whole (`"all"`; others begin
            again), or `"never"`. Endless sources decide nothing.

    >>> import torch, ftrain as ft
    >>> small, large = ft.data.source(torch.zeros(100)), ft.data.source(torch.ones(900))
    >>> data = ft.data.mix([small, large], weights=[1, 3], end="all")
    >>> len(data), sum(int(x) for x in data)
    (1199, 900)
    """
    found = several(sources, "ft.data.mix")
    check_steady(found, "ft.data.mix")
    one_of(end, End, "ft.data.mix", "end")
    if seed is not None:
        integer(seed, "ft.data.mix", "seed")
    nodes = inputs(found)
    sizes = [node.size(At(0, 0)) for node in nodes]
    for i, n in enumerate(sizes):
        if not n:
            raise DataError(explain("ft.data.mix: a source has no items.", where=f"sources[{i}]", got=repr(found[i])))
    shares = _weights(weights, sizes)
    total = length(sizes, shares, end)
    used = [math.inf if total == ENDLESS else math.floor(total * share) + 1 for share in shares]
    repeated = [often(node, n, most) for node, n, most in zip(nodes, sizes, used, strict=True)]
    return joined(Mixed(repeated, sizes, shares, seed, end), found)


def curriculum(fn: Callable[[int], Source]) -> Source:
    """Another source in each epoch: epoch e is epoch e of `fn(e)`.

    Args:
        fn: a function of the epoch, which gives equal sources for equal epochs; all batched or all not.

    Returns:
        A source without a length, so that `fit` needs `epochs=` or `steps=`.

    >>> import torch, ftrain as ft
    >>> data = ft.data.source(torch.arange(8), batch_size=2)
    >>> grows = ft.data.curriculum(lambda epoch: data.take(1 + epoch))
    >>> [len(list(grows.at(epoch=e))) for e in (0, 2)]
    [1, 3]
    """
    if not callable(fn):
        raise ArgumentError(
            explain(
                "ft.data.curriculum: this is no function.", expected="a function epoch -> source", got=tree.describe(fn)
            )
        )
    node = Curriculum(fn, _of_epoch)
    with streams(0):
        return Source(node, Options(loading=fn(0).options.loading))


def _of_epoch(found: object, epoch: int) -> Node:
    where = f"what the function of ft.data.curriculum gave for epoch {epoch}"
    if not isinstance(found, Source):
        raise DataError(explain(f"{where} is no source.", expected="ft.data.source(...)", got=tree.describe(found)))
    return as_input(found, 0, where)


def _weights(weights: Sequence[float] | None, sizes: Sequence[float]) -> list[Fraction]:
    if weights is None:
        weights = [1.0] * len(sizes) if ENDLESS in sizes else sizes
    good = [isinstance(w, (int, float, np.number)) and not isinstance(w, bool) and 0 < w < math.inf for w in weights]
    if len(good) != len(sizes) or not all(good):
        raise DataError(
            explain(
                "ft.data.mix: these weights make no sense.",
                expected=f"{len(sizes)} positive numbers, one for each source",
                got=repr(list(weights)),
                fix="ft.data.mix([a, b], weights=[0.9, 0.1])",
            )
        )
    exact = [Fraction(float(w)) for w in weights]
    return [w / sum(exact) for w in exact]
