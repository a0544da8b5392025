"""The sources at the beginning of a chain: arrays, lists, datasets, files of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import DataError, explain
from .arrays import Arrays
from .batching import Last
from .checks import integer
from .flat import TokenWindows
from .items import Items
from .node import Node, Seeded
from .reading import Options
from .sources import Source

__all__ = ["source", "tokens"]


def source(
    data: Any,
    *,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int | None = None,
    last: Last = "keep",
    collate: Callable[[list[Any]], Any] | None = None,
    batched: bool = False,
    workers: int = 0,
) -> Source:
    """Make a source of arrays, of a list, or of a map-style dataset.

    Args:
        data: a tensor or array, or a tuple, dict or other tree of them, of equal length; a list of samples; anything with `__len__` and
            `__getitem__` (datasets of torch, of Hugging Face), read with `__getitems__` where there is one; another source.
        batch_size: samples in a batch; None: single samples, for `.batch(n)` later on.
        shuffle: another order in each epoch.
        seed: of all that is random in this source; default: the seed of the state that is trained.
        last: as for `Source.batch`.
        collate: as for `Source.batch`.
        batched: that each item of `data` is a batch already.
        workers: as for `Source.load`.

    Returns:
        A `Source`: data for `ft.fit` and its like, with methods that give new sources.

    Raises:
        DataError: arrays of unequal length, or data that cannot be sought.

    >>> import torch, ftrain as ft
    >>> data = ft.data.source({"x": torch.arange(5), "y": torch.arange(5) ** 2}, batch_size=2, shuffle=True, seed=0)
    >>> len(data), sum(len(batch["x"]) for batch in data)
    (3, 5)
    """
    what = "ft.data.source"
    if seed is not None:
        integer(seed, what, "seed")
    if batch_size is None and (last != "keep" or collate is not None):
        raise DataError(
            explain(
                f"{what}: last= and collate= go with batch_size=.", fix=f"{what}(data, batch_size=64, last={last!r})"
            )
        )
    made = data if isinstance(data, Source) else Source(_leaf(data, batched, what), Options())
    if batched and isinstance(data, Source) and not data.batched:
        raise DataError(explain(f"{what}: batched=True is said of a source of single items.", where=repr(data)))
    if seed is not None:
        if made.options.seed is not None:
            made = Source(Seeded(made.node, made.options.seed), made.options)
        made = Source(made.node, made.options._replace(seed=seed))
    if shuffle:
        made = made.shuffle()
    if batch_size is not None:
        made = made.batch(batch_size, last, collate=collate)
    return made.load(workers=workers) if workers else made


def _leaf(data: Any, batched: bool, what: str) -> Node:
    if (
        isinstance(data, torch.utils.data.TensorDataset)
        and type(data) is torch.utils.data.TensorDataset
        and not batched
    ):
        return Arrays(data.tensors, what)
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if (
        isinstance(data, (list, torch.utils.data.Dataset))
        and sized
        and not isinstance(data, torch.utils.data.IterableDataset)
    ):
        return Items(data, batched=batched)
    array = isinstance(data, (Tensor, np.ndarray))
    leaves = tree.leaves(data)
    if array or isinstance(data, (Mapping, tuple)) or not ((len(leaves) == 1 and leaves[0] is data) or data is None):
        if batched:
            raise DataError(
                explain(
                    f"{what}: batched=True is for a list or a dataset of batches, not for arrays.",
                    got=tree.describe(data),
                )
            )
        return Arrays(data, what)
    if sized and not isinstance(data, (str, bytes)) and not hasattr(data, "iloc"):
        return Items(data, batched=batched)
    loader = isinstance(data, torch.utils.data.DataLoader)
    raise DataError(
        explain(
            f"{what}: this is no data that can be sought.",
            expected="arrays of equal length, a list, or anything with __len__ and __getitem__",
            got=tree.describe(data),
            cause="a DataLoader has an order of its own" if loader else None,
            fix=f"{what}(loader.dataset, batch_size=64, shuffle=True)   # or the loader itself as data, as it is"
            if loader
            else f'{what}({{name: frame[name].to_numpy() for name in ("x", "y")}})'
            if hasattr(data, "iloc")
            else "ft.fit(state, step, data)   # an iterable can be used as it is, but only be read from its beginning",
        )
    )


def tokens(
    where: str | os.PathLike[str] | Any, length: int, *, stride: int | None = None, dtype: Any = np.uint16
) -> Source:
    """Windows of a flat file of tokens, which is read where it lies (a memory map), or of a 1-d array.

    Args:
        where: the path of a raw file, or of a `.npy` file; or a 1-d array or CPU tensor of integers.
        length: tokens in a window; one more than a language model's context, where targets are the next tokens.
        stride: tokens from the beginning of one window to that of the next; default: `length`. The rest that fills no window is left out.
        dtype: of the tokens in a raw file.

    Returns:
        A source of tensors, int64 of shape (length,).

    Raises:
        DataError: no such file, one whose size does not fit the dtype, or fewer tokens than a window.

    >>> import numpy as np, ftrain as ft
    >>> data = ft.data.tokens(np.arange(9), 5, stride=4).batch(2).map(lambda t: {"x": t[:, :-1], "y": t[:, 1:]})
    >>> data[0]["y"]
    tensor([[1, 2, 3, 4],
            [5, 6, 7, 8]])
    """
    integer(length, "ft.data.tokens", "length", least=1)
    if stride is not None:
        integer(stride, "ft.data.tokens", "stride", least=1)
    return Source(TokenWindows(where, length, length if stride is None else stride, dtype, "ft.data.tokens"), Options())
