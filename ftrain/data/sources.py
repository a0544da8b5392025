"""Sources: data whose order is a function of (seed, epoch), so that any position is reached by seeking, not by replaying.

Laws
----
- A source is a description. Its methods give new sources; it opens nothing, and what it keeps (an order, a mask) a new one would compute again.
- Batch b of epoch e is a function of (seed, e, b): the same after a pickle, in a worker process, and wherever reading began. Code of the
  user (datasets, functions) that draws from the global generators of torch, numpy or random draws what belongs to the position.
- To come to batch 1 000 000 takes as long as to come to batch 10.
- Two shuffles, and two functions with random numbers, in one chain are independent; so are the inputs of a `zip`, `chain` or `mix`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from .. import tree
from ..errors import ArgumentError, DataError, explain
from .batching import Batched, Last
from .caching import Cached
from .checks import amount, integer, one_of
from .loading import Loading
from .mapping import DeviceMap, Mapped, takes_rng
from .node import Node
from .packing import Packed
from .reading import Readable
from .routes import Filtered, Repeated, Shuffled, Sliced, Strided

__all__ = ["Source"]


class Source(Readable):
    """Data that can be sought. Made by `ft.data.source` and its like; every method gives a new source.

    `len(source)` is its length, where that is the same in every epoch; `source[i]` is item i of epoch 0, and iterating it reads
    epoch 0, both under seed 0 where the source has no seed of its own. As data for `ft.fit` and its like, the seed is the state's.

    >>> import torch, ftrain as ft
    >>> data = ft.data.source({"x": torch.arange(10)}).filter(lambda item: item["x"] % 2 == 0).batch(2)
    >>> [batch["x"].tolist() for batch in data], len(data)
    ([[0, 2], [4, 6], [8]], 3)
    """

    __slots__ = ()

    def _then(self, node: Node, what: str, *, after_device: bool = False) -> Self:
        """A new source with this node; `after_device`: whether it may stand after functions of the device."""
        if self.options.finish and not after_device:
            raise DataError(
                explain(
                    f"Source.{what}: it would stand after a function that runs on the device.",
                    where=repr(self),
                    expected="functions of the device at the end of the chain",
                    fix=f"source.{what}(...).map(fn, device=True)",
                )
            )
        return type(self)(node, self.options)

    def map(self, fn: Callable[..., Any], *, device: bool = False) -> Self:
        """Apply a function to every item.

        Args:
            fn: `fn(item)`, or `fn(item, rng)`, which gets random numbers that are a function of (seed, epoch, position): a generator of
                numpy on the host, a key (see `ftrain.rng`) on the device.
            device: apply it to batches once they lie on the state's device; only after `batch`.

        >>> import torch, ftrain as ft
        >>> data = ft.data.source(torch.arange(4)).map(lambda x: 10 * x).batch(2)
        >>> noisy = data.map(lambda batch, rng: batch + ft.rng.normal(rng, batch.shape), device=True)
        >>> data[1], bool((noisy[1] - data[1]).abs().max() < 6)
        (tensor([20, 30]), True)
        """
        wants_rng = takes_rng(fn, "Source.map")
        if not device:
            return self._then(Mapped(self.node, fn, wants_rng=wants_rng), "map")
        if not self.batched:
            raise DataError(
                explain(
                    "Source.map: device=True is for batches, and this source gives single items.",
                    where=repr(self),
                    fix="source.batch(64).map(fn, device=True)",
                )
            )
        return type(self)(self.node, self.options._replace(finish=(*self.options.finish, DeviceMap(fn, wants_rng))))

    def filter(self, fn: Callable[[Any], Any]) -> Self:
        """Leave out the items for which a function says no.

        It takes a scan of all items before the first batch: one for all epochs, where the items are the same in every epoch (shuffled or
        not), else one in each epoch. Put it before functions that are slow, or random.

        Args:
            fn: `fn(item) -> bool`.

        >>> import torch, ftrain as ft
        >>> [int(x) for x in ft.data.source(torch.arange(6)).filter(lambda x: x % 3 > 0)]
        [1, 2, 4, 5]
        """
        if takes_rng(fn, "Source.filter"):
            raise ArgumentError(
                explain(
                    "Source.filter: the function takes other arguments than it will be given.",
                    expected="fn(item) -> bool",
                )
            )
        self._finite("filter", "which looks at all items")
        return self._then(Filtered(self.node, fn), "filter")

    def batch(self, n: int, last: Last = "keep", *, collate: Callable[[list[Any]], Any] | None = None) -> Self:
        """Put items together in batches.

        Args:
            n: items in a batch.
            last: what becomes of a last batch that is not full: `"keep"` it, `"drop"` it, or `"pad"` it to n rows. With `"pad"`, batches
                are dicts, and all of them have an entry `"mask"`, bool of shape (n,), False for what is padding. The padding repeats
                the batch's first item, and a plain mean over the rows (`losses.mean()`) counts these repeats, too: return
                `ft.metrics.Mean.of(losses, batch["mask"])`, of one loss for each row, in its place. (Where a scalar is returned, the
                mask only says for how many samples the batch counts beside the others.)
            collate: makes a batch of a list of items; default: `ft.data.collate`.

        >>> import torch, ftrain as ft
        >>> ft.data.source({"x": torch.arange(5)}).batch(3, last="pad")[1]
        {'x': tensor([3, 4, 3]), 'mask': tensor([ True,  True, False])}
        >>> batch = ft.data.source({"x": torch.arange(5.0)}).batch(3, last="pad")[1]
        >>> batch["x"].mean(), ft.metrics.Mean.of(batch["x"], batch["mask"]).compute()
        (tensor(3.3333), tensor(3.5000))
        """
        integer(n, "Source.batch", "n", least=1)
        one_of(last, Last, "Source.batch", "last")
        if collate is not None and not callable(collate):
            raise ArgumentError(explain("Source.batch: collate= is no function.", got=tree.describe(collate)))
        if self.batched:
            raise DataError(
                explain(
                    "Source.batch: the source has batches already.",
                    where=repr(self),
                    fix="ft.data.window(source, 4)   # several batches to a step",
                )
            )
        return self._then(Batched(self.node, n, last, collate), "batch")

    def shuffle(self, seed: int | None = None) -> Self:
        """Another order in each epoch, all items of it.

        Args:
            seed: of this order; default: the source's, or the state's.

        >>> import torch, ftrain as ft
        >>> sorted(int(x) for x in ft.data.source(torch.arange(4)).shuffle(seed=1))
        [0, 1, 2, 3]
        """
        if seed is not None:
            integer(seed, "Source.shuffle", "seed")
        self._finite("shuffle", "whose order is that of a known number of items")
        return self._then(Shuffled(self.node, seed), "shuffle", after_device=True)

    def take(self, n: float) -> Self:
        """The first `n` items of each epoch (fewer where there are no more), or a fraction of them.

        Args:
            n: an integer, or a float from 0 to 1. `take(f)` and `skip(f)` share out all items for any fraction.

        >>> import torch, ftrain as ft
        >>> data = ft.data.source(torch.arange(10))
        >>> len(data.take(3)), len(data.take(0.25)), len(data.skip(0.25))
        (3, 2, 8)
        """
        return self._slice(n, take=True)

    def skip(self, n: float) -> Self:
        """All but the first `n` items of each epoch, or all but a fraction of them.

        Args:
            n: an integer, or a float from 0 to 1.

        >>> import torch, ftrain as ft
        >>> [int(x) for x in ft.data.source(torch.arange(5)).skip(3)]
        [3, 4]
        """
        return self._slice(n, take=False)

    def _slice(self, n: float, *, take: bool) -> Self:
        name = "take" if take else "skip"
        amount(n, f"Source.{name}")
        if isinstance(n, float):
            self._finite(name, "of which a fraction is asked for")
        return self._then(Sliced(self.node, n, take=take), name, after_device=True)

    def repeat(self, k: int | None = None) -> Self:
        """The items `k` times in one epoch, or without end, each time as an epoch of its own (shuffled anew).

        Args:
            k: how often; None: for ever, so that `fit` needs `steps=`.

        >>> import torch, ftrain as ft
        >>> [int(x) for x in ft.data.source(torch.arange(2)).repeat().take(5)]
        [0, 1, 0, 1, 0]
        """
        if k is not None:
            integer(k, "Source.repeat", "k", least=1)
        self._finite("repeat", "which has to come to an end before it can begin again")
        if k is None and not self.node.steady:
            raise DataError(
                explain(
                    "Source.repeat: it cannot be repeated without end, since its length changes from epoch to epoch.",
                    where=repr(self),
                    fix="source.repeat(10)",
                )
            )
        return self._then(Repeated(self.node, k), "repeat", after_device=True)

    def cache(self) -> Self:
        """Keep every item in the host's memory once it was made (in each worker's own). Random functions and shuffles come after it.

        >>> import torch, ftrain as ft
        >>> calls = []
        >>> data = ft.data.source(torch.arange(2)).map(lambda x: calls.append(int(x)) or x).cache().repeat(3)
        >>> len(list(data)), calls
        (6, [0, 1])
        """
        if self.node.varies:
            raise DataError(
                explain(
                    "Source.cache: its items differ from epoch to epoch, so that those of one epoch would stand for all.",
                    where=repr(self),
                    cause="a shuffle, or a function with random numbers, before cache()",
                    fix="source.cache().shuffle().map(augment)",
                )
            )
        return self._then(Cached(self.node), "cache", after_device=True)

    def shard(self, index: int, count: int) -> Self:
        """Every `count`-th item of the order, from item `index` on: the share of one of `count` readers.

        >>> import torch, ftrain as ft
        >>> [int(x) for x in ft.data.source(torch.arange(7)).shard(1, 3)]
        [1, 4]
        """
        integer(count, "Source.shard", "count", least=1)
        integer(index, "Source.shard", "index", least=0, most=count - 1)
        return self._then(Strided(self.node, index, count), "shard", after_device=True)

    def pack(
        self,
        length: int,
        *,
        separator: int | None = None,
        key: str | None = None,
        parts: bool = False,
        pad: int | None = None,
    ) -> Self:
        """Put documents of tokens one after the other, and cut the row into pieces of one length.

        It takes one scan of all documents for their lengths (see `filter`). A document that goes over the end of a row is read for both.

        Args:
            length: tokens in a row.
            separator: a token put after each document.
            key: where the tokens stand in an item that is a dict, e.g. `"input_ids"`.
            parts: give dicts with `"tokens"`, `"segments"` (number of the document in the row; -1 for padding) and `"positions"` (place in
                the document), each int64 of shape (length,), instead of the tokens alone.
            pad: a token that fills up the last row; None: what fills no row is left out.

        >>> import ftrain as ft
        >>> rows = ft.data.source([[1, 2, 3], [4], [5, 6]]).pack(4, separator=0, parts=True)
        >>> rows[1]
        {'tokens': tensor([4, 0, 5, 6]), 'segments': tensor([0, 0, 1, 1]), 'positions': tensor([0, 1, 0, 1])}
        """
        integer(length, "Source.pack", "length", least=1)
        for name, token in (("separator", separator), ("pad", pad)):
            if token is not None:
                integer(token, "Source.pack", name)
        self._finite("pack", "which measures all documents")
        if self.batched:
            raise DataError(
                explain(
                    "Source.pack: it packs documents, not batches.", where=repr(self), fix="source.pack(1024).batch(8)"
                )
            )
        return self._then(Packed(self.node, length, separator=separator, key=key, parts=parts, pad=pad), "pack")

    def load(self, *, workers: int = 0, prefetch: int = 2, timeout: float = 0.0, context: str | None = None) -> Self:
        """How the batches are made; which they are does not change.

        Args:
            workers: processes that make them (torch's DataLoader); 0: this process, when they are asked for.
            prefetch: batches that each worker makes ahead.
            timeout: seconds after which a batch that does not come is an error; 0: never.
            context: how workers are started, `"fork"`, `"spawn"` or `"forkserver"`; None: as the platform does. Unless they are forked, the
                data and its functions must be such that they can be pickled.

        A `zip`, `chain` or `mix` is loaded as that one of its inputs with the most workers.

        >>> import torch, ftrain as ft
        >>> data = ft.data.source(torch.arange(6), batch_size=2)
        >>> [batch.tolist() for batch in data.load(workers=1)] == [batch.tolist() for batch in data]
        True
        """
        integer(workers, "Source.load", "workers", least=0)
        integer(prefetch, "Source.load", "prefetch", least=1)
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout < 0:
            raise ArgumentError(
                explain("Source.load: timeout= makes no sense.", expected="seconds >= 0", got=repr(timeout))
            )
        if context is not None and context not in torch.multiprocessing.get_all_start_methods():
            raise ArgumentError(
                explain(
                    "Source.load: workers cannot be started in this way.",
                    expected=", ".join(torch.multiprocessing.get_all_start_methods()),
                    got=f"context={context!r}",
                )
            )
        return type(self)(self.node, self.options._replace(loading=Loading(workers, prefetch, float(timeout), context)))

    def _finite(self, name: str, why: str) -> None:
        if self.node.endless:
            raise DataError(
                explain(
                    f"Source.{name}: the source is endless.",
                    where=repr(self),
                    expected=f"a source with an end, {why}",
                    fix=f"source.{name}(...).repeat()   # not the other way round",
                )
            )
