"""The formats in which rows are written batch by batch: numpy's `.npy` and `.npz`, and Parquet.

Laws
----
- What was added, one after the other, is what is read; dtypes and all.
- A batch is in memory, or a row group of Parquet, however many rows there are.
- Nothing that is written needs pickle to be read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from ..errors import DataError, explain

__all__ = ["FORMATS", "Array", "Table"]

Array = np.ndarray[Any, Any]

LONE = "output"  # the column of a lone array
IDS = "id"
GROUP = 32 << 20  # bytes of a row group of Parquet, at least: small ones are slow to read


class Table(Protocol):
    """A file that is being written."""

    def add(self, ids: Array, outputs: Any, /) -> None:
        """Append rows: ids of shape (n,), and outputs whose first dimensions are n.

        Raises:
            DataError: the outputs are of another form than the file's, or than those before.
        """
        ...

    def finish(self) -> None:
        """Write what is still to be written."""
        ...


class _Numbers:
    """One array in numpy's format, whose first dimension is known at the end only.

    The header is written twice. numpy pads it so that the first dimension may grow to 21 digits, hence both are of one length.
    """

    def __init__(self, file: IO[bytes], what: str, column: str) -> None:
        self.file, self.what, self.column = file, what, column
        self.rows, self.form = 0, ""
        self.like: Array | None = None
        self.start = 0

    def add(self, rows: Array) -> None:
        if rows.dtype.kind not in "biufc":
            raise DataError(
                explain(
                    f"{self.what}: numpy's formats take numbers.",
                    where=self.column,
                    got=f"{rows.dtype}",
                    fix='"predictions.parquet"   # takes texts, too',
                )
            )
        if self.like is None:
            self.like = rows[:0]
            self._header()
            self.start = self.file.tell()
        elif rows.dtype != self.like.dtype or rows.shape[1:] != self.like.shape[1:]:
            raise DataError(
                explain(
                    f"{self.what}: the outputs of one batch are not like those of the batches before.",
                    where=self.column,
                    expected=_described(self.like),
                    got=_described(rows),
                    cause="a model whose outputs are as long as the batch's longest sequence, say",
                    fix='"predictions.parquet"   # rows of any length\npad to one length, or reduce it, in the predict step',
                )
            )
        if rows.size:
            self.file.write(np.ascontiguousarray(rows).data.cast("B"))
        self.rows += len(rows)

    def finish(self) -> None:
        assert self.like is not None, "there was at least one batch"
        self.file.flush()
        self.file.seek(0)
        self._header()
        assert self.file.tell() == self.start, "numpy left room for the number of rows"
        self.file.seek(0, os.SEEK_END)

    def _header(self) -> None:
        assert self.like is not None, "set by the first batch"
        shape = (self.rows, *self.like.shape[1:])
        descr = np.lib.format.dtype_to_descr(self.like.dtype)
        np.lib.format.write_array_header_1_0(self.file, {"descr": descr, "fortran_order": False, "shape": shape})


class _Npy(contextlib.AbstractContextManager["_Npy"]):
    """`.npy`: the outputs are one array."""

    def __init__(self, file: IO[bytes], folder: Path, what: str) -> None:
        self.numbers, self.what = _Numbers(file, what, "the outputs"), what

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, ids: Array, outputs: Any) -> None:
        if not isinstance(outputs, np.ndarray):
            raise DataError(
                explain(
                    f"{self.what}: a .npy file holds one array.",
                    expected="a predict step that gives a tensor",
                    got=_kind(outputs),
                    fix='"predictions.npz"   # a dict of tensors',
                )
            )
        self.numbers.add(outputs)

    def finish(self) -> None:
        self.numbers.finish()


class _Npz(contextlib.ExitStack):
    """`.npz`: an array for each column. A zip is written member by member, so that each waits in a file without a name."""

    def __init__(self, file: IO[bytes], folder: Path, what: str) -> None:
        super().__init__()
        self.file, self.folder, self.what = file, folder, what
        self.columns: dict[str, _Numbers] = {}

    def add(self, ids: Array, outputs: Any) -> None:
        columns = _columns(ids, outputs, self.what)
        if not self.columns:
            for name in columns:
                nameless = self.enter_context(tempfile.TemporaryFile(dir=self.folder))  # noqa: SIM115  # the stack closes it
                self.columns[name] = _Numbers(nameless, self.what, f"the column {name!r}")
        _check_names(columns, self.columns, self.what)
        for name, own in self.columns.items():
            own.add(columns[name])

    def finish(self) -> None:
        with zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED) as packed:
            for name, own in self.columns.items():
                own.finish()
                own.file.seek(0)
                # Of no date: the same predictions are the same bytes.
                with packed.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                    shutil.copyfileobj(own.file, member, 1 << 20)
                own.file.close()


class _Parquet(contextlib.ExitStack):
    """`.parquet`: a column for each output; one of more dimensions than the rows' is a column of lists, of any length."""

    def __init__(self, file: IO[bytes], folder: Path, what: str) -> None:
        super().__init__()
        self.file, self.what = file, what
        self.writer: Any = None
        self.schema: Any = None
        self.waiting: list[Any] = []
        self.size = 0

    def add(self, ids: Array, outputs: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = _columns(ids, outputs, self.what)
        if self.schema is not None:
            _check_names(columns, self.schema.names, self.what)
        arrays = {name: _arrow(column, self.what, name) for name, column in columns.items()}
        if self.schema is None:
            self.schema = pa.schema([(name, array.type) for name, array in arrays.items()])
            self.writer = pq.ParquetWriter(self.file, self.schema)
            self.callback(self._leave)
        for name, array in arrays.items():
            if array.type != self.schema.field(name).type:
                raise DataError(
                    explain(
                        f"{self.what}: the outputs of one batch are not like those of the batches before.",
                        where=f"the column {name!r}",
                        expected=str(self.schema.field(name).type),
                        got=str(array.type),
                    )
                )
        batch = pa.record_batch([arrays[name] for name in self.schema.names], schema=self.schema)
        self.waiting.append(batch)
        self.size += batch.nbytes
        if self.size >= GROUP:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self.writer.close()

    def _leave(self) -> None:
        """Where something failed: the writer would write its end later, into a file that is closed."""
        if self.writer.is_open:
            with contextlib.suppress(OSError):  # the disk that is full, still
                self.writer.close()
            self.writer.is_open = False

    def _flush(self) -> None:
        import pyarrow as pa

        waiting, self.waiting, self.size = self.waiting, [], 0
        if waiting:
            table = pa.Table.from_batches(waiting, schema=self.schema)
            self.writer.write_table(table, row_group_size=max(len(table), 1))


# What begins a table, by the ending of its file: `(file, folder, what) -> context of a Table`.
FORMATS: Mapping[str, Callable[[IO[bytes], Path, str], AbstractContextManager[Table]]] = {
    ".npy": _Npy,
    ".npz": _Npz,
    ".parquet": _Parquet,
}


def _arrow(rows: Array, what: str, name: str) -> Any:
    """Rows as an array of Arrow's: of numbers or texts, or of lists of such."""
    import pyarrow as pa

    if rows.dtype.kind not in "biufUS":
        raise DataError(
            explain(
                f"{what}: Parquet has no type for this column.",
                where=f"the column {name!r}",
                expected="numbers, bools or texts",
                got=str(rows.dtype),
                fix="torch.view_as_real(output)" if rows.dtype.kind == "c" else None,
            )
        )
    if rows.size >= 2**31:  # places in a list are counted with 32 bits
        raise DataError(
            explain(
                f"{what}: a batch has too many numbers for Parquet.",
                where=f"the column {name!r}",
                expected="fewer than 2 ** 31",
                got=f"{rows.size:,}",
                fix="smaller batches",
            )
        )
    made = pa.array(np.ascontiguousarray(rows).reshape(-1))
    for depth in range(rows.ndim - 1, 0, -1):
        lists, length = int(np.prod(rows.shape[:depth])), rows.shape[depth]
        made = pa.ListArray.from_arrays(pa.array(np.arange(lists + 1, dtype=np.int32) * np.int32(length)), made)
    return made


def _columns(ids: Array, outputs: Any, what: str) -> dict[str, Array]:
    """Ids and outputs by the names of their columns."""
    found = {LONE: outputs} if isinstance(outputs, np.ndarray) else outputs
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(one, np.ndarray) for name, one in found.items()
    ):
        raise DataError(
            explain(
                f"{what}: the columns of a file are named.",
                expected="a predict step that gives a tensor, or a dict of tensors by name",
                got=_kind(outputs),
                fix="ft.predict_step(model, lambda model, batch: {...})   # or a function (ids, outputs) in place of the path",
            )
        )
    if IDS in found:
        raise DataError(
            explain(
                f"{what}: an output has the name {IDS!r}, which is that of the samples' ids.",
                fix='another name; or, to name the samples so, ids="id" with the batch\'s entry of that name',
            )
        )
    return {IDS: ids, **found}


def _check_names(columns: Mapping[str, Array], names: Any, what: str) -> None:
    if columns.keys() != set(names):
        raise DataError(
            explain(
                f"{what}: the outputs of one batch have other names than those of the batches before.",
                expected=", ".join(names),
                got=", ".join(columns),
            )
        )


def _kind(outputs: Any) -> str:
    if isinstance(outputs, dict):
        inner = ", ".join(f"{name!r}: {type(one).__name__}" for name, one in outputs.items())
        return f"a dict {{{inner}}}".replace("ndarray", "tensor")
    return type(outputs).__name__.replace("ndarray", "tensor")


def _described(rows: Array) -> str:
    return f"{rows.dtype}[n{''.join(f', {k}' for k in rows.shape[1:])}]"
