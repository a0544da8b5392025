"""A copy of the state in host memory, from which a save is written while the next step overwrites the original.

The memory is allocated once and used again for each save: fresh memory costs a page fault for every 4 KiB, as much as the copy itself.
It is pinned where the state lies on a GPU, so that the copies run side by side at the full speed of the bus.

Laws
----
- When `copy` returns, the numbers are in host memory; nothing that happens to the leaves afterwards shows.
- The memory is overwritten by the next `copy`, so the save that reads it must be over by then (`Store` waits).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .packing import Array

__all__ = ["Staging"]

_ALIGN = 4096
PARALLEL = (
    64 << 20
)  # bytes from which on threads of our own copy, where torch has only one: a core does not fill the memory bus


class Staging:
    """Host memory for the arrays of one save.

    >>> import torch
    >>> from ftrain.checkpoint.packing import Array
    >>> from ftrain.checkpoint.staging import Staging
    >>> staging, leaf = Staging(), torch.ones(2)
    >>> copies = staging.copy([Array(("w",), torch.float32, (2,), [leaf])])
    >>> leaf.zero_(), copies
    (tensor([0., 0.]), [tensor([1., 1.])])
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def copy(self, arrays: Sequence[Array]) -> list[Tensor]:
        """Copies of the arrays: contiguous CPU tensors that live until the next call."""
        cuda = [part.device for array in arrays for part in array.parts if part.is_cuda]
        offsets, total = [], 0
        for array in arrays:
            offsets.append(total)
            total += -(-array.nbytes // _ALIGN) * _ALIGN
        memory = self._reserve(total, pinned=bool(cuda))
        copies, pairs = [], []
        for array, offset in zip(arrays, offsets, strict=True):
            flat = memory[offset : offset + array.nbytes].view(array.dtype)
            at = 0
            for part in array.parts:
                pairs.append((flat[at : at + part.numel()].view(part.shape), part))
                at += part.numel()
            copies.append(flat.view(array.shape))
        hands = 1 if cuda or total < PARALLEL or torch.get_num_threads() > 1 else min(4, _processors())
        if hands == 1:
            _copy(pairs)
        else:
            with ThreadPoolExecutor(hands) as pool:
                list(pool.map(_copy, [pairs[i::hands] for i in range(hands)]))
        for device in set(cuda):
            torch.cuda.current_stream(device).synchronize()
        return copies

    def release(self) -> None:
        """Give the memory back."""
        self._memory = None

    def _reserve(self, total: int, *, pinned: bool) -> Tensor:
        memory = self._memory
        if memory is None or memory.numel() < total or memory.is_pinned() != pinned:
            self._memory = None  # before its successor is made: never both
            self._memory = memory = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
        return memory


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for target, part in pairs:
        target.copy_(part, non_blocking=True)  # mutates: memory of our own


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
