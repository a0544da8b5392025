"""One epoch's iteration of what the user gave, under streams of its own, and what is kept of it from epoch to epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import rng
from ..errors import DataError, DataWarning, explain
from .failures import Failing, clear
from .generators import parts_of
from .reader import Place, close_iterator
from .workers import Watched, deaf, end_workers

__all__ = ["Memory", "Opened", "Turn"]


@dataclass
class Memory:
    """What is kept of a loader from epoch to epoch.

    Attributes:
        after: what the place of the next epoch's start holds beside its count; or why that is not known.
        here: whether the loader of this process is in that state.
        told: whether the warning of a replay was given.
        loader: the one that was read last; its persistent workers may be alive.
    """

    after: dict[str, Any] | Exception = field(default_factory=dict)
    here: bool = True
    told: bool = False
    loader: Any = None

    def between(self) -> dict[str, Any]:
        """What the place of the next epoch's start holds beside `"batch": 0`."""
        if isinstance(self.after, Exception):
            raise self.after
        return self.after

    def holds(self, place: Place) -> bool:
        """Whether a place is the one after the epoch that was read last, in this process: then there is nothing to restore."""
        after = self.after
        return (
            self.here
            and isinstance(after, dict)
            and bool(after)
            and all(place.get(key) is one for key, one in after.items())
        )

    def close(self) -> None:
        """End the workers that persist between epochs."""
        loader, self.loader = self.loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None and getattr(loader, "persistent_workers", False):
            end_workers(iterator, loader)


class Turn(NamedTuple):
    """Which epoch of which run is read.

    Attributes:
        what: how errors call the caller.
        seed: root of the streams.
        epoch: from 0 on.
    """

    what: str
    seed: int
    epoch: int

    def streams(self) -> rng.Isolated:
        """The global streams under which the epoch's data is read, from their beginning."""
        return rng.Isolated(rng.fold_in_host(self.seed, self.epoch, 0xDA7A))


class Opened(Iterator[Any]):
    """The batches of one epoch of an iterable, under streams that are a function of (seed, epoch).

    Args:
        found: the iterable.
        turn: which epoch.
        place: where to begin.
        memory: what is kept from epoch to epoch.
        streams: those under which a function made `found`; default: the epoch's, from their beginning.
    """

    steady = True  # see Reader

    def __init__(
        self, found: Any, turn: Turn, place: Place, memory: Memory, streams: rng.Isolated | None = None
    ) -> None:
        self.found, self.turn, self.start, self.memory = found, turn, place, memory
        self.own = streams is not None  # made by the user's function for us alone, so to be closed by us
        self.streams = turn.streams() if streams is None else streams
        self.iterator: Iterator[Any] | None = None
        self.read = place["batch"]
        self.over = False

    def __next__(self) -> Any:
        if self.over:
            raise StopIteration
        try:
            if self.iterator is None:
                self._begin()
                self.memory.loader = self.found
            batch = self._next()
        except StopIteration:
            self.over, self.iterator = True, None
            self._ended()
            raise
        except Exception as error:
            better = clear(error, self._failing())
            if better is error:
                raise
            raise better from error
        self.read += 1
        return batch

    def close(self) -> None:
        """End the reading before its end: the iterator, and workers, persistent ones too."""
        iterator, self.iterator, self.over = self.iterator, None, True
        if iterator is None or (iterator is self.found and not self.own):
            return  # one that the user passed can be resumed by him
        with self.streams:
            close_iterator(iterator)
        end_workers(iterator, self.found)

    def place(self) -> dict[str, Any]:
        """What stands in the place beside its count."""
        raise NotImplementedError

    def _next(self) -> Any:
        assert self.iterator is not None, "it has begun"
        with self.streams, Watched(self.iterator):
            return next(self.iterator)

    def _begin(self) -> None:
        raise NotImplementedError

    def _ended(self) -> None:
        raise NotImplementedError

    def _open(self) -> Iterator[Any]:
        with self.streams:
            if not isinstance(self.found, Iterator):
                for _, part in parts_of(self.found):
                    if callable(getattr(part, "set_epoch", None)):
                        part.set_epoch(self.turn.epoch)
            with deaf():
                return iter(self.found)

    def _skip(self) -> None:
        """Read again what was handed out before."""
        assert self.iterator is not None, "it has begun"
        wanted = self.start["batch"]
        if not wanted:
            return
        if not self.memory.told:
            self.memory.told = True
            warnings.warn(_replays(self), DataWarning, stacklevel=2)
        self.read = 0
        for count in range(wanted):
            try:
                Opened._next(self)  # one by one, as when they were read first
            except StopIteration:
                raise DataError(_short(self.turn.what, self.turn.epoch, wanted, count)) from None
            self.read += 1

    def _failing(self) -> Failing:
        return Failing(*self.turn, self.found, self.iterator, self.read)


def _replays(reading: Opened) -> str:
    n, kind = reading.start["batch"], type(reading.found).__name__
    once = isinstance(reading.found, Iterator) and not reading.own
    return explain(
        f"{reading.turn.what}: {n} batches of epoch {reading.turn.epoch} are read again and left out, to come to where the run goes on.",
        got=kind + (", which is taken to be at its beginning" if once else ""),
        cause="it has no state that could be saved",
        fix="ft.data.source(dataset, batch_size=64)   # is sought at once; or torchdata's StatefulDataLoader",
    )


def _short(what: str, epoch: int, wanted: int, count: int) -> str:
    return explain(
        f"{what}: the data ended before the place where the run is to go on.",
        where=f"epoch {epoch}",
        expected=f"at least {wanted} batches, which were read before",
        got=f"{count} batches",
        cause="the data has become shorter, or an iterator was passed that had gone on already",
    )
