"""The global generators under which code of the user makes one batch (or one item, where there is no batching).

Laws
----
- What the code inside draws is a function of the key, so that a batch that was sought is the batch that was read.
- Outside, the generators of torch, numpy and Python are as the user left them.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
import torch

from .. import rng

__all__ = ["Streams", "streams"]

_numpy: Any = np.random  # its stubs lack the two functions that swap the global generator
_MASK32 = (1 << 32) - 1


class Streams(AbstractContextManager[None]):
    """Context in which the global generators are seeded with `key`. `rng.Isolated` for one entry, at a fifth of its time.

    Args:
        key: any integer; only its lowest 64 bits count.

    >>> import random
    >>> from ftrain.data.streams import Streams
    >>> before = random.getstate()
    >>> with Streams(3):
    ...     a = random.random()
    >>> with Streams(3):
    ...     b = random.random()
    >>> a == b and random.getstate() == before
    True
    """

    __slots__ = ("_key", "_normal", "_outer")

    # Generators of numpy that nobody uses now: to make one costs 90 microseconds, to seed one 5.
    _free: list[np.random.MT19937] = []  # noqa: RUF012 - one list for all, on purpose

    def __init__(self, key: int) -> None:
        self._key = key & ((1 << 63) - 1)

    def __enter__(self) -> None:
        self._outer = (torch.default_generator.get_state(), _numpy.get_bit_generator(), random.getstate())
        self._normal = _numpy.get_state(legacy=False)
        own = self._free.pop() if self._free else np.random.MT19937()
        np.random.RandomState(own).seed([self._key & _MASK32, self._key >> 32])
        torch.default_generator.manual_seed(self._key)
        _numpy.set_bit_generator(own)
        random.seed(self._key)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        own = _numpy.get_bit_generator()
        torch.default_generator.set_state(self._outer[0])
        _numpy.set_bit_generator(self._outer[1])
        if self._normal[
            "has_gauss"
        ]:  # numpy keeps every second normal number beside the generator, and forgets it at a swap
            _numpy.set_state(self._normal)
        random.setstate(self._outer[2])
        if type(own) is np.random.MT19937 and own is not self._outer[1]:
            self._free.append(own)


def streams(seed: int, *salt: int) -> Streams:
    """The streams of one place: `salt` says which (the epoch, the position, a purpose).

    >>> import random
    >>> from ftrain.data.streams import streams
    >>> with streams(0, 1, 2):
    ...     a = random.random()
    >>> with streams(0, 1, 3):
    ...     b = random.random()
    >>> a != b
    True
    """
    return Streams(rng.fold_in_host(seed, *salt))
