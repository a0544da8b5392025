"""The journal: a run's records in one file that only grows, beside the checkpoints.

Laws
----
- Each line is a record as JSON. A checkpoint says how many bytes of the file are its own; going on from it cuts off the rest.
- What is written is on the disk before the checkpoint that speaks of it is begun.
- A record comes back as it was: floats to the last bit, NaN and infinities, arrays with their dtypes.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, explain
from ..sinks import Record

__all__ = ["Journal"]

_FIELDS = ("step", "epoch", "samples", "seconds", "split", "waited", "tokens", "spent")


class Journal:
    """The file of records of one run.

    Args:
        path: the file.

    >>> import tempfile
    >>> from ftrain.checkpoint.journal import Journal
    >>> from ftrain.sinks import Record
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     journal = Journal(folder + "/history.jsonl")
    ...     size = journal.append([Record(1, 0, 8, 0.5, "train", {"loss": 2.0})], 0)
    ...     journal.read(size)[0].metrics
    {'loss': 2.0}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Sequence[Record], size: int) -> int:
        """Write records and make sure that they are on the disk; gives the size of the file.

        Args:
            records: what to write.
            size: where it goes: after so many bytes. What is behind them is of an attempt that failed, and is cut off.

        Raises:
            CheckpointError: they could not be written.
        """
        text = "".join(json.dumps(_row(record)) + "\n" for record in records).encode()
        try:
            with open(self.path, "ab") as file:
                file.truncate(size)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                explain(
                    "the records of the run could not be written.",
                    where=str(self.path),
                    expected=f"{len(text):,} bytes of space",
                    got=f"{type(error).__name__}: {error.strerror or error}",
                    cause="a full disk, or a folder that was moved or deleted while the run goes on",
                )
            ) from error
        return size + len(text)

    def begin(self) -> None:
        """Begin anew: empty the file, if it is of records.

        Raises:
            CheckpointError: it is somebody else's.
        """
        if self.path.exists():
            with open(self.path, "rb") as file:
                line = file.readline()
            if not _ours(line):
                raise CheckpointError(
                    explain(
                        "a file that is no run's records has the name that the records would have.",
                        where=str(self.path),
                        expected="no such file, or the records of a run",
                        got=repr(line[:80]),
                        fix=f'ft.Checkpoints("{self.path.parent / "checkpoints"}")   # a folder of its own',
                    )
                )
        self.cut(0)

    def cut(self, size: int) -> None:
        """Take off what was written after the checkpoint that is gone on from."""
        if self.path.exists() or size:
            with open(self.path, "r+b") as file:
                file.truncate(size)

    def read(self, size: int) -> list[Record]:
        """The records in the first `size` bytes.

        Raises:
            CheckpointError: the file is shorter than that, or damaged.
        """
        if not size:
            return []
        try:
            with open(self.path, "rb") as file:
                text = file.read(size)
            if len(text) < size:
                raise EOFError(f"{len(text)} bytes, of {size}")
            return [_record(json.loads(line)) for line in text.splitlines()]
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                explain(
                    "the records of the run cannot be read.",
                    where=str(self.path),
                    expected=f"{size} bytes of records, as the checkpoint says",
                    got=f"{type(error).__name__}: {error}",
                    cause="the file was changed, moved or cut off",
                    fix="state = ft.restore(path, like=state)   # the states themselves can be restored",
                )
            ) from error


def _ours(line: bytes) -> bool:
    """Whether this is the first line of records; it may be cut off, by a crash."""
    if not line.endswith(b"\n"):
        return line[:9] == b'{"step": '[: len(line)]
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and row.keys() == {*_FIELDS, "metrics"}


def _row(record: Record) -> dict[str, Any]:
    row = {name: getattr(record, name) for name in _FIELDS}
    return {**row, "metrics": {name: _encode(value) for name, value in record.metrics.items()}}


def _record(row: dict[str, Any]) -> Record:
    metrics = {name: _decode(value) for name, value in row["metrics"].items()}
    return Record(**{name: row[name] for name in _FIELDS}, metrics=metrics)


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
        bits = flat.numpy()  # sync: none, what is recorded is on the host
        kind = str(value.dtype).removeprefix("torch.")
        return {"tensor": kind, "shape": list(value.shape), "bytes": base64.b64encode(bits.tobytes()).decode()}
    if isinstance(value, (np.ndarray, np.generic)):
        return {
            "array": value.dtype.str,
            "shape": list(value.shape),
            "bytes": base64.b64encode(value.tobytes()).decode(),
        }
    return float(value)


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    data = bytearray(base64.b64decode(value["bytes"]))
    if "array" in value:
        return np.frombuffer(data, dtype=np.dtype(value["array"])).reshape(value["shape"])
    dtype = getattr(torch, value["tensor"])
    if not data:
        return torch.empty(value["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(value["shape"])
