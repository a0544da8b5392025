"""The numbers of a tensor as numpy sees them, and back: the same bytes, never a conversion.

numpy has no bfloat16 and no fp8, so those travel under the types of `ml_dtypes`, whose names every JAX user knows. What even
`ml_dtypes` lacks (complex32, packed fp4) travels as unsigned integers of the same size.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

__all__ = ["array_of", "dtype_name", "dtype_named", "numpy_dtype", "tensor_of"]

_PLAIN = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_NAMED = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    "float8_e8m0fnu",
)
_RAW = {"complex32": "uint32", "float4_e2m1fn_x2": "uint8"}
_CARRIER: dict[int, tuple[torch.dtype, Any]] = {
    1: (torch.uint8, np.uint8),
    2: (torch.uint16, np.uint16),
    4: (torch.uint32, np.uint32),
}

_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in (*_PLAIN, *_NAMED, *_RAW) if hasattr(torch, name)
}


def _there(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if name in _NAMED else _RAW.get(name, name))


_NUMPY = {dtype: _there(name) for name, dtype in _TORCH.items()}
_BACK = {_there(name): dtype for name, dtype in _TORCH.items() if name not in _RAW}


def dtype_name(dtype: torch.dtype) -> str:
    """`"bfloat16"` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        KeyError: this version of torch has none.
    """
    return _TORCH[name]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The dtype under which numpy keeps the same bytes, or None where a checkpoint cannot hold this one."""
    return _NUMPY.get(dtype)


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous tensor on the CPU as an array.

    >>> import torch
    >>> from ftrain.checkpoint.dtypes import array_of
    >>> array_of(torch.ones(2, dtype=torch.bfloat16))
    array([1, 1], dtype=bfloat16)
    """
    there = _NUMPY[tensor.dtype]
    if there.name in _PLAIN and dtype_name(tensor.dtype) not in _RAW:
        return tensor.numpy()  # sync: the tensor lies on the CPU
    carrier, _ = _CARRIER[tensor.element_size()]
    return tensor.view(carrier).numpy().view(there)  # sync: the tensor lies on the CPU


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor | None:
    """A tensor with the numbers of an array, in its memory where that can be written to; None where torch has no such dtype.

    >>> import numpy as np
    >>> from ftrain.checkpoint.dtypes import tensor_of
    >>> tensor_of(np.float32([1, 2]))
    tensor([1., 2.])
    """
    dtype = _BACK.get(array.dtype)
    if dtype is None or not array.dtype.isnative:
        return None
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy(order="C")
    if dtype_name(dtype) in _PLAIN:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_CARRIER[array.dtype.itemsize][1])).view(dtype)
