"""Orbax's handler for tensors. Imported only inside functions: Orbax brings JAX along (a second, 140 MiB).

The arrays that it writes are what Orbax writes for numpy arrays, and bear the same type name, so that anyone who has Orbax, and nothing of
ftrain or torch, opens them. What differs: chunks are whole rows of about `CHUNK` bytes, stored as they are (zstd saves 8 % of a model's
bytes for 3 times the time); a restore reads straight into memory that is there already; and `sums.json` beside the arrays has a sum of each
chunk, so that a flipped bit is an error when it is read (without, 60 of 60 went unnoticed).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from torch import Tensor

from .checksums import checksums
from .dtypes import array_of, tensor_of

__all__ = ["CHUNK", "Into", "TensorHandler", "array_handler"]

CHUNK = 16 << 20  # bytes
SUMS = "sums.json"

types = ocp.type_handlers


@dataclasses.dataclass
class Into(ocp.RestoreArgs):  # type: ignore[misc]  # Orbax has no types
    """Where to read an array to: `target[...] = array[rows]`.

    Attributes:
        target: memory of the array's dtype; of its shape, or (with `rows`) of that of the rows.
        rows: first row and the one after the last; None for all.
        shape: the shape that the array must have.
    """

    target: np.ndarray[Any, Any] | None = None
    rows: tuple[int, int] | None = None
    shape: tuple[int, ...] = ()


class TensorHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax has no types
    """Writes and reads contiguous tensors on the CPU, whose memory must stay as it is until the write is over."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._numpy = types.NumpyHandler()

    def typestr(self) -> str:
        """The name under which Orbax's own handler for numpy arrays finds them."""
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Any:
        return await self._numpy.metadata(infos)

    async def serialize(self, values: Sequence[Tensor], infos: Sequence[Any], args: Any = None) -> Any:
        given = args or [ocp.SaveArgs()] * len(infos)
        write = self._write([array_of(value) for value in values], infos, given)
        return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="ftrain")]

    async def _write(self, arrays: Sequence[np.ndarray[Any, Any]], infos: Sequence[Any], args: Sequence[Any]) -> None:
        sums: dict[str, Any] = {}
        specs: dict[Any, Any] = {}  # making one costs as much as a small write

        def spec(array: np.ndarray[Any, Any], info: Any, arg: Any) -> Any:
            key = (array.shape, array.dtype, str(arg))
            if key not in specs:
                chunk = rows_of(array.shape, array.itemsize, self._chunk)
                made = types.get_json_tspec_write(
                    info,
                    use_ocdbt=info.is_ocdbt_checkpoint,
                    global_shape=array.shape,
                    local_shape=chunk,
                    dtype=array.dtype,
                    process_index=0,
                    arg=arg,
                )
                made["metadata"]["codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
                specs[key] = made
            made = specs[key]
            return {**made, "kvstore": {**made["kvstore"], "path": info.name + "/"}}

        async def one(array: np.ndarray[Any, Any], info: Any, arg: Any) -> None:
            await info.await_path_creation()
            made = tensorstore.Spec(spec(array, info, arg))
            store = await tensorstore.open(made, create=True, open=True, context=info.ts_context)
            written = store.write(array, can_reference_source_data_indefinitely=True)
            rows = block_of(array.shape, array.itemsize, self._chunk)
            sums[info.name] = {"rows": rows, "sums": checksums(array, rows)}  # while it is being written
            await written

        await _all([one(*row) for row in zip(arrays, infos, args, strict=True)])
        (infos[0].parent_dir / SUMS).write_text(json.dumps(sums))

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        given = args or [ocp.RestoreArgs()] * len(infos)
        for info in infos:
            await info.await_path_creation()
        sums = json.loads((infos[0].parent_dir / SUMS).read_text())
        # Files are mapped, as safetensors does: read into buffers, 1 GB takes twice as long. More threads only take turns.
        context = tensorstore.Context(
            {
                "file_io_mode": {"mode": "memmap"},
                "file_io_concurrency": {"limit": max(4, os.cpu_count() or 1)},
                "cache_pool#ocdbt": {"total_bytes_limit": 100 << 20},
            }
        )

        async def one(info: Any, arg: Any) -> Any:
            made = tensorstore.Spec(types.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint))
            store = await tensorstore.open(made, open=True, read=True, context=context)
            if not isinstance(arg, Into) or arg.target is None:
                return tensor_of(await store.read())
            if tuple(store.shape) != tuple(arg.shape) or store.dtype.numpy_dtype != arg.target.dtype:
                raise ValueError(
                    f"the array {info.name} is {store.dtype.name}{list(store.shape)}, but the index says "
                    f"{arg.target.dtype}{list(arg.shape)}"
                )
            await _read(store, arg.target, arg.rows, sums[info.name], info.name)
            return arg.target

        return await _all([one(*row) for row in zip(infos, given, strict=True)])


async def _read(store: Any, target: np.ndarray[Any, Any], rows: tuple[int, int] | None, known: Any, name: str) -> None:
    """Read some rows, or all, and compare the sums of the blocks that they lie in."""
    n, block = store.shape[0] if store.rank else 1, known["rows"]
    first, last = rows or (0, n)
    start, stop = first // block * block, min(-(-last // block) * block, n)
    exact = (start, stop) == (first, last)
    memory = target if exact else np.empty((stop - start, *target.shape[1:]), target.dtype)
    part = store if (start, stop) == (0, n) else store[start:stop].translate_to[(0,) * store.rank]
    await tensorstore.array(memory, copy=False, write=True).write(part)
    if checksums(memory, block) != known["sums"][start // block : -(-stop // block)]:
        raise ValueError(f"the sum of the array {name} is not that of what was written")
    if not exact:
        target[...] = memory[first - start : last - start]


async def _all(work: Sequence[Any]) -> list[Any]:
    """The results of all, or the first error once all are over: what still ran would find its event loop closed."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for one in results:
        if isinstance(one, BaseException):
            raise one
    return list(results)


def rows_of(shape: tuple[int, ...], itemsize: int, target: int) -> tuple[int, ...]:
    """The shape of a chunk of at most about `target` bytes: whole rows, or parts of one row where that is larger.

    >>> from ftrain.checkpoint.handler import rows_of
    >>> rows_of((1000, 100), 4, 100_000), rows_of((2, 1000), 4, 1000)
    ((250, 100), (1, 250))
    """
    chunk = list(shape)
    for dim, n in enumerate(shape):
        pieces = -(-math.prod(chunk) * itemsize // target)
        if pieces <= 1:
            break
        chunk[dim] = -(-n // min(pieces, n))
    return tuple(chunk)


def block_of(shape: tuple[int, ...], itemsize: int, target: int) -> int:
    """The rows for which there is one sum."""
    return rows_of(shape, itemsize, target)[0] if shape else 1


def array_handler() -> Any:
    """Orbax's handler for trees, for nested dicts of tensors only."""
    registry = types.create_type_handler_registry((Tensor, TensorHandler()))
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False, type_handler_registry=registry)
