"""The safetensors format: written tensor by tensor, read through the safetensors package.

A file is 8 bytes with the length of the header, the header (JSON: dtype, shape and place of each tensor), and the bytes of the tensors.
The package writes it too, but wants all tensors in host memory at once; here one is enough, whether it comes from a GPU or a checkpoint.
Source of the format: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, explain
from .dtypes import array_of

__all__ = ["DTYPES", "Found", "Spec", "opened", "order", "write"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


class Spec(NamedTuple):
    """Dtype and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Found(NamedTuple):
    """A tensor in a file: `dtype` (None: one that torch lacks), `shape`, and `read()`, which gives it, on the CPU."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def order(specs: Mapping[str, Spec]) -> list[str]:
    """The names in the order in which they are written: wide dtypes first, so that each tensor lies aligned, then by name.

    >>> import torch
    >>> from ftrain.checkpoint.safefile import Spec, order
    >>> order({"a": Spec(torch.int8, (3,)), "b": Spec(torch.float32, ())})
    ['b', 'a']
    """
    return sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))


def write(
    file: BinaryIO,
    specs: Mapping[str, Spec],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    what: str,
) -> None:
    """Write a safetensors file.

    Args:
        file: where.
        specs: what will be written.
        tensors: names and tensors in the order of `order(specs)`: contiguous, on the CPU.
        metadata: texts by name.
        what: opens the message of an error.

    Raises:
        CheckpointError: a dtype that the format lacks, or a name that it reserves.
    """
    _check(specs, what)
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    start = 0
    for name in order(specs):
        dtype, shape = specs[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name, (given, tensor) in zip(order(specs), tensors, strict=True):
        assert (name, specs[name]) == (given, Spec(tensor.dtype, tuple(tensor.shape))), f"{given} where {name} was due"
        if tensor.numel():
            file.write(array_of(tensor).reshape(-1).view(np.uint8).data)


def _check(specs: Mapping[str, Spec], what: str) -> None:
    strange = [
        f"{name}: {str(spec.dtype).removeprefix('torch.')}" for name, spec in specs.items() if spec.dtype not in _NAMES
    ]
    if strange:
        raise CheckpointError(
            explain(
                f"{what}: the safetensors format has no such dtype.",
                where="\n".join(strange[:8]),
                expected=", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES),
                fix="ft.checkpoint.to_torch(path, state)   # holds every dtype",
            )
        )
    if _METADATA in specs:
        raise CheckpointError(
            explain(f"{what}: the safetensors format reserves the name {_METADATA!r}.", where=_METADATA)
        )


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], what: str) -> Iterator[tuple[dict[str, Found], dict[str, str]]]:
    """The tensors of a safetensors file by name, which can be read within the block, and its metadata.

    Raises:
        CheckpointError: it is no safetensors file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt", device="cpu").__enter__()  # type: ignore[no-untyped-call]  # its stub has no types
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            explain(
                f"{what}: this is no safetensors file, or a damaged one.",
                where=str(path),
                cause=str(error),
                fix="ft.checkpoint.from_torch(path, state)   # for one that torch.save wrote",
            )
        ) from error
    with contextlib.ExitStack() as stack:
        stack.push(file.__exit__)
        found = {}
        for name in file.keys():  # noqa: SIM118  # no dict
            one = file.get_slice(name)
            shape = tuple(one.get_shape())
            found[name] = Found(DTYPES.get(one.get_dtype()), shape, functools.partial(file.get_tensor, name))
        yield found, dict(file.metadata() or {})
