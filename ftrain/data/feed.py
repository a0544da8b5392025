"""The feed: a reader's batches on the state's device, and the seconds that were spent waiting for them.

Laws
----
- `Feed(reader, device)` gives the batches of the reader, in its order; on a CPU the very same tensors.
- `read`, `place()` and `more()` are as of the batches that were handed out, whatever was read or copied ahead, and also after
  an error: a batch that could not be handed out is still to come.
- An error of the data is raised when its batch is due, not when it is read ahead.
- A batch on a GPU may be used by the consumer's stream as if it had been copied there; the host never waits for the steps before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch

from .batches import to_device
from .copier import Copier, copier_for
from .reader import Reader
from .spans import LISTENER

__all__ = ["Feed"]

_NOTHING: Any = object()


class Feed(Iterator[Any]):
    """Batches on a device.

    On CUDA, each batch is copied on a side stream from pinned memory while the step before runs. One batch is read and copied
    ahead, unless the reader has a state of its own (a `StatefulDataLoader`): its place would then be that of a batch too many.

    Args:
        reader: where the batches come from.
        device: where the state lies.
        finish: `(batch, epoch, position) -> batch`, applied to each batch on the device when it is handed out.
        epoch: the epoch that `finish` is told.
        copier: what copies batches ahead; default: what suits the device, on a CPU nothing.

    Attributes:
        read: how many batches of the epoch were handed out, by this feed and before.
        waited: seconds spent in the user's data so far.

    >>> import torch
    >>> from ftrain.data import Feed, Reader
    >>> feed = Feed(Reader(iter([torch.zeros(2), torch.ones(2)])), torch.device("cpu"))
    >>> next(feed), feed.read, feed.more(), feed.place()
    (tensor([0., 0.]), 1, True, {'batch': 1})
    """

    __slots__ = ("_ahead", "_copier", "_device", "_epoch", "_finish", "_reader", "read", "waited")

    def __init__(
        self,
        reader: Reader,
        device: torch.device,
        finish: Callable[[Any, int, int], Any] | None = None,
        epoch: int = 0,
        *,
        copier: Copier | None = None,
    ) -> None:
        self._reader = reader
        self._device = device
        self._finish = finish
        self._epoch = epoch
        self._copier = copier_for(device) if copier is None else copier
        self._ahead: Any = _NOTHING  # a batch that is being copied, or the exception raised instead of it
        self.read = reader.read
        self.waited = 0.0

    def __next__(self) -> Any:
        listener = LISTENER.get()
        if listener is not None:
            with listener("data"):
                return self._next()
        return self._next()

    def _next(self) -> Any:
        if self._copier is not None:
            batch = self._copied(self._copier)
        else:
            reader = self._reader
            began = perf_counter()
            try:
                batch = next(reader)
            finally:
                self.waited += perf_counter() - began
            batch = to_device(batch, self._device)
        if self._finish is not None:
            batch = self._finish(batch, self._epoch, self.read)
        self.read += 1
        return batch

    def more(self) -> bool:
        """Whether another batch will come; reads it where nothing else can tell."""
        ahead = self._ahead
        if ahead is not _NOTHING:
            return not isinstance(ahead, StopIteration)
        listener = LISTENER.get()
        with nullcontext() if listener is None else listener("data"):
            began = perf_counter()
            try:
                return self._reader.more()
            finally:
                self.waited += perf_counter() - began

    @property
    def steady(self) -> bool:
        """Whether the place changes by nothing but its count, so that it can be told at any time."""
        return self._reader.steady

    def place(self, read: int | None = None) -> dict[str, Any]:
        """Where to go on after the batches that were handed out, or after `read` of them."""
        return self._reader.place_at(self.read if read is None else read)

    def close(self) -> None:
        """End the reading, and whatever does it: generators, workers."""
        self._ahead = _NOTHING
        self._reader.close()

    def _copied(self, copier: Copier) -> Any:
        """The batch that is due; the one after it is read, and on its way, before this one is handed out."""
        ahead, self._ahead = self._ahead, _NOTHING
        if ahead is _NOTHING:
            ahead = self._start(copier)
        if isinstance(ahead, BaseException):
            self._ahead = ahead  # it is raised again by whoever asks again
            raise ahead
        batch = copier.finish(ahead)
        # Never where the batch may share memory with what the user's code writes next, or where the place would move.
        if ahead.apart and self._reader.steady:
            self._ahead = self._start(copier)
        return batch

    def _start(self, copier: Copier) -> Any:
        """Read a batch and start to copy it; gives the exception where that fails, since it may not be due yet."""
        copier.free()  # before the user's code may write into what is being copied
        began = perf_counter()
        try:
            batch = next(self._reader)
        except Exception as error:
            return error
        finally:
            self.waited += perf_counter() - began
        try:
            return copier.start(batch)
        except Exception as error:
            return error
