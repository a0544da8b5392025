"""What a source is, and how it is read: by position, from a position on, and as the epochs of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..errors import ArgumentError, DataError, explain
from .batches import to_device
from .checks import integer
from .epochs import Epochs
from .loading import Direct, Loaded, Loading, Pool, build
from .mapping import DeviceMap, Finish
from .node import At, Node
from .reader import Reader

__all__ = ["Options", "Readable"]


class Options(NamedTuple):
    """What a source says beside which items it has."""

    seed: int | None = None
    loading: Loading = Loading()
    finish: tuple[DeviceMap, ...] = ()


class Readable:
    """The reading half of a `Source`.

    Args:
        node: which items it has.
        options: under which seed, and how they are made.
    """

    __slots__ = ("node", "options")

    def __init__(self, node: Node, options: Options) -> None:
        self.node = node
        self.options = options

    # -- what it is ---------------------------------------------------------------------------------------------------------------

    @property
    def batched(self) -> bool:
        """Whether its items are batches."""
        return self.node.batched

    def __repr__(self) -> str:
        return f"source({'.'.join(self._chain())})"

    def _chain(self) -> list[str]:
        return [*self.node.chain(), *(one.name() for one in self.options.finish)]

    def __len__(self) -> int:
        if self.node.endless or not self.node.steady:
            raise ArgumentError(
                explain(
                    "this source has no length.",
                    where=repr(self),
                    cause="it is endless" if self.node.endless else "its length changes from epoch to epoch",
                    fix="source.take(n)",
                )
            )
        return int(self.node.size(self._at(0, 0)))

    def __bool__(self) -> bool:
        return True  # not its length, which may take a scan, and which an endless source has not

    def __getitem__(self, index: int) -> Any:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise ArgumentError(
                explain(
                    "a source is indexed by one position.",
                    got=repr(index),
                    fix="source.skip(2).take(3)" if isinstance(index, slice) else "source[0]",
                )
            )
        at = self._at(0, 0)
        n = self.node.size(at)
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < n:
            raise IndexError(f"index {index} of a source with {n:g} items")
        return self._finished(build(self.node, at, position), 0, position, at.seed)

    def __iter__(self) -> Iterator[Any]:
        return self.at()

    def at(self, *, epoch: int = 0, start: int = 0, seed: int = 0, device: torch.device | str | None = None) -> Reader:
        """Read an epoch from a position on, without a trainer.

        Args:
            epoch: which epoch.
            start: how many items (batches) of it are left out.
            seed: where the source has no seed of its own.
            device: where the batches go before the functions of `map(fn, device=True)` are applied; None: they stay where they are.

        Returns:
            An iterator with `close()`, which ends its workers; so does reading it to the end, or letting go of it.

        >>> import torch, ftrain as ft
        >>> data = ft.data.source(torch.arange(6), batch_size=2)
        >>> [batch.tolist() for batch in data.at(epoch=3, start=1)]
        [[2, 3], [4, 5]]
        """
        integer(epoch, "Source.at", "epoch", least=0)
        integer(start, "Source.at", "start", least=0)
        at = self._at(seed, epoch)
        items = self._read(at, start, None)
        if device is not None or self.options.finish:
            items = _Finished(self, items, at, start, None if device is None else torch.device(device))
        return Reader(items, start)

    # -- as data ------------------------------------------------------------------------------------------------------------------

    def epochs(
        self, *, seed: int = 0, batch_size: int | None = None, shuffle: bool = False, what: str = "Source.epochs"
    ) -> Epochs:
        """What `ft.fit`, `ft.loop`, `ft.evaluate` and `ft.predict` read.

        Args:
            seed: where the source has no seed of its own.
            batch_size: samples in a batch, where the source is not batched yet.
            shuffle: for arrays, and of no effect here: a source is in the order that it says itself.
            what: how errors call the caller.

        Raises:
            DataError: single items without `batch_size`, another batch size than the source's own, or no items at all.
        """
        del shuffle  # fit's default for arrays is True, which nobody asked for
        found = self._batched(batch_size, what)
        node, at = found.node, found._at(seed, 0)
        length = None if node.endless or not node.steady else int(node.size(at))
        if length == 0:
            raise DataError(
                explain(
                    f"{what}: the data has no batches.", where=repr(self), expected="at least one batch", got="length 0"
                )
            )
        pool = Pool(node, self.options.loading) if self.options.loading.workers else None
        return Epochs(
            lambda epoch, place: found._read(At(at.seed, epoch), place["batch"], pool),
            length,
            sizes=None if found.options.finish else node.rows(),
            facts=found._facts(at.seed, length),
            finish=found._finish(at.seed),
            closing=None if pool is None else pool.close,
            endless=node.endless,
        )

    def batch(self, n: int) -> Self:
        """See `Source.batch`."""
        raise NotImplementedError

    def _batched(self, batch_size: int | None, what: str) -> Self:
        if not self.batched:
            if batch_size is not None:
                return self.batch(batch_size)
            raise DataError(
                explain(
                    f"{what}: the source gives single items, not batches.",
                    where=repr(self),
                    fix="source.batch(64)   # or ft.data.source(data, batched=True), where each item is a batch already",
                )
            )
        own = _facts(self.node).get("batch_size")
        if batch_size is not None and batch_size != own:
            raise DataError(
                explain(
                    f"{what}: batch_size is given for a source that has batches already.",
                    where=repr(self),
                    got=f"batch_size={batch_size}",
                    fix="leave out batch_size=",
                )
            )
        return self

    def _facts(self, seed: int, length: int | None) -> dict[str, Any]:
        return {
            **_facts(self.node),
            "batches": length,
            "shuffle": self.node.shuffles > 0,
            "seed": seed,
            "chain": self._chain(),
        }

    def _at(self, seed: int, epoch: int) -> At:
        return At(seed if self.options.seed is None else self.options.seed, epoch)

    def _read(self, at: At, start: int, pool: Pool | None) -> Iterator[Any]:
        if not self.options.loading.workers:
            return Direct(self.node, at, start)
        if pool is not None and not pool.busy:
            return Loaded(pool, at, start, keep=True)
        # a reading beside another one, or by itself, has workers of its own
        return Loaded(Pool(self.node, self.options.loading), at, start, keep=False)

    def _finish(self, seed: int) -> Callable[[Any, int, int], Any] | None:
        return Finish(self.options.finish, seed) if self.options.finish else None

    def _finished(self, item: Any, epoch: int, position: int, seed: int) -> Any:
        finish = self._finish(seed)
        return item if finish is None else finish(item, epoch, position)


class _Finished(Iterator[Any]):
    """Batches on a device, with the functions of the device applied."""

    def __init__(
        self, owner: Readable, batches: Iterator[Any], at: At, start: int, device: torch.device | None
    ) -> None:
        self.owner, self.batches, self.at, self.position, self.device = owner, batches, at, start, device

    def __next__(self) -> Any:
        batch = next(self.batches)
        if self.device is not None:
            batch = to_device(batch, self.device)
        found = self.owner._finished(batch, self.at.epoch, self.position, self.at.seed)
        self.position += 1
        return found

    def close(self) -> None:
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()


def _facts(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while True:
        found = {**node.facts(), **found}
        if not node.inputs or "kind" in found:
            return found
        node = node.inputs[0]
