"""Windows: several loader batches handed to one step, which accumulates their gradients.

Laws
----
- The batches of all windows, one after the other, are the batches of the data (but for those that `short="drop"` leaves out).
- Every window but the last of an epoch has as many batches as its size says; with `short="carry"` that one has, too.
- The place in the middle of an epoch holds the batches that were read but not handed out, so that windows can be carried over
  the end of a process as they are over the end of an epoch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from .. import tree
from ..errors import DataError, explain
from .epochs import Epochs, as_epochs
from .reader import Place, Reader

__all__ = ["Window", "Windows", "ungrouped", "window"]

Short = Literal["step", "drop", "carry"]
Size = int | Callable[[int], int]
Sizes = Size | Mapping[int, int]


@tree.register("batches")
@dataclass(frozen=True)
class Window:
    """Several batches for one step. A step made by `ft.train_step` accumulates over them.

    >>> import torch, ftrain as ft
    >>> ft.data.Window((torch.ones(4, 2), torch.ones(4, 2))).batches[0].shape
    torch.Size([4, 2])
    """

    batches: tuple[Any, ...]


@dataclass(frozen=True, repr=False)
class Windows:
    """Data whose batches are grouped into windows; made by `window`, and taken by `fit` and `loop` as data.

    `evaluate`, `predict` and `update_bn` take no steps, so to them it is the data inside, all of it.
    """

    data: Any
    size: Size
    short: Short
    batch_size: int | None = None

    def epochs(self, *, seed: int, batch_size: int | None, shuffle: bool, what: str) -> Epochs:
        """What `as_epochs` makes of it; what is carried from epoch to epoch belongs to this one run."""
        if self.batch_size is not None and batch_size is not None and batch_size != self.batch_size:
            raise DataError(
                explain(
                    f"{what}: batch_size is given twice, and differs.",
                    got=f"window(batch_size={self.batch_size}), batch_size={batch_size}",
                    fix=f"ft.data.window(data, {self.size!r}, batch_size={batch_size})",
                )
            )
        own = batch_size if self.batch_size is None else self.batch_size
        source = as_epochs(self.data, seed=seed, batch_size=own, shuffle=shuffle, what=what)
        size = (
            self.size
            if isinstance(self.size, int)
            else repr(self.size)
            if isinstance(self.size, _Steps)
            else "function"
        )
        facts = {**source.facts, "window": size, "short": self.short}
        grouped = _Grouped(source, self.size, self.short)
        return Epochs(
            grouped,
            self._length(source),
            source.once,
            source.sizes,
            facts=facts,
            finish=None if source.finish is None else _each(source.finish, self.size),
            between=lambda: {"inner": source.start(), "over": _places(grouped.over)},
            closing=source.close,
            endless=source.endless,
        )

    def __repr__(self) -> str:
        return f"window({type(self.data).__name__}, {self.size!r}, short={self.short!r})"

    def _length(self, source: Epochs) -> int | None:
        """Windows in an epoch, where that is the same in every epoch."""
        if source.length is None or not isinstance(self.size, int):
            return None
        whole, rest = divmod(source.length, self.size)
        if self.short == "carry":
            return whole if rest == 0 else None
        return whole + (1 if rest and self.short == "step" else 0)


class _Grouped:
    """Makes an epoch's windows. Keeps, for `short="carry"`, the batches that the epoch before left over."""

    def __init__(self, source: Epochs, size: Size, short: Short) -> None:
        self.source, self.size, self.short = source, size, short
        self.over: list[Any] = []

    def __call__(self, epoch: int, place: Place) -> Iterator[Any]:
        size = self.size if isinstance(self.size, int) else _checked(self.size(epoch), f"the size for epoch {epoch}")
        waiting, self.over = self.over, []
        if "over" in place:
            waiting = [one["batch"] if "batch" in one else _Kept(one["leaves"]) for one in place["over"]]
        elif place["batch"]:  # a place that somebody counted
            place = {"batch": place["batch"], "inner": {"batch": place["batch"] * size - len(waiting)}}
        windows = _Grouping(self, self.source(epoch, place.get("inner")), waiting, size)
        for _ in range(place.get("skip", 0)):
            next(windows, None)
        return windows


