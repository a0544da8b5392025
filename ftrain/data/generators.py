"""The generators that a loader, its samplers and its dataset own: found, saved and put back.

A `DataLoader(..., generator=g)` draws the order of an epoch from `g`, which goes on from epoch to epoch. So where an epoch begins
is a matter of `g`'s state, and that state is part of the place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..errors import DataError, explain
from .frozen import freeze, thaw

__all__ = ["generators_of", "put_generators", "states_of"]

_PARTS = ("", "sampler", "batch_sampler", "batch_sampler.sampler", "dataset")
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def generators_of(loader: Any) -> dict[str, Any]:
    """Generators of torch, numpy and Python that are attributes of a loader or its parts, by path, each once.

    >>> import torch
    >>> from ftrain.data.generators import generators_of
    >>> loader = torch.utils.data.DataLoader(range(4), shuffle=True, generator=torch.Generator())
    >>> list(generators_of(loader))
    ['generator']
    """
    found: dict[str, Any] = {}
    for path, part in parts_of(loader):
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, _KINDS) and not any(value is one for one in found.values()):
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def parts_of(loader: Any) -> Iterator[tuple[str, Any]]:
    """A loader and what it is made of, by path, each once."""
    seen: list[Any] = []
    for path in _PARTS:
        part = loader
        for name in filter(None, path.split(".")):
            part = getattr(part, "__dict__", {}).get(name)
        if part is not None and not any(part is one for one in seen):
            seen.append(part)
            yield path, part


def states_of(loader: Any, what: str) -> dict[str, Any]:
    """The states of a loader's generators, as a plain tree."""
    return {path: freeze(_state(one), f"loader.{path}", what) for path, one in generators_of(loader).items()}


def put_generators(loader: Any, states: Mapping[str, Any], what: str) -> None:
    """Put a loader's generators where they were.

    Raises:
        DataError: the loader has no such generator.
    """
    found = generators_of(loader)
    missing = sorted(set(states) - set(found))
    if missing:
        raise DataError(
            explain(
                f"{what}: the loader had a generator of its own when its place was saved, and has none now.",
                where=", ".join(f"loader.{path}" for path in missing),
                expected="the loader made as before",
                got=", ".join(f"loader.{path}" for path in found) or "no generators",
                fix="DataLoader(..., generator=torch.Generator())",
            )
        )
    for path, frozen in states.items():
        one, state = found[path], thaw(frozen)
        if isinstance(one, torch.Generator):
            one.set_state(state)
        elif isinstance(one, np.random.Generator):
            one.bit_generator.state = state
        elif isinstance(one, np.random.RandomState):
            one.set_state(state)
        else:
            one.setstate(state)


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate()
