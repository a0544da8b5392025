"""Which array of a checkpoint holds which leaf.

An array costs half a millisecond whatever its size, so leaves under `SMALL` bytes are laid one after another into one array for each
dtype, `~packed/<dtype>`; every other leaf is an array of its own, under its own keys. Empty tensors (which arrays cannot be) and Python's
own values stand in the index. The index is JSON, `{path: entry}`, and says of each leaf what it is and where:

    {"dtype": "float32", "shape": [512, 512], "array": ["params", "fc.weight"]}         an array
    {"dtype": "float32", "shape": [512], "array": ["~packed", "float32"], "at": 4096}    elements 4096 to 4608 of that array
    {"dtype": "float32", "shape": [0, 3]}                                               empty
    {"value": 3}                                                                        a plain tree, see `plain`
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, explain
from . import plain
from .dtypes import dtype_name, numpy_dtype, tensor_of

__all__ = ["SMALL", "Array", "Layout", "lay_out", "nest"]

SMALL = 1 << 20  # bytes; an array of its own costs half a millisecond each way, in which 4 MiB are copied
PACKED = "~packed"  # no key of a tree begins so (see `paths`)


@dataclass
class Array:
    """One array of a checkpoint: its keys, what it holds, and the leaves that fill it, in order."""

    key: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[Tensor] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class Layout(NamedTuple):
    """What to write: the arrays, and the index that finds the leaves in them, by path."""

    arrays: list[Array]
    entries: dict[str, dict[str, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)


def lay_out(leaves: Iterable[tuple[str, Any]], what: str, small: int = SMALL) -> Layout:
    """Decide where each leaf goes.

    Args:
        leaves: pairs of path and leaf.
        what: how errors call the caller.
        small: leaves of fewer bytes are packed.

    Raises:
        CheckpointError: two leaves of one path, or a leaf that a checkpoint cannot hold; the path is named.

    >>> import torch
    >>> from ftrain.checkpoint.packing import lay_out
    >>> layout = lay_out([("w", torch.zeros(2, 3)), ("b", torch.zeros(3)), ("n", 7)], "doctest")
    >>> [(array.key, array.shape) for array in layout.arrays], layout.entries["b"]["at"], layout.entries["n"]
    ([(('~packed', 'float32'), (9,))], 6, {'value': 7})
    """
    arrays: dict[str, Array] = {}  # by the name that Orbax makes of the keys: joined with dots
    packs: dict[torch.dtype, Array] = {}
    index: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves:
        if path in index:
            raise CheckpointError(explain(f"{what}: two leaves have the path {path!r}.", where=path))
        tensor, entry = _look_at(leaf, path, what)
        index[path] = entry
        if tensor is None or not tensor.numel():
            continue
        if tensor.numel() * tensor.element_size() < small:
            pack = packs.get(tensor.dtype)
            if pack is None:
                key = _free((PACKED, dtype_name(tensor.dtype)), arrays)
                pack = packs[tensor.dtype] = arrays[".".join(key)] = Array(key, tensor.dtype, (0,))
            entry |= {"array": pack.key, "at": pack.shape[0]}
            pack.parts.append(tensor)
            pack.shape = (pack.shape[0] + tensor.numel(),)
        else:
            key = _free(tuple(path.split("/")), arrays)
            entry["array"] = key
            arrays[".".join(key)] = Array(key, tensor.dtype, tuple(tensor.shape), [tensor])
    return Layout(list(arrays.values()), index)


def _free(key: tuple[str, ...], arrays: dict[str, Array]) -> tuple[str, ...]:
    """These keys, or others like them: Orbax joins keys with dots, so `{"a.b": x, "a": {"b": y}}` would be one array for it.

    No key of a tree has a `~~` (see `paths`), so nothing else can be called so.
    """
    made, n = key, 0
    while ".".join(made) in arrays:
        n += 1
        made = (*key[:-1], f"{key[-1]}~~{n}")
    return made


def _look_at(leaf: Any, path: str, what: str) -> tuple[Tensor | None, dict[str, Any]]:
    """A leaf as a tensor, where it is one, and the first half of its entry."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        tensor = tensor_of(np.asarray(leaf))
        if tensor is not None:
            kind = "array" if isinstance(leaf, np.ndarray) else "scalar"
            return tensor, {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "numpy": kind}
    elif isinstance(leaf, Tensor):
        if type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
            _refuse_subclass(leaf, path, what)
        if leaf.layout == torch.strided and numpy_dtype(leaf.dtype) is not None and leaf.device.type != "meta":
            return leaf.detach(), {"dtype": dtype_name(leaf.dtype), "shape": list(leaf.shape)}
        raise CheckpointError(
            explain(
                f"{what}: a checkpoint cannot hold this tensor.",
                where=path,
                expected="a dense tensor with numbers in it",
                got=f"{leaf.dtype}, {leaf.layout}, on {leaf.device}",
            )
        )
    encoded, inner = plain.encode(leaf, path)
    assert not inner, "a leaf of a tree holds no tensors"
    return None, {"value": encoded}


def _refuse_subclass(leaf: Tensor, path: str, what: str) -> None:
    name = type(leaf).__name__
    sharded = name == "DTensor"
    raise CheckpointError(
        explain(
            f"{what}: a checkpoint cannot hold a {name}"
            + (" yet: sharded states are not supported." if sharded else "."),
            where=path,
            expected="plain tensors",
            got=f"{type(leaf).__module__}.{name}",
            fix="leaf.full_tensor()   # on each rank, and save on one" if sharded else None,
        )
    )


def nest(pairs: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Nested dicts from pairs of keys and value.

    >>> from ftrain.checkpoint.packing import nest
    >>> nest([(("a", "b"), 1), (("a", "c"), 2)])
    {'a': {'b': 1, 'c': 2}}
    """
    root: dict[str, Any] = {}
    for key, value in pairs:
        node = root
        for one in key[:-1]:
            node = node.setdefault(one, {})
        node[key[-1]] = value
    return root
