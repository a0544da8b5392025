"""Batches of items, as a node, with a policy for the last one.

Laws
----
- Batch b is made of items b * n .. (b + 1) * n - 1 of its input, in this order.
- With `last="pad"` every batch is a dict with n rows and `"mask"`, bool of shape (n,): what is False there repeats the batch's first
  item and counts for nothing, in losses (the weight of a scalar loss is the mask's sum) and in metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from .. import tree
from ..errors import DataError, explain
from .collating import collate
from .node import At, Indices, Memo, Node, as_array, name_of

__all__ = ["Batched", "Last"]

Last = Literal["keep", "drop", "pad"]


class Batched(Node):
    """Batches of `n` items.

    Args:
        inner: a node whose items are no batches.
        n: items in a batch.
        last: what becomes of a last batch that is not full.
        collate: makes a batch of a list of items; None: `collating.collate`.
    """

    def __init__(self, inner: Node, n: int, last: Last, collate: Callable[[list[Any]], Any] | None) -> None:
        self._take_after(inner)
        self.inner, self.n, self.last, self.collate = inner, n, last, collate
        self.batched, self.columnar = True, False
        self.foreign = inner.foreign or collate is not None
        self._sizes = Memo()

    def size(self, at: At) -> float:
        samples = self._samples(at)
        if self.inner.endless:
            return samples
        return int(samples) // self.n if self.last == "drop" else -(-int(samples) // self.n)

    def _samples(self, at: At) -> float:
        return self._sizes.get(at if self.varies else 0, lambda: self._checked(at))

    def _checked(self, at: At) -> float:
        samples = self.inner.size(at)
        if self.last == "drop" and 0 < samples < self.n:
            raise DataError(
                explain(
                    'Source.batch: the data is shorter than one batch, and last="drop" leaves nothing of it.',
                    where=".".join(self.inner.chain()),
                    expected=f"at least {self.n} samples",
                    got=f"{int(samples)}",
                    fix=f'source.batch({int(samples)}, last="drop")   # or last="keep", or last="pad"',
                )
            )
        return samples

    def items(self, at: At, indices: Indices) -> list[Any]:
        return [self._batch(at, int(b)) for b in indices]

    def _batch(self, at: At, b: int) -> Any:
        first = b * self.n
        wanted = range(first, int(min(first + self.n, self._samples(at))))
        missing = self.n - len(wanted) if self.last == "pad" else 0
        if self.collate is None and self.inner.columnar:
            rows: Indices = wanted
            if missing:
                rows = np.concatenate([as_array(wanted), np.full(missing, first)])
            batch = self.inner.gather(at, rows)
        else:
            items = self.inner.items(at, wanted)
            items += items[:1] * missing
            batch = collate(items, [*wanted, *[first] * missing]) if self.collate is None else self._own(items, b)
        return self._masked(batch, b, missing) if self.last == "pad" else batch

    def _own(self, items: list[Any], b: int) -> Any:
        assert self.collate is not None, "asked only where there is one"
        try:
            return self.collate(items)
        except Exception as error:
            error.add_note(f"ftrain: raised by collate={name_of(self.collate)} at batch {b}.")
            raise

    def _masked(self, batch: Any, b: int, missing: int) -> dict[str, Any]:
        if not isinstance(batch, dict) or "mask" in batch:
            raise DataError(
                explain(
                    'Source.batch: last="pad" adds an entry "mask", for which this batch has no place.',
                    where=f"batch {b}",
                    expected='a dict without an entry "mask"',
                    got=f"a dict with {', '.join(map(repr, batch))}"
                    if isinstance(batch, dict)
                    else tree.describe(batch),
                    fix='source.map(lambda item: {"x": item[0], "y": item[1]}).batch(n, last="pad")',
                )
            )
        mask = torch.arange(self.n) < self.n - missing
        leaf = next((one for one in tree.leaves(batch) if isinstance(one, torch.Tensor)), mask)
        return {**batch, "mask": mask.to(leaf.device)}

    def rows(self) -> tuple[int, ...] | None:
        if self.collate is not None:
            return None
        if self.last != "keep" or self.inner.endless:
            return (self.n,)
        if not self.inner.steady:
            return None
        samples = int(self._samples(At(0, 0)))
        return tuple(sorted({min(self.n, samples), samples % self.n} - {0}, reverse=True))

    def name(self) -> str:
        last = "" if self.last == "keep" else f", last={self.last!r}"
        own = "" if self.collate is None else f", collate={name_of(self.collate)}"
        return f"batch({self.n}{last}{own})"

    def facts(self) -> dict[str, Any]:
        return {"batch_size": self.n, "last": self.last}
