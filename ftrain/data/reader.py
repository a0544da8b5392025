"""The reader: one epoch's batches from some place on, and the place at which to go on.

Laws
----
- `epochs(epoch, reader.place())` gives what `reader` has not given yet: the same batches, in the same order.
- A place is made of what JSON and arrays can hold. It always has `"batch"`, how many batches of the epoch were handed out;
  for data that can be sought, that is all.
- Asking whether there is more reads at most one batch ahead, and does not move the place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Place", "Reader", "close_iterator"]

Place = Mapping[str, Any]

_NOTHING: Any = object()


class Reader(Iterator[Any]):
    """An epoch's batches, from a place on.

    Args:
        batches: the batches that are left. An iterator with a method `place()` says by itself what stands in the place beside
            `"batch"` (a loader's own state, say); it is asked after the newest batch was handed out.
        read: how many batches of this epoch were handed out before.

    >>> from ftrain.data.reader import Reader
    >>> reader = Reader(iter("abc"))
    >>> next(reader), reader.more(), reader.place()
    ('a', True, {'batch': 1})
    """

    __slots__ = ("_ahead", "_batches", "_place", "read")

    def __init__(self, batches: Iterator[Any], read: int = 0) -> None:
        self._batches = batches
        self._ahead = _NOTHING
        self._place: dict[str, Any] | None = None
        self.read = read

    def __next__(self) -> Any:
        if self._ahead is _NOTHING:
            batch = next(self._batches)
        else:
            batch, self._ahead, self._place = self._ahead, _NOTHING, None
        self.read += 1
        return batch

    def more(self) -> bool:
        """Whether another batch will come; reads it where nothing else can tell."""
        if self._ahead is _NOTHING:
            place = self.place()
            try:
                self._ahead = next(self._batches)
            except StopIteration:
                return False
            self._place = place
        return True

    def place(self) -> dict[str, Any]:
        """Where to go on after the batches that were handed out."""
        if self._place is not None:
            return self._place
        inner = getattr(self._batches, "place", None)
        return {"batch": self.read, **({} if inner is None else inner())}

    def close(self) -> None:
        """End the reading, and whatever does it: generators, workers."""
        self._ahead = _NOTHING
        close_iterator(self._batches)


def close_iterator(iterator: Iterator[Any]) -> None:
    """Close an iterator that can be closed (a generator), so that its `finally` runs now."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
