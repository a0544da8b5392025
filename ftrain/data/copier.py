"""Copies of batches to a GPU that run while the step before does: from pinned memory, on a stream of their own."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import tree
from .batches import host_tensor, no_batch

__all__ = ["Copier", "CudaCopier", "Pending", "copier_for"]


class Copier(Protocol):
    """What a feed copies batches with, one ahead of the step."""

    def start(self, batch: Any) -> Pending:
        """Start to copy a batch; gives what `finish` wants. It does not wait for the copy."""
        ...

    def finish(self, pending: Pending, /) -> Any:
        """The batch on the device, for use by the stream that is the current one now."""
        ...

    def free(self) -> None:
        """Return once the host's memory of all batches may be written to."""
        ...


class Pending(NamedTuple):
    """A batch that is being copied.

    Attributes:
        batch: on the device, once `done`.
        copies: the leaves that are copies.
        done: set by the device when they are complete.
        apart: whether all leaves are copies, so that the batch has no memory in common with what the data gave.
    """

    batch: Any
    copies: list[Tensor]
    done: Any
    apart: bool


class CudaCopier:
    """Copies on a side stream.

    What is not pinned is pinned first, which is a copy on the host; then its own memory is free at once. A batch that the user
    has pinned is copied from where it lies, and `free` waits for that copy: a generator may fill the same buffer again. The
    copy waits for no step, so neither does the host.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._stream = _side_stream(index)
        self._lent: torch.cuda.Event | None = None

    def start(self, batch: Any) -> Pending:
        leaves = tree.leaves(batch)
        if batch is None:
            raise no_batch()
        if all(isinstance(leaf, Tensor) and leaf.device == self._device for leaf in leaves):
            return Pending(batch, [], None, False)  # handed through as it is
        copies: list[Tensor] = []
        lent = False
        made = []
        with torch.cuda.stream(self._stream):
            for path, leaf in tree.items(batch, root="batch"):
                tensor = host_tensor(leaf, path)
                if tensor.device == self._device:
                    made.append(tensor)
                    continue
                if tensor.device.type == "cpu" and tensor.layout is torch.strided:
                    if tensor.is_pinned():
                        lent = True
                    else:
                        tensor = tensor.pin_memory()
                # The caching allocator of pinned memory keeps a block until the copies out of it are done.
                copy = tensor.to(self._device, non_blocking=True)
                made.append(copy)
                copies.append(copy)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        self._lent = done if lent else None
        return Pending(tree.unflatten(tree.structure(batch), made), copies, done, len(copies) == len(made))

    def finish(self, pending: Pending) -> Any:
        if pending.copies:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(pending.done)  # the device waits, not the host
            for copy in pending.copies:
                copy.record_stream(
                    stream
                )  # its memory belongs to the side stream, and may not go back before the step is done
        return pending.batch

    def free(self) -> None:
        if self._lent is not None:
            self._lent.synchronize()  # sync: for the copy alone, see above
            self._lent = None


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    """One for a device and the process: memory that is freed on a stream is only used again on that stream."""
    return torch.cuda.Stream(device=index)  # type: ignore[no-untyped-call]


def copier_for(device: torch.device) -> Copier | None:
    """What copies batches to a device ahead of the step; None where nothing is to be copied."""
    return CudaCopier(device) if device.type == "cuda" else None
