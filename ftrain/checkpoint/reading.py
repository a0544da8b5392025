"""From entries of the index to values: tensors, arrays of numpy, and what Python's own values are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import plain
from .dtypes import array_of, dtype_named
from .engine import read_arrays

__all__ = ["like_leaf", "read"]

Key = tuple[str, ...]
Entry = Mapping[str, Any]


def read(folder: Path, index: Mapping[str, Entry], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The values of some entries: tensors on the CPU in memory of their own, arrays of numpy, and plain values.

    Args:
        folder: where the arrays of the step lie.
        index: the whole index of the step.
        entries: those that are wanted, by whatever name.
    """
    made: dict[str, Any] = {}
    whole: dict[Key, Tensor] = {}
    packed: dict[Key, list[str]] = {}
    for name, entry in entries.items():
        if "value" in entry:
            made[name] = plain.decode(entry["value"], [])
        elif "at" in entry:
            packed.setdefault(tuple(entry["array"]), []).append(name)
        else:
            made[name] = torch.empty(entry["shape"], dtype=dtype_named(entry["dtype"]))
            if "array" in entry:
                whole[tuple(entry["array"])] = made[name]
    rows: dict[Key, tuple[int, int]] = {}
    for key, names in packed.items():
        parts = [_part(entries[name]) for name in names]
        rows[key] = min(first for first, _ in parts), max(last for _, last in parts)
    packs = {
        key: torch.empty(last - first, dtype=dtype_named(entries[packed[key][0]]["dtype"]))
        for key, (first, last) in rows.items()
    }
    shapes: dict[Key, tuple[int, ...]] = {key: tuple(one.shape) for key, one in whole.items()}
    for entry in index.values():
        if "at" in entry and (key := tuple(entry["array"])) in packs:
            shapes[key] = (max(_part(entry)[1], *shapes.get(key, (0,))),)
    if shapes:
        read_arrays(folder, {key: array_of(one) for key, one in {**whole, **packs}.items()}, shapes, rows)
    for key, names in packed.items():
        for name in names:
            first, last = (end - rows[key][0] for end in _part(entries[name]))
            # A copy: two leaves in one memory would be one leaf for whoever writes to it.
            made[name] = packs[key][first:last].view(entries[name]["shape"]).clone()
    return {name: _as_was(made[name], entry) for name, entry in entries.items()}


def _part(entry: Entry) -> tuple[int, int]:
    """The elements of a pack that are this leaf's."""
    return entry["at"], entry["at"] + math.prod(entry["shape"])


def _as_was(value: Any, entry: Entry) -> Any:
    if "numpy" not in entry:
        return value
    array = array_of(value)
    return array if entry["numpy"] == "array" else array[()]


def like_leaf(value: Any, leaf: Any) -> Any:
    """A restored value with the device, dtype and memory layout of a leaf of `like`."""
    if not isinstance(leaf, Tensor) or not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if leaf.is_meta else leaf.device
    made = value
    if device != value.device or leaf.dtype != value.dtype or leaf.stride() != value.stride():
        # The strides of `like` count: another memory layout is another kernel, and other roundings.
        made = torch.empty_like(leaf, device=device, requires_grad=False)
        made.copy_(value)  # mutates: memory of our own
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(made, requires_grad=leaf.requires_grad)
    return made.requires_grad_(leaf.requires_grad)
