"""Sources as the inputs of another one: checks, and a seed of its own for each.

Two inputs that are shuffled are in independent orders, since each draws under a seed that is derived from the common one and from its
place; unless they were given a seed (`ft.data.source(..., seed=0)`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import tree
from ..errors import ArgumentError, DataError, explain
from .node import ENDLESS, Node, Seeded
from .reading import Options
from .routes import Repeated, Sliced
from .sources import Source

__all__ = ["as_input", "check_steady", "inputs", "joined", "often", "several"]

_INPUT = 0x1297


def often(node: Node, n: float, most: float) -> Node:
    """A node of `n` items, repeated until there are `most`."""
    if n >= most:
        return node
    if most == ENDLESS:
        return Repeated(node, None)
    return Sliced(Repeated(node, -(-int(most) // int(n))), int(most), take=True)


def several(sources: Any, what: str, leaves: Sequence[Any] | None = None) -> list[Source]:
    """What was given as sources (the leaves of a tree, or a list), checked: at least one, all batched or all not."""
    listed = list(sources) if leaves is None and isinstance(sources, (list, tuple)) else leaves
    if listed is None or (isinstance(sources, (Source, Mapping)) and leaves is None):
        raise ArgumentError(
            explain(f"{what} wants a list of sources.", got=tree.describe(sources), fix=f"{what}([a, b])")
        )
    for i, one in enumerate(listed):
        if not isinstance(one, Source):
            raise ArgumentError(
                explain(
                    f"{what}: not all of these are sources.",
                    where=f"input {i}",
                    expected="ft.data.source(...)",
                    got=tree.describe(one),
                    fix=f"{what}([ft.data.source(one) for one in data])",
                )
            )
    if not listed:
        raise DataError(explain(f"{what}: there are no sources.", expected="at least one"))
    if len({one.batched for one in listed}) > 1:
        single = next(i for i, one in enumerate(listed) if not one.batched)
        raise DataError(
            explain(
                f"{what}: some of the sources have batches, others single items.",
                where=f"input {single}",
                got=repr(listed[single]),
                fix="source.batch(64)   # for each of them",
            )
        )
    return list(listed)


def check_steady(sources: Sequence[Source], what: str) -> None:
    """Raise unless every source has the same length in every epoch."""
    for i, one in enumerate(sources):
        if not one.node.steady:
            raise DataError(
                explain(
                    f"{what}: the length of a source changes from epoch to epoch.",
                    where=f"input {i}",
                    got=repr(one),
                    fix="ft.data.zip_shortest(sources), or source.repeat(2).take(n)",
                )
            )


def inputs(sources: Sequence[Source]) -> list[Node]:
    """Sources as inputs, each under a seed of its own."""
    return [as_input(one, i, f"input {i}") for i, one in enumerate(sources)]


def as_input(one: Source, i: int, where: str) -> Node:
    """A source as an input: under a seed of its own."""
    if one.options.finish:
        raise DataError(
            explain(
                "a function that runs on the device stands before several sources become one.",
                where=where,
                got=repr(one),
                fix="ft.data.mix([a, b]).map(fn, device=True)   # once, for all of them",
            )
        )
    return Seeded(one.node, one.options.seed, _INPUT, i)


def joined(node: Node, sources: Mapping[Any, Source] | list[Source]) -> Source:
    """A source of a node that was made of several."""
    inputs = list(sources.values()) if isinstance(sources, Mapping) else sources
    return Source(node, Options(loading=max((one.options.loading for one in inputs), key=lambda how: how.workers)))