class _Grouping(Iterator[Any]):
    """The windows of one epoch."""

    def __init__(self, owner: _Grouped, batches: Reader, waiting: list[Any], size: int) -> None:
        self.owner, self.batches, self.waiting, self.size = owner, batches, waiting, size

    def __next__(self) -> Window:
        kept = any(isinstance(one, _Kept) for one in self.waiting)
        # A batch that is read tells how those that were kept are built; so there has to be one.
        while len(self.waiting) < self.size or (kept and isinstance(self.waiting[-1], _Kept)):
            try:
                self.waiting.append(next(self.batches))
            except StopIteration:
                return self._last()
        if kept:
            structure = tree.structure(self.waiting[-1])
            self.waiting = [
                tree.unflatten(structure, one.leaves) if isinstance(one, _Kept) else one for one in self.waiting
            ]
        full, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
        return Window(tuple(full))

    def _last(self) -> Window:
        waiting, self.waiting = self.waiting, []
        if len(waiting) >= self.size:  # of kept ones: a window is due, and nothing tells how they are built
            raise DataError(
                explain(
                    "ft.data.window: batches that were carried into an epoch without batches of its own cannot be built again.",
                    expected="batches of dicts, lists and tuples, or one more batch in this epoch",
                    got=f"{len(waiting)} batches, carried over by an earlier process",
                    cause="the size of the windows shrinks, and an epoch is shorter than what is carried into it",
                )
            )
        if waiting and self.owner.short == "step":
            return Window(tuple(waiting))
        if self.owner.short == "carry":
            self.owner.over.extend(waiting)
        raise StopIteration

    def place(self) -> dict[str, Any]:
        return {"inner": self.batches.place(), "over": _places(self.waiting or self.owner.over)}

    def close(self) -> None:
        self.batches.close()


class _Kept:
    """A batch that was read in another process, and is built of other things than dicts, lists and tuples: its leaves."""

    def __init__(self, leaves: list[Any]) -> None:
        self.leaves = leaves


def _places(batches: list[Any]) -> list[dict[str, Any]]:
    """Batches as a place can hold them: as they are, or by their leaves where they are built of the user's own classes."""
    return [
        {"leaves": one.leaves}
        if isinstance(one, _Kept)
        else {"batch": one}
        if _plain(one)
        else {"leaves": tree.leaves(one)}
        for one in batches
    ]


def _plain(node: Any) -> bool:
    """Whether a checkpoint can hold a batch as it is."""
    if type(node) in (list, tuple):
        return all(_plain(one) for one in node)
    if type(node) is dict:
        return all(type(key) is str and _plain(one) for key, one in node.items())
    return type(node) in (Tensor, np.ndarray, type(None), bool, int, float, str, bytes)


def _each(finish: Callable[[Any, int, int], Any], size: Size) -> Callable[[Any, int, int], Any]:
    """`finish` for each batch in a window, under the position that it would have by itself."""

    def windows(found: Window, epoch: int, position: int) -> Window:
        n = size if isinstance(size, int) else size(epoch)
        return Window(tuple(finish(one, epoch, position * n + i) for i, one in enumerate(found.batches)))

    return windows


