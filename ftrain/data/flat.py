"""Windows of a flat file of tokens, read where it lies (a memory map), as a node."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, explain
from .node import At, Indices, Memo, Node, as_array

__all__ = ["TokenWindows"]


class TokenWindows(Node):
    """Item i is `tokens[i * stride : i * stride + length]`, as int64.

    Args:
        where: the path of a raw file or of a `.npy` file, or a 1-d array.
        length: tokens in a window.
        stride: tokens from the beginning of one window to that of the next.
        dtype: of the tokens in a raw file.
        what: how errors call the caller.

    >>> import numpy as np
    >>> from ftrain.data.flat import TokenWindows
    >>> from ftrain.data.node import At
    >>> TokenWindows(np.arange(7), 3, 2, np.uint16, "f").gather(At(0, 0), range(2))
    tensor([[0, 1, 2],
            [2, 3, 4]])
    """

    columnar = True

    def __init__(self, where: Any, length: int, stride: int, dtype: Any, what: str) -> None:
        self.length, self.stride = length, stride
        self.path = Path(os.fspath(where)) if isinstance(where, (str, os.PathLike)) else None
        self.dtype = np.dtype(dtype)
        self._array = None if self.path is not None else _flat(where, what)
        self._open = Memo(1)  # a pickle of a memory map would hold the whole file, so each process opens its own
        tokens = self._tokens(what)
        self.total = len(tokens)
        if self.total < length:
            raise DataError(
                explain(
                    f"{what}: there are fewer tokens than one window has.",
                    where=str(self.path) if self.path is not None else None,
                    expected=f"at least {length} tokens",
                    got=f"{self.total}",
                )
            )
        self.n = (self.total - length) // stride + 1

    def _tokens(self, what: str = "ft.data.tokens") -> Any:
        if self.path is None:
            return self._array
        path = self.path
        make: Callable[[], Any] = lambda: _mapped(path, self.dtype, what)  # noqa: E731 - typed
        return self._open.get(0, make)

    def size(self, at: At) -> float:
        return self.n

    def gather(self, at: At, indices: Indices) -> Tensor:
        starts = as_array(indices) * self.stride
        rows = self._tokens()[starts[:, None] + np.arange(self.length)]
        return torch.from_numpy(rows.astype(np.int64))

    def items(self, at: At, indices: Indices) -> list[Any]:
        return list(self.gather(at, indices).unbind(0))

    def name(self) -> str:
        where = "array" if self.path is None else self.path.name
        return f"tokens({where}, {self.length}, stride={self.stride})"

    def facts(self) -> dict[str, Any]:
        return {"kind": "tokens", "samples": self.n, "tokens": self.total}


def _flat(array: Any, what: str) -> Any:
    flat = array
    if isinstance(array, Tensor) and array.device.type == "cpu":
        flat = array.detach().numpy()  # sync: none, it lies on the CPU
    if not isinstance(flat, np.ndarray) or flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise DataError(
            explain(
                f"{what}: this is no flat array of tokens.",
                expected="a path, or a 1-d array of integers on the CPU",
                got=f"{type(array).__name__} {getattr(array, 'dtype', '')}{list(getattr(array, 'shape', []))}",
            )
        )
    return flat


def _mapped(path: Path, dtype: np.dtype[Any], what: str) -> Any:
    if not path.is_file():
        raise DataError(explain(f"{what}: there is no such file.", where=str(path), expected="a file of tokens"))
    if path.suffix == ".npy":
        return _flat(np.load(path, mmap_mode="r"), what)
    size = path.stat().st_size
    if dtype.kind not in "iu" or size % dtype.itemsize or not size:
        raise DataError(
            explain(
                f"{what}: the file is no row of {dtype} tokens.",
                where=str(path),
                expected=f"a multiple of {dtype.itemsize} bytes, read as integers",
                got=f"{size} bytes, dtype={dtype}",
                fix="ft.data.tokens(path, length, dtype=np.uint32)   # the dtype with which the file was written",
            )
        )
    return np.memmap(path, dtype=dtype, mode="r")
