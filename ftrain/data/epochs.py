"""Epochs: whatever the user calls data, as a function `epoch -> iterator of batches`.

Laws
----
- The batches of an epoch are a function of (seed, epoch): two fits agree, two epochs differ where there is shuffling.
- torch's, numpy's and Python's global generators are, after each batch, as the user left them.
- An iterator is closed however the epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import DataError, explain
from .iterating import Memory, Turn
from .loader_facts import facts_of, length_of, sizes_of
from .loaders import opened
from .order import permutation
from .reader import Place, Reader

__all__ = ["Epochs", "as_epochs"]


class Epochs:
    """Data as a function of the epoch: `epochs(epoch)` reads it from its first batch, `epochs(epoch, place)` from a place on.

    Args:
        make: `(epoch, place) -> iterator` of the batches from `place` on. `place["batch"]` batches were handed out before; the
            rest of it is what the iterator's own method `place()` gave, where it has one.
        length: see below, as the others.

    Attributes:
        length: batches in an epoch, or None where that is not known beforehand.
        once: whether the data can be iterated only once (a generator, say).
        sizes: how many samples its batches have, each size once, or None where that is not known beforehand.
        facts: what tells this data from other data, as JSON (`{"kind": "arrays", "samples": 60000, "batch_size": 64, ...}`):
            a checkpoint keeps it, and resuming compares it.
        finish: `(batch, epoch, position) -> batch`, applied to each batch once its tensors lie on the state's device; or None.
        between: gives what the place of the next epoch's start holds beside `"batch": 0`, once an epoch is over; or None.
        endless: whether it is known that an epoch has no end.
        closing: ends what outlives an epoch (persistent workers), once the run is over; or None.
    """

    def __init__(
        self,
        make: Callable[[int, Place], Iterator[Any]],
        length: int | None,
        once: bool = False,
        sizes: tuple[int, ...] | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        finish: Callable[[Any, int, int], Any] | None = None,
        between: Callable[[], Mapping[str, Any]] | None = None,
        closing: Callable[[], None] | None = None,
        endless: bool = False,
    ) -> None:
        self._make = make
        self.length = length
        self.once = once
        self.endless = endless
        self.sizes = sizes
        self.facts = dict(facts or {})
        self.finish = finish
        self.between = between
        self.closing = closing

    def __call__(self, epoch: int, place: Place | None = None) -> Reader:
        start = place or {"batch": 0}
        skip = start.get("skip", 0)  # see Reader.place: after an error
        if skip:
            start = {key: value for key, value in start.items() if key != "skip"} | {"batch": start["batch"] - skip}
        batches = self._make(epoch, start)
        # A function of the epoch may give data that has a reader already: two would read ahead of each other.
        reader = batches if isinstance(batches, Reader) else Reader(batches, start["batch"], start)
        try:
            for count in range(skip):
                try:
                    next(reader)
                except StopIteration:
                    raise DataError(_short(epoch, start["batch"] + skip, start["batch"] + count)) from None
        except BaseException:
            reader.close()
            raise
        return reader

    def start(self) -> dict[str, Any]:
        """The place at which the next epoch begins, once an epoch is over."""
        return {"batch": 0, **({} if self.between is None else self.between())}

    def close(self) -> None:
        """End what outlives an epoch; for the end of a run. The data can be read again."""
        if self.closing is not None:
            self.closing()

    def check(self, what: str) -> None:
        """Raise where it is known beforehand that there are no batches."""
        if self.length == 0:
            raise DataError(
                explain(
                    f"{what}: the data has no batches.",
                    expected="at least one batch",
                    got="length 0",
                    cause="an empty dataset, or a loader with drop_last=True and fewer samples than a batch",
                )
            )


def _short(epoch: int, wanted: int, count: int) -> str:
    return explain(
        "the data ended before the place where the run is to go on.",
        where=f"epoch {epoch}",
        expected=f"at least {wanted} batches, which were read before",
        got=f"{count} batches",
        cause="the data has become shorter",
    )


def as_epochs(
    data: Any, *, seed: int = 0, batch_size: int | None = None, shuffle: bool = False, what: str = "ft.fit"
) -> Epochs:
    """Make epochs of what the user passed as data.

    Args:
        data: a list of batches, a DataLoader or any other iterable of batches, a function `epoch -> iterable`, or (with
            `batch_size`) a tuple, list or dict of arrays of equal length.
        seed: root of the shuffling, and of the generators under which loaders and other code of the user are iterated.
        batch_size: samples in a batch, for arrays.
        shuffle: whether arrays are shuffled, anew in each epoch.
        what: how errors call the caller.

    Raises:
        DataError: arrays of unequal length, no data, or something that cannot be iterated.

    >>> import torch
    >>> from ftrain.data import as_epochs
    >>> epochs = as_epochs({"x": torch.arange(5)}, batch_size=2)
    >>> [batch["x"].tolist() for batch in epochs(0)], epochs.length
    ([[0, 1], [2, 3], [4]], 3)
    """
    if isinstance(data, Epochs):
        return data
    if hasattr(data, "epochs"):  # `Windows`, which this file cannot name: it stands above
        made: Epochs = data.epochs(seed=seed, batch_size=batch_size, shuffle=shuffle, what=what)
        return made
    if batch_size is not None:
        return _arrays(data, batch_size, seed, shuffle, what)
    if isinstance(data, (list, tuple)):
        sized = [len(one) for one in data if isinstance(one, (Tensor, np.ndarray)) and one.ndim > 0]
        if isinstance(data, tuple) and len(data) > 1 and len(sized) == len(data) and len(set(sized)) == 1:
            raise DataError(
                explain(
                    f"{what}: the data is a tuple of {len(data)} arrays of {sized[0]} rows, without batch_size.",
                    expected="a list of batches, or arrays with batch_size=",
                    fix=f"{what}(state, step, data, batch_size=64)   # or a list, if each array is a batch",
                )
            )
        batches = data
        n = len(batches)

        def rest(epoch: int, place: Place) -> Iterator[Any]:
            if place["batch"] > n:
                raise DataError(_short(epoch, place["batch"], n))
            return iter(batches) if not place["batch"] else (batches[i] for i in range(place["batch"], n))

        return Epochs(rest, n, facts={"kind": "list", "batches": n})
    if isinstance(data, (Mapping, Tensor, np.ndarray)):
        raise DataError(
            explain(
                f"{what}: the data is {tree.describe(data)}, which is arrays, not batches.",
                expected="an iterable of batches, or arrays with batch_size=",
                fix=f"{what}(state, step, data, batch_size=64)",
            )
        )
    if callable(data) and not isinstance(data, Iterable):
        called = _Called(data, seed, what)
        return Epochs(
            called,
            None,
            facts={"kind": "function"},
            finish=called.finish,
            between=called.memory.between,
            closing=called.memory.close,
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, torch.utils.data.Dataset)):
        raise DataError(
            explain(
                f"{what}: the data cannot be iterated in batches.",
                expected="an iterable of batches, a DataLoader, a function epoch -> iterable, or arrays with batch_size=",
                got=type(data).__name__,
                fix=_loader_for(data),
            )
        )
    once = isinstance(data, Iterator)
    memory = Memory()
    return Epochs(
        lambda epoch, place: opened(data, Turn(what, seed, epoch), place, memory),
        None if once else length_of(data),
        once,
        sizes_of(data),
        facts=facts_of(data),
        between=memory.between,
        closing=memory.close,
    )


def _loader_for(data: Any) -> str | None:
    """What makes batches of a torch dataset; torch refuses shuffle=True for a stream."""
    if isinstance(data, torch.utils.data.IterableDataset):
        return (
            "torch.utils.data.DataLoader(dataset, batch_size=64)\n"
            "torch.utils.data.DataLoader(dataset, batch_size=None)   # where it gives batches already"
        )
    if isinstance(data, torch.utils.data.Dataset):
        return "torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)"
    return None


class _Called:
    """Makes an epoch's batches from what the user's function gives for it, which is sought by its own means where it has some.

    The function is called under the epoch's streams. Where it gives one loader for several epochs, that one's state is carried
    over from epoch to epoch; one that it makes for an epoch begins as it is.
    """

    def __init__(self, function: Callable[[int], Any], seed: int, what: str) -> None:
        self.function, self.seed, self.what = function, seed, what
        self.memory = Memory()
        self._finish: Callable[[Any, int, int], Any] | None = None

    def __call__(self, epoch: int, place: Place) -> Iterator[Any]:
        turn = Turn(self.what, self.seed, epoch)
        streams = turn.streams()
        with streams:
            found = self.function(epoch)
        self._finish = None
        if isinstance(found, (Epochs, list, tuple)) or hasattr(found, "epochs"):
            epochs = as_epochs(found, seed=self.seed, what=self.what)
            self._finish = epochs.finish
            return epochs(epoch, place)
        if (
            not place["batch"] and len(place) > 1
        ):  # a state that was left by the loader of the epoch before: the same one?
            if self.memory.holds(place):
                before = self.memory.loader
            else:
                with Turn(self.what, self.seed, epoch - 1).streams():
                    before = self.function(epoch - 1)
            if before is not found:
                place = {"batch": 0}
        return opened(found, turn, place, self.memory, streams)

    def finish(self, batch: Any, epoch: int, position: int) -> Any:
        """As the data of this epoch wants it."""
        return batch if self._finish is None else self._finish(batch, epoch, position)


def _arrays(data: Any, batch_size: int, seed: int, shuffle: bool, what: str) -> Epochs:
    leaves = tree.leaves(data)
    if isinstance(data, torch.utils.data.DataLoader) or not leaves:
        raise DataError(
            explain(f"{what}: batch_size= goes with arrays.", got=type(data).__name__, fix="leave out batch_size=")
        )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(
            explain(f"{what}: batch_size={batch_size!r} is not a number of samples.", expected="an integer >= 1")
        )
    if isinstance(data, (list, tuple)) and not all(isinstance(one, (Tensor, np.ndarray)) for one in data):
        raise DataError(
            explain(
                f"{what}: batch_size= goes with arrays, but this is a list of {tree.describe(data[0])}.",
                expected="a tuple or dict of arrays of equal length",
                fix="leave out batch_size= where the data is a list of batches",
            )
        )
    sizes: dict[str, int] = {}
    for path, leaf in tree.items(data, root="data"):
        odd = isinstance(leaf, np.ndarray) and leaf.dtype.kind not in "biufc"
        if not isinstance(leaf, (Tensor, np.ndarray)) or leaf.ndim == 0 or odd:
            raise DataError(
                explain(
                    f"{what}: batch_size= goes with arrays.",
                    where=path,
                    expected="a tensor or numeric numpy array with at least one dimension",
                    got=tree.describe(leaf),
                    fix="leave out batch_size= where the data is an iterable of batches",
                )
            )
        sizes[path] = len(leaf)
    n = next(iter(sizes.values()))
    for path, size in sizes.items():
        if size != n:
            raise DataError(
                explain(
                    f"{what}: the arrays differ in length.",
                    where=path,
                    expected=f"{n} samples, as {next(iter(sizes))}",
                    got=f"{size}",
                )
            )
    arrays = tree.map(_tensor, data)

    def make(epoch: int, place: Place) -> Iterator[Any]:
        order = torch.from_numpy(permutation(n, seed, epoch)) if shuffle else None
        return _slices(arrays, n, batch_size, order, place["batch"] * batch_size)

    rows = {min(batch_size, n), n % batch_size} - {0}
    facts = {"kind": "arrays", "samples": n, "batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    return Epochs(make, -(-n // batch_size), sizes=tuple(sorted(rows, reverse=True)), facts=facts)


def _tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    return torch.from_numpy(leaf if leaf.flags.writeable else leaf.copy())


def _slices(arrays: Any, n: int, batch_size: int, order: Tensor | None, first: int = 0) -> Iterator[Any]:
    leaves, structure = tree.leaves(arrays), tree.structure(arrays)
    orders: dict[torch.device, Tensor] = (
        {} if order is None else {leaf.device: order.to(leaf.device) for leaf in leaves}
    )
    for start in range(first, n, batch_size):
        stop = min(start + batch_size, n)
        if order is None:
            rows = [leaf[start:stop] for leaf in leaves]
        else:
            rows = [leaf.index_select(0, orders[leaf.device][start:stop]) for leaf in leaves]
        yield tree.unflatten(structure, rows)
