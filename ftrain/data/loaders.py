"""A user's own loader or other iterable, read for one epoch; it is used as it is, never made again.

Laws
----
- What it draws from the global generators is a function of (seed, epoch); outside of it they are as the user left them.
- A loader with a state of its own is saved and restored by it; together with the global streams under which it is iterated and the
  generators that it owns, so that the batches after a restore are those that would have come. What a dataset draws inside of a
  worker is the exception: torchdata starts the workers anew, with the same seeds. A loader that is replayed has no such gap.
- Any other is read again from the epoch's beginning, with its own generators as they were then, and says so once.
- `set_epoch(epoch)` is called on the loader, its samplers and its dataset, where they have it.
- However the epoch ends, its iterator is closed and its workers have ended; persistent ones only go on after a complete epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import rng, tree
from ..errors import DataError, DataWarning, explain
from .failures import Failing, clear
from .frozen import freeze, thaw
from .generators import parts_of, put_generators, states_of
from .loader_facts import length_of, restores
from .reader import Place, close_iterator
from .workers import Watched, deaf, end_workers

_NOTHING: Any = object()

__all__ = ["Memory", "Opened", "Replayed", "Stateful", "Turn", "opened"]


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


class Replayed(Opened):
    """An iterable without a state of its own: a place in it is reached by reading up to it."""

    def _begin(self) -> None:
        put_generators(self.found, self.start.get("generators", {}), self.turn.what)
        self.generators = states_of(self.found, self.turn.what)
        self.iterator = self._open()
        self._skip()

    def place(self) -> dict[str, Any]:
        states = self.generators if hasattr(self, "generators") else self.start.get("generators")
        return {"generators": states} if states else {}

    def _ended(self) -> None:
        states = states_of(self.found, self.turn.what)
        self.memory.after, self.memory.here = ({"generators": states} if states else {}), True

    def _failing(self) -> Failing:
        return super()._failing()._replace(generators=getattr(self, "generators", None))


class Stateful(Opened):
    """A loader with `state_dict` and `load_state_dict`: it is asked for its state, and given it back.

    The place holds the loader's state, where the global streams were, and the generators that the loader owns, as they were when
    the epoch began and as they are now: torchdata makes the sampler's order again from the former, and goes on from the latter.

    After the last batch, the place is that of an epoch that is over (`"ended"`), which is found out by asking for one batch more
    where the length is not known: samplers and datasets begin again when they are given the state that they have there.
    """

    steady = False
    generators: dict[str, Any]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.base = 0  # of the batches that the iterator counts
        self.ahead: Any = _NOTHING  # a batch that was read to see whether there is one, or the error that came instead
        self.last: dict[str, Any] | Exception | None = None  # the place, where it is known already

    def _begin(self) -> None:
        start = self.start
        if start.get("ended"):
            # Nothing is left, and nothing is loaded: the next epoch begins with what this one left.
            self.generators, self.last = start.get("generators", {}), _extras(start)
            raise StopIteration
        put_generators(self.found, start.get("generators", {}), self.turn.what)
        self.generators = states_of(self.found, self.turn.what)
        if "loader" not in start or self.memory.holds(start):
            self.iterator = self._open()
            self._skip()
        elif start["batch"]:
            self.base = start["batch"]
            self.iterator = self._loaded(self.streams)
            put_generators(self.found, start.get("generators_now", {}), self.turn.what)
            self.streams.take(start["streams"])
        else:
            # An epoch was over. Taking that state back draws numbers, and is over before the next epoch draws its own.
            self._loaded(self.turn.streams())
            begun = self.streams.state()
            for _ in range(2):
                put_generators(self.found, start.get("generators", {}), self.turn.what)
                self.streams.take(begun)
                self.iterator = self._open()
                try:
                    self.ahead = super()._next()
                    return
                except StopIteration:
                    # StatefulDistributedSampler, told that all was read, first gives an epoch of what is left: nothing.
                    continue
            raise StopIteration

    def _loaded(self, streams: rng.Isolated) -> Iterator[Any] | None:
        """Give the loader its state back; in the middle of an epoch, gives its iterator."""
        try:
            with streams:
                for _, part in parts_of(self.found):
                    if callable(getattr(part, "set_epoch", None)):
                        part.set_epoch(self.turn.epoch)
                self.found.load_state_dict(thaw(self.start["loader"]))
                with deaf():
                    if not self.start["batch"]:
                        self.found.state_dict()  # torchdata loads when it is asked for something
                        return None
                    iterator: Iterator[Any] = iter(self.found)
                    return iterator
        except Exception as error:
            raise DataError(
                explain(
                    f"{self.turn.what}: the loader could not take back the state that it was saved with.",
                    where=f"epoch {self.turn.epoch}, after {self.start['batch']} batches",
                    expected="a loader made as it was then: same dataset, samplers, batch_size and num_workers",
                    got=f"{type(self.found).__name__}: {type(error).__name__}: {error}",
                )
            ) from error

    def _next(self) -> Any:
        self.last = None
        if self.ahead is _NOTHING:
            return super()._next()
        ahead, self.ahead = self.ahead, _NOTHING
        if isinstance(ahead, Exception):
            raise ahead
        return ahead

    def place(self) -> dict[str, Any]:
        if self.last is None:
            if self.iterator is None or (self.ahead is not _NOTHING and self.read == 0):
                return _extras(self.start)
            self._keep()
            length = length_of(self.found)
            if self.ahead is _NOTHING and (length is None or self.read == length):
                self._look()
        if isinstance(self.last, Exception):
            raise self.last
        assert self.last is not None, "it was kept"
        return self.last

    def _look(self) -> None:
        """See whether there is another batch; the place that was kept stays that of before."""
        kept = self.last
        try:
            self.ahead = super()._next()
        except StopIteration:
            self.over, self.iterator = True, None
            self._ended()
        except Exception as error:  # raised when the batch is due
            self.ahead = error
        else:
            self.last = kept

    def _now(self) -> dict[str, Any]:
        with self.streams:
            state = self.found.state_dict()
        now = states_of(self.found, self.turn.what)
        found = {"loader": freeze(state, "loader.state_dict()", self.turn.what), "streams": self.streams.state()}
        return {**found, **({"generators": self.generators, "generators_now": now} if now else {})}

    def _ended(self) -> None:
        if not (isinstance(self.last, dict) and self.last.get("ended")):
            self._keep()
        if isinstance(self.last, dict):
            self.last["ended"] = True
            now = self.last.get("generators_now", {})
            self.memory.after = {"loader": self.last["loader"], **({"generators": now} if now else {})}
        elif self.last is not None:
            self.memory.after = self.last
        self.memory.here = not self.start.get("ended")

    def close(self) -> None:
        if self.iterator is not None and self.last is None and self.read:
            self._keep()  # while the workers are there; without a look at what is left, which may take long
        self.ahead = _NOTHING
        super().close()

    def _keep(self) -> None:
        """What is asked for after the end, if it is."""
        try:
            self.last = self._now()
        except Exception as error:  # raised by whoever asks for it
            self.last = error

    def _failing(self) -> Failing:
        return super()._failing()._replace(generators=getattr(self, "generators", None), base=self.base)


def opened(found: Any, turn: Turn, place: Place, memory: Memory, streams: rng.Isolated | None = None) -> Opened:
    """An epoch of an iterable, from a place on.

    Raises:
        DataError: it is none.
    """
    if not isinstance(found, Iterable):
        raise DataError(
            explain(
                f"{turn.what}: the data function returned no iterable.",
                got=tree.describe(found),
                fix="return an iterable",
            )
        )
    kind = Stateful if restores(found) else Replayed
    return kind(found, turn, place, memory, streams)


def _extras(place: Place) -> dict[str, Any]:
    return {key: value for key, value in place.items() if key != "batch"}


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
