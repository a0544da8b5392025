"""A user's own loader or other iterable, read for one epoch; it is used as it is, never made again.

Laws
----
- What it draws from the global generators is a function of (seed, epoch); outside of it they are as the user left them.
- A loader with a state of its own is saved and restored by it; together with the global streams under which it is iterated and the
  generators that it owns, so that the batches after a restore are those that would have come. What a dataset draws inside of a
  worker is the exception, of which a warning tells: torchdata starts the workers anew, with the same seeds. A loader that is
  replayed has no such gap.
- Any other is read again from the epoch's beginning, with its own generators as they were then, and says so once.
- `set_epoch(epoch)` is called on the loader, its samplers and its dataset, where they have it.
- However the epoch ends, its iterator is closed and its workers have ended; persistent ones only go on after a complete epoch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from .. import rng, tree
from ..errors import DataError, DataWarning, explain
from .failures import Failing
from .frozen import freeze, thaw
from .generators import parts_of, put_generators, states_of
from .iterating import Memory, Opened, Turn
from .loader_facts import length_of, restores
from .reader import Place
from .workers import deaf

__all__ = ["Replayed", "Stateful", "opened"]

_NOTHING: Any = object()


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
            self._warn()
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

    def _warn(self) -> None:
        """Tell once of what torchdata does not save: the generators in its workers, which it seeds when it starts them."""
        if self.memory.told or not isinstance(self.found, DataLoader) or not self.found.num_workers:
            return
        self.memory.told = True
        warnings.warn(
            f"{self.turn.what}: {type(self.found).__name__} goes on in the middle of an epoch, but numbers that are drawn in its workers "
            "begin anew; ft.data.source(dataset, ..., workers=n) goes on exactly",
            DataWarning,
            stacklevel=2,
        )

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
