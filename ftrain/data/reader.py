"""The reader: one epoch's batches from some place on, and the place at which to go on.

Laws
----
- `epochs(epoch, reader.place())` gives what `reader` has not given yet: the same batches, in the same order.
- A place is made of what JSON and arrays can hold. It always has `"batch"`, how many batches of the epoch were handed out;
  for data that can be sought, that is all.
- Asking whether there is more reads at most one batch ahead, and does not move the place.
- An error does not move it either: the batch that could not be read is still to come. Where the data has a state of its own, which
  may have gone further, the place is then the one at the start and `"skip"`, the number of batches to leave out from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["Place", "Reader", "close_iterator"]

Place = Mapping[str, Any]

_NOTHING: Any = object()


class Reader(Iterator[Any]):
    """An epoch's batches, from a place on.

    Args:
        batches: the batches that are left. An iterator with a method `place()` says by itself what stands in the place beside
            `"batch"` (a loader's own state, say); it is asked after the newest batch was handed out. With a true attribute
            `steady` it says that the answer is the same throughout the epoch.
        read: how many batches of this epoch were handed out before.
        start: the place that `batches` begin at; default: `{"batch": read}`.

    Attributes:
        steady: whether the place changes by nothing but its count, so that reading ahead does not move it.

    >>> from ftrain.data.reader import Reader
    >>> reader = Reader(iter("abc"))
    >>> next(reader), reader.more(), reader.place()
    ('a', True, {'batch': 1})
    """

    __slots__ = ("_ahead", "_batches", "_broken", "_own", "_place", "_start", "read", "steady")

    def __init__(self, batches: Iterator[Any], read: int = 0, start: Place | None = None) -> None:
        self._batches = batches
        self._own: Callable[[], Mapping[str, Any]] | None = getattr(batches, "place", None)
        self._start = {"batch": read} if start is None else start
        self._ahead = _NOTHING
        self._place: dict[str, Any] | None = None
        self._broken = False
        self.steady = self._own is None or bool(getattr(batches, "steady", False))
        self.read = read

    def __next__(self) -> Any:
        if self._ahead is _NOTHING:
            try:
                batch = next(self._batches)
            except StopIteration:
                raise
            except BaseException:  # an interrupt, too: who knows how far the data has gone
                self._broken = True
                raise
        elif isinstance(self._ahead, _Failed):
            raise self._ahead.error
        else:
            batch, self._ahead, self._place = self._ahead, _NOTHING, None
        self.read += 1
        return batch

    def more(self) -> bool:
        """Whether another batch will come; reads it where nothing else can tell. An error is raised when its batch is due."""
        if self._ahead is _NOTHING:
            place = None if self.steady else self.place()
            try:
                self._ahead = next(self._batches)
            except StopIteration:
                return False
            except Exception as error:
                self._broken, self._ahead, self._place = True, _Failed(error), place
                return True
            except BaseException:
                self._broken = True
                raise
            self._place = place
        return True

    def place(self) -> dict[str, Any]:
        """Where to go on after the batches that were handed out."""
        if self._place is not None:
            return self._place
        if self._broken and not self.steady:
            return self._counted(self.read)
        return {"batch": self.read, **({} if self._own is None else self._own())}

    def place_at(self, read: int) -> dict[str, Any]:
        """The place after `read` batches of the epoch, of those between the start and the newest."""
        if read == self.read:
            return self.place()
        if self.steady:
            return {"batch": read, **({} if self._own is None else self._own())}
        return self._counted(read)

    def _counted(self, read: int) -> dict[str, Any]:
        """A place for data that cannot be asked for it now: the one at the start, and how many batches to leave out from there."""
        skip = read - self._start["batch"] + self._start.get("skip", 0)
        return {**self._start, "batch": read, **({"skip": skip} if skip else {})}

    def close(self) -> None:
        """End the reading, and whatever does it: generators, workers."""
        self._ahead = _NOTHING
        close_iterator(self._batches)


class _Failed:
    """Stands for a batch that could not be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def close_iterator(iterator: Iterator[Any]) -> None:
    """Close an iterator that can be closed (a generator), so that its `finally` runs now."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()
