"""Which leaf of a checkpoint goes to which leaf of `like`; decided on the index, before any array is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import RestoreError, explain
from . import plain
from .dtypes import dtype_name, tensor_of
from .paths import Rename, Select, chosen, leaf_paths, renamed, under
from .report import Report

__all__ = ["Match", "describe", "match"]


class Match(NamedTuple):
    """What is restored.

    Attributes:
        report: the comparison.
        paths: the path of each leaf of `like`, in its order.
        entries: for those paths that are taken, the entry of the index.
    """

    report: Report
    paths: list[str]
    entries: dict[str, dict[str, Any]]


def describe(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of an entry of the index; the type of a value of Python's.

    >>> from ftrain.checkpoint.matching import describe
    >>> describe({"dtype": "float32", "shape": [2, 3]}), describe({"value": 3})
    (('float32', (2, 3)), ('int', ()))
    """
    if "value" in entry:
        return type(plain.decode(entry["value"], [])).__name__, ()
    prefix = "numpy " if "numpy" in entry else ""
    return prefix + entry["dtype"], tuple(entry["shape"])


def _wanted(leaf: Any) -> tuple[str, tuple[int, ...]]:
    if isinstance(leaf, Tensor):
        return dtype_name(leaf.dtype), tuple(leaf.shape)
    if isinstance(leaf, (np.ndarray, np.generic)):
        tensor = tensor_of(np.asarray(leaf))
        return "numpy " + (str(leaf.dtype) if tensor is None else dtype_name(tensor.dtype)), leaf.shape
    return type(leaf).__name__, ()


def match(
    where: tuple[str, int],
    index: Mapping[str, dict[str, Any]],
    like: tuple[Any, Sequence[Any]],
    *,
    select: Select | None,
    rename: Rename | None,
    cast: bool,
    what: str,
) -> Match:
    """Compare the index of a checkpoint with a tree.

    Args:
        where: folder and step, for the report.
        index: the index of the checkpoint.
        like: the tree, and its leaves.
        select: see `ftrain.restore`.
        rename: see `ftrain.restore`.
        cast: see `ftrain.restore`.
        what: how errors call the caller.

    Raises:
        RestoreError: `select` or `rename` makes no sense.
    """
    tree, leaves = like
    paths = leaf_paths(tree, what)
    there = {new: index[old] for new, old in renamed(rename, index, what).items()}
    part = _subtree(select, paths, there)
    if part is not None:
        there = {path.removeprefix(part): entry for path, entry in there.items() if path.startswith(part)}
        selected = chosen(None, paths, there, what)
    else:
        selected = chosen(select, paths, there, what)
    here = dict(zip(paths, leaves, strict=True))
    if len(here) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise RestoreError(explain(f"{what}: two leaves of like have the path {twice!r}.", where=twice))
    entries: dict[str, dict[str, Any]] = {}
    missing, kept, casts = [], [], []
    shapes: dict[str, tuple[str, str]] = {}
    dtypes: dict[str, tuple[str, str]] = {}
    for path, leaf in here.items():
        if not selected(path):
            kept.append(path)
            continue
        entry = there.get(path)
        if entry is None:
            missing.append(path)
            continue
        (dtype, shape), (wanted, size) = describe(entry), _wanted(leaf)
        if shape != size:
            shapes[path] = (str(list(shape)), str(list(size)))
        if dtype != wanted:
            if cast and "value" not in entry and isinstance(leaf, Tensor) and "numpy" not in entry:
                casts.append(path)
            else:
                dtypes[path] = (dtype, wanted)
        if path not in shapes and path not in dtypes:
            entries[path] = entry
    report = Report(
        *where,
        taken=tuple(entries),
        missing=tuple(missing),
        extra=tuple(path for path in there if path not in here and selected(path)),
        shapes=shapes,
        dtypes=dtypes,
        cast=tuple(path for path in casts if path in entries),
        kept=tuple(kept),
    )
    return Match(report, paths, entries)


def _subtree(select: Select | None, paths: Sequence[str], there: Mapping[str, Any]) -> str | None:
    """The prefix of the subtree that `like` is, where `select` names one: `restore(path, like=state.params, select="params")`."""
    if not isinstance(select, str) or any(under(select, path) for path in paths):
        return None
    prefix = select + "/"
    return prefix if any(path.startswith(prefix) for path in there) else None
