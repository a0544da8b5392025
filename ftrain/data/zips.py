"""Several sources side by side."""

from __future__ import annotations

import builtins
from typing import Any

from .. import tree
from ..errors import ArgumentError, DataError, explain
from .inputs import check_steady, inputs, joined, often, several
from .joining import Policy, Zipped
from .node import At
from .sources import Source

__all__ = ["zip", "zip_cycle", "zip_longest", "zip_shortest"]


def zip(sources: Any) -> Source:
    """One item of each source, in their structure. They must be of equal length.

    Args:
        sources: a dict, tuple or list (or tree of these) of sources, all batched or all not.

    Raises:
        DataError: the lengths differ; the text names them, and the functions that say what is to be done.

    >>> import torch, ftrain as ft
    >>> data = ft.data.zip({"a": ft.data.source(torch.arange(3)), "b": ft.data.source(torch.arange(3) * 10)})
    >>> data[2]
    {'a': tensor(2), 'b': tensor(20)}
    """
    return _zip(sources, "equal", "ft.data.zip")


def zip_shortest(sources: Any) -> Source:
    """`zip` that ends with the first source that ends.

    >>> import torch, ftrain as ft
    >>> len(ft.data.zip_shortest((ft.data.source(torch.arange(3)), ft.data.source(torch.arange(5)))))
    3
    """
    return _zip(sources, "shortest", "ft.data.zip_shortest")


def zip_longest(sources: Any) -> Source:
    """`zip` that ends with the last source that ends; None stands for the items of those that ended before.

    >>> import torch, ftrain as ft
    >>> ft.data.zip_longest((ft.data.source(torch.arange(1)), ft.data.source(torch.arange(2))))[1]
    (None, tensor(1))
    """
    return _zip(sources, "longest", "ft.data.zip_longest")


def zip_cycle(sources: Any) -> Source:
    """`zip` that ends with the longest source; the others begin again, each time as an epoch of their own (shuffled anew).

    >>> import torch, ftrain as ft
    >>> data = ft.data.zip_cycle((ft.data.source(torch.arange(2)), ft.data.source(torch.arange(3))))
    >>> data[2]
    (tensor(0), tensor(2))
    """
    return _zip(sources, "cycle", "ft.data.zip_cycle")


def _zip(sources: Any, policy: Policy, what: str) -> Source:
    if isinstance(sources, Source):
        raise ArgumentError(
            explain(
                f"{what} wants several sources.",
                expected="a dict, tuple or list of them",
                got=repr(sources),
                fix=f'{what}({{"a": a, "b": b}})',
            )
        )
    found = several(sources, what, tree.leaves(sources))
    paths = tree.paths(sources, root="sources")
    nodes = inputs(found)
    if policy in ("equal", "cycle"):
        check_steady(found, what)
        sizes = [node.size(At(0, 0)) for node in nodes]
        if policy == "equal" and len(set(sizes)) > 1:
            raise DataError(
                explain(
                    f"{what}: the sources differ in length.",
                    got=", ".join(f"{path}: {n:g}" for path, n in builtins.zip(paths, sizes, strict=True)),
                    expected="equal lengths, or a function that says what is to be done",
                    fix="ft.data.zip_shortest(sources)   # ends with the first that ends\n"
                    "ft.data.zip_longest(sources)    # None for those that ended\n"
                    "ft.data.zip_cycle(sources)      # the shorter ones begin again",
                )
            )
        if policy == "cycle":
            for path, n in builtins.zip(paths, sizes, strict=True):
                if not n:
                    raise DataError(explain(f"{what}: a source has no items.", where=path))
            nodes = [often(node, n, max(sizes)) for node, n in builtins.zip(nodes, sizes, strict=True)]
    return joined(Zipped(tree.structure(sources), nodes, policy), found)
