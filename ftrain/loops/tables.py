"""A file of rows that is written batch by batch, and is there as a whole or not at all.

Laws
----
- The file has its name only when it is complete and on the disk. Until then, and if anything fails, what was there before stays.
- Memory is bounded by a batch, or by a row group of Parquet, however many rows there are.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, OutputError, explain
from .formats import FORMATS, Array

__all__ = ["check_target", "written"]


def check_target(to: str | os.PathLike[str], what: str) -> Path:
    """The path of a file that can be written; `what` opens the message of an error.

    Raises:
        ArgumentError: its ending is not one that is known.
        OutputError: there is no such folder, the path is a folder, or Parquet needs a package that is not there.

    >>> from ftrain.loops.tables import check_target
    >>> check_target("predictions.csv", "ft.write_predictions")
    Traceback (most recent call last):
    ftrain.errors.ArgumentError: ft.write_predictions: the ending of 'predictions.csv' says no format.
      expected: .npy, .npz or .parquet
      got:      .csv
      fix:      "predictions.parquet"
    """
    path = Path(os.path.realpath(to))
    if path.suffix not in FORMATS:
        raise ArgumentError(
            explain(
                f"{what}: the ending of {os.fspath(to)!r} says no format.",
                expected=".npy, .npz or .parquet",
                got=path.suffix or "none",
                fix=f'"{Path(to).with_suffix(".parquet")}"',
            )
        )
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(
            explain(
                f"{what}: a folder is no file to write to." if path.is_dir() else f"{what}: there is no such folder.",
                where=str(path if path.is_dir() else path.parent),
                expected="the path of a file, in a folder that exists",
                fix=None if path.is_dir() else f"os.makedirs({str(path.parent)!r})",
            )
        )
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  # asked for before any work is done
        except ImportError as error:
            raise OutputError(
                explain(
                    f"{what}: Parquet is written with the package pyarrow, which is not installed.",
                    where=str(path),
                    cause=str(error),
                    fix="pip install pyarrow",
                )
            ) from error
    return path


@contextlib.contextmanager
def written(path: Path, what: str) -> Iterator[Callable[[Array, Any], None]]:
    """What adds rows to a file, which takes the name `path` when the block ends.

    Args:
        path: what `check_target` gave.
        what: how errors call the caller.

    Raises:
        OutputError: it could not be written: a full disk, a folder of another user.

    >>> import pathlib, tempfile, numpy as np
    >>> from ftrain.loops.tables import check_target, written
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = check_target(folder + "/rows.npy", "doctest")
    ...     with written(path, "doctest") as add:
    ...         add(np.arange(2), np.ones((2, 3)))
    ...         add(np.arange(1), np.zeros((1, 3)))
    ...     np.load(path).shape
    (3, 3)
    """
    made = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    telling = _Telling(path, what)
    try:
        with telling:
            file = made.open("xb")
        with file, FORMATS[path.suffix](file, path.parent, what) as table:

            def add(ids: Array, outputs: Any) -> None:
                with telling:
                    table.add(ids, outputs)

            yield add
            with telling:
                table.finish()
                file.flush()
                os.fsync(file.fileno())
        with telling:
            if path.exists():
                made.chmod(path.stat().st_mode & 0o7777)
            made.replace(path)
            _sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # what went wrong before counts
            made.unlink(missing_ok=True)
        raise


class _Telling(contextlib.AbstractContextManager[None]):
    """Makes our own error of the system's; around what writes alone, since data and models have such errors, too."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                explain(
                    f"{self.what}: the file cannot be written.",
                    where=str(self.path),
                    got=f"{type(error).__name__}: {error.strerror or error}",
                    cause="a full disk, a read-only file system, or a folder of another user",
                    fix="the file that was there before is as it was" if self.path.exists() else None,
                )
            ) from error


def _sync(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
