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

from .. import rng, tree
from ..errors import DataError, explain
from .order import permutation
from .reader import Place, Reader, close_iterator

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
    ) -> None:
        self._make = make
        self.length = length
        self.once = once
        self.sizes = sizes
        self.facts = dict(facts or {})
        self.finish = finish
        self.between = between

    def __call__(self, epoch: int, place: Place | None = None) -> Reader:
        start = place or {"batch": 0}
        skip = start.get("skip", 0)  # see Reader.place: after an error
        if skip:
            start = {key: value for key, value in start.items() if key != "skip"} | {"batch": start["batch"] - skip}
        reader = Reader(self._make(epoch, start), start["batch"], start)
        try:
            for _ in range(skip):
                next(reader)
        except BaseException:
            reader.close()
            raise
        return reader

    def start(self) -> dict[str, Any]:
        """The place at which the next epoch begins, once an epoch is over."""
        return {"batch": 0, **({} if self.between is None else self.between())}

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
        return Epochs(
            lambda epoch, place: _isolated(lambda: data(epoch), seed, epoch, what, place),
            None,
            facts={"kind": "function"},
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, torch.utils.data.Dataset)):
        dataset = isinstance(data, torch.utils.data.Dataset)
        raise DataError(
            explain(
                f"{what}: the data cannot be iterated in batches.",
                expected="an iterable of batches, a DataLoader, a function epoch -> iterable, or arrays with batch_size=",
                got=type(data).__name__,
                fix="torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)" if dataset else None,
            )
        )
    once = isinstance(data, Iterator)
    length = None if once else _length(data)
    facts = {"kind": type(data).__name__, "batches": length}
    return Epochs(
        lambda epoch, place: _isolated(lambda: data, seed, epoch, what, place), length, once, _sizes(data), facts=facts
    )


def _sizes(data: Any) -> tuple[int, ...] | None:
    """How many samples the batches of a DataLoader have, where it batches by itself and leaves collation to the default."""
    if not isinstance(data, torch.utils.data.DataLoader) or isinstance(data.dataset, torch.utils.data.IterableDataset):
        return None
    plain = type(data.batch_sampler) is torch.utils.data.BatchSampler
    if not plain or data.collate_fn is not torch.utils.data.default_collate:
        return None
    try:
        n = len(data.sampler)  # type: ignore[arg-type]  # a sampler may have no length: the TypeError below
    except (TypeError, NotImplementedError):
        return None
    size = int(data.batch_size or 1)
    rows = {size if n >= size else 0, 0 if data.drop_last else n % size} - {0}
    return tuple(sorted(rows, reverse=True))


def _length(data: Any) -> int | None:
    """Batches in an epoch, where the data knows. An IterableDataset's length is a guess and does not count."""
    loader = isinstance(data, torch.utils.data.DataLoader)
    if loader and isinstance(data.dataset, torch.utils.data.IterableDataset):
        return None
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def _isolated(make: Callable[[], Any], seed: int, epoch: int, what: str, place: Place) -> Iterator[Any]:
    """Iterate the user's code under generators that are a function of (seed, epoch)."""
    streams = rng.Isolated(rng.fold_in_host(seed, epoch, 0xDA7A))
    with streams:
        found = make()
        if not isinstance(found, Iterable):
            raise DataError(
                explain(
                    f"{what}: the data function returned no iterable.",
                    got=tree.describe(found),
                    fix="return an iterable",
                )
            )
        iterator = iter(found)
    try:
        with streams:
            for _ in range(place["batch"]):
                next(iterator, None)
        while True:
            with streams:
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch
    finally:
        # A generator is closed by us only where it is ours: one that the user passed can be resumed by him.
        if iterator is not found:
            with streams:
                close_iterator(iterator)
        del iterator  # a DataLoader's workers end with its iterator


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