class _Steps:
    """A size that changes at epochs: `{0: 1, 5: 4}` is 1 before epoch 5, and 4 from there on."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.sizes = dict(sorted(sizes.items()))

    def __call__(self, epoch: int) -> int:
        return next(size for first, size in reversed(self.sizes.items()) if first <= epoch)

    def __repr__(self) -> str:
        return repr(self.sizes)


def window(data: Any, size: Sizes, *, short: Short = "step", batch_size: int | None = None) -> Windows:
    """Group the batches of a loader, so that each step sees several and accumulates their gradients.

    Args:
        data: as for `ft.fit`: an `ft.data.source`, a list of batches, a DataLoader, a function `epoch -> iterable`, or arrays with
            `batch_size=`.
        size: batches in a window; or `{epoch: size}`, each from that epoch on, as `{0: 1, 5: 4}`; or a function `epoch -> size`. A
            compiled step is compiled once for each size.
        short: what becomes of the batches that are left at the end of an epoch: `"step"` makes a short window of them, which
            counts for as much as it weighs; `"drop"` leaves them out; `"carry"` puts them at the front of the next epoch (what is
            left at the end of the run is not used).
        batch_size: for arrays: samples in a batch.

    Returns:
        Data for `ft.fit` or `ft.loop`; `state.step` counts windows, `state.samples` all samples in them.

    Raises:
        DataError: a size that is not a positive integer, or an unknown policy.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> data = ft.data.window([torch.ones(4, 2)] * 5, 2)
    >>> [(tick.step, tick.samples) for tick in ft.loop(ft.init(model, tx), step, data)]
    [(1, 8), (2, 16), (3, 20)]
    """
    if short not in get_args(Short):
        raise DataError(
            explain(
                f"ft.data.window: there is no policy short={short!r}.",
                expected=", ".join(get_args(Short)),
                fix='short="step"   # a short window at the end of an epoch counts for as much as it weighs',
            )
        )
    if isinstance(size, Mapping):
        size = _by_epoch(size)
    if not callable(size):
        _checked(size, "the size")
    else:
        _check_function(size)
    if isinstance(data, Windows):
        raise DataError(explain("ft.data.window: the data is grouped into windows already.", got=repr(data)))
    return Windows(data, size, short, batch_size)


def ungrouped(data: Any, *, seed: int, batch_size: int | None, what: str) -> Epochs:
    """Epochs for what takes no steps (an evaluation): of windows, the data inside, all of it; else as `as_epochs`.

    >>> from ftrain.data.window import ungrouped, window
    >>> list(ungrouped(window([1, 2, 3], 2), seed=0, batch_size=None, what="ft.evaluate")(0))
    [1, 2, 3]
    """
    if isinstance(data, Windows):
        data, batch_size = data.data, data.batch_size if batch_size is None else batch_size
    return as_epochs(data, seed=seed, batch_size=batch_size, what=what)


def _check_function(size: Callable[[int], int]) -> None:
    try:
        inspect.signature(size).bind(0)
    except TypeError:
        raise DataError(
            explain(
                "ft.data.window: the size is a function that cannot be called with an epoch.",
                expected="a function epoch -> integer",
                got=f"{getattr(size, '__name__', type(size).__name__)}{inspect.signature(size)}",
                fix="ft.data.window(data, lambda epoch: 1 if epoch < 5 else 4)",
            )
        ) from None
    except ValueError:  # a callable without a signature, as some in C
        return


def _by_epoch(sizes: Mapping[int, int]) -> _Steps:
    for epoch, size in sizes.items():
        _checked(size, f"the size from epoch {epoch!r} on")
    whole = all(isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 for epoch in sizes)
    if not whole or 0 not in sizes:
        raise DataError(
            explain(
                "ft.data.window: the sizes do not say what is used from the first epoch on."
                if whole
                else "ft.data.window: the sizes are not those of epochs.",
                expected="{epoch: size}, from epoch 0 on",
                got=repr(dict(sizes)),
                fix="ft.data.window(data, {0: 1, 5: 4})",
            )
        )
    return _Steps(sizes)


def _checked(size: object, what: str) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(
            explain(
                f"ft.data.window: {what} is {size!r}.",
                expected="an integer >= 1 (batches in a window), or a function epoch -> integer",
                got=tree.describe(size),
                fix="ft.data.window(data, 4)",
            )
        )
    return size
