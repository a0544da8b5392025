"""Documents of tokens, put one after the other and cut into rows of one length, as a node.

Row r holds tokens r * length .. (r + 1) * length - 1 of all documents of the epoch, in their order, each followed by the separator
where there is one. So no token is lost but the rest that fills no row, and a document may go over the end of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import DataError, explain
from .node import At, Indices, Memo, Node
from .streams import streams

__all__ = ["Packed"]

_PACK = 0x9AC4
_SCAN = 256  # documents that a scan holds at a time


class Packed(Node):
    """Rows of `length` tokens.

    Args:
        inner: documents: 1-d integer arrays, tensors or lists, or dicts with one under `key`.
        length: tokens in a row.
        separator: a token after each document, or None.
        key: where the tokens stand in a document that is a dict.
        parts: whether a row also says which document, and which place in it, each token belongs to.
        pad: the token that fills up the last row; None: the rest that fills no row is left out.
    """

    def __init__(
        self, inner: Node, length: int, *, separator: int | None, key: str | None, parts: bool, pad: int | None
    ) -> None:
        self._take_after(inner)
        self.inner, self.length, self.separator, self.key = inner, length, separator, key
        self.parts, self.pad = parts, pad
        self.columnar, self.even = False, not inner.varies
        self.steady = inner.steady and (not inner.varies or (inner.fixed() is not None and inner.even))
        self._lengths: Any = None  # of the documents that are the same in every epoch; goes along into pickles
        self._ends = Memo()

    def ends(self, at: At) -> Any:
        """Where each document of an epoch ends, separator included, with a 0 in front."""

        def make() -> Any:
            fixed = self.inner.fixed()
            if fixed is None:
                lengths = self._scan(self.inner, at)
            else:
                base, where = fixed
                if self._lengths is None:
                    self._lengths = self._scan(base, At(0, 0))
                lengths = self._lengths[where(at, range(int(self.inner.size(at))))]
            return np.concatenate(([0], np.cumsum(lengths + (self.separator is not None))))

        return self._ends.get(at if self.varies else 0, make)

    def _scan(self, node: Node, at: At) -> Any:
        n = int(node.size(at))
        lengths = np.zeros(n, dtype=np.int64)
        with streams(at.seed, at.epoch, _PACK):
            for start in range(0, n, _SCAN):
                wanted = range(start, min(start + _SCAN, n))
                for i, item in zip(wanted, node.items(at, wanted), strict=True):
                    lengths[i] = len(self._document(item, i))
        return lengths

    def _document(self, item: Any, i: int) -> Any:
        if self.key is not None and isinstance(item, dict) and self.key in item:
            found = item[self.key]
        else:
            found = item if self.key is None else None
        if isinstance(found, Tensor):
            found = found.detach().cpu().numpy()  # sync: documents are made on the host
        elif isinstance(found, list):
            found = np.array(found, dtype=np.int64) if all(isinstance(token, int) for token in found) else None
        if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
            keys = f"a dict with {', '.join(map(repr, item))}" if isinstance(item, dict) else tree.describe(item)
            raise DataError(
                explain(
                    "Source.pack: an item is no document.",
                    where=f"item {i}",
                    expected="a 1-d array, tensor or list of integers"
                    + ("" if self.key is None else f" under {self.key!r}"),
                    got=keys,
                    fix='source.pack(length, key="input_ids")' if isinstance(item, dict) else None,
                )
            )
        return found

    def size(self, at: At) -> float:
        total = int(self.ends(at)[-1])
        return total // self.length if self.pad is None else -(-total // self.length)

    def items(self, at: At, indices: Indices) -> list[Any]:
        return [self._row(at, int(r)) for r in indices]

    def _row(self, at: At, r: int) -> Any:
        ends = self.ends(at)
        first, stop = r * self.length, min((r + 1) * self.length, int(ends[-1]))
        begin = int(np.searchsorted(ends, first, side="right")) - 1
        end = int(np.searchsorted(ends, stop, side="left"))
        tokens = np.full(self.length, 0 if self.pad is None else self.pad, dtype=np.int64)
        segments, positions = np.full(self.length, -1, dtype=np.int64), np.zeros(self.length, dtype=np.int64)
        segment = -1
        for d, item in zip(range(begin, end), self.inner.items(at, range(begin, end)), strict=True):
            document = self._document(item, d)
            if self.separator is not None:
                document = np.append(document.astype(np.int64), self.separator)
            self._check(len(document), int(ends[d + 1] - ends[d]), d)
            low, high = max(first, int(ends[d])), min(stop, int(ends[d + 1]))
            if low >= high:
                continue
            segment += 1
            tokens[low - first : high - first] = document[low - int(ends[d]) : high - int(ends[d])]
            segments[low - first : high - first] = segment
            positions[low - first : high - first] = np.arange(low, high) - int(ends[d])
        if not self.parts:
            return torch.from_numpy(tokens)
        names = {"tokens": tokens, "segments": segments, "positions": positions}
        return {name: torch.from_numpy(array) for name, array in names.items()}

    def _check(self, got: int, expected: int, d: int) -> None:
        if got != expected:
            raise DataError(
                explain(
                    "Source.pack: a document has another length than when the documents were measured.",
                    where=f"item {d}",
                    expected=f"{expected} tokens, separator included",
                    got=f"{got}",
                    cause="a function before pack that draws from the global generators of torch, numpy or random",
                    fix="source.map(lambda item, rng: ...)   # draws from the generator that it is given",
                )
            )

    def name(self) -> str:
        rest = [
            f"{name}={value!r}"
            for name, value in (("separator", self.separator), ("pad", self.pad))
            if value is not None
        ]
        return f"pack({', '.join([str(self.length), *rest])})"

    def facts(self) -> dict[str, Any]:
        return {"length": self.length}
