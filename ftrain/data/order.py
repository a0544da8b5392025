"""The order of shuffled data: a function of (seed, epoch), so that any position is reached without reading what stands before it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import rng

__all__ = ["generator", "permutation"]

_ORDER = 0x0BDE
_POSITIVE = (1 << 63) - 1


def generator(key: int) -> np.random.Generator:
    """A generator of numpy that is a function of an integer key of any sign.

    >>> from ftrain.data.order import generator
    >>> bool(generator(-3).random() == generator(-3).random())
    True
    """
    return np.random.Generator(np.random.Philox(key & _POSITIVE))


def permutation(n: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order in which an epoch takes `n` samples.

    Args:
        n: how many samples.
        seed: root of the order.
        epoch: which epoch, from 0 on.

    Returns:
        int64 of shape (n,): each of 0 .. n-1 once.

    >>> from ftrain.data.order import permutation
    >>> sorted(int(i) for i in permutation(4, seed=0, epoch=1))
    [0, 1, 2, 3]
    """
    return generator(rng.fold_in_host(seed, epoch, _ORDER)).permutation(n)
