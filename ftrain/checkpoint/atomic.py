"""Writing a file so that it is there as a whole or not at all.

Law: whatever happens while it is being written (an exception, a full disk, `kill -9`), the file that was there before is as it was.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, explain
from .folder import sync

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], what: str) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` when the block ends and its bytes are on the disk.

    Args:
        path: where. A symbolic link is followed.
        what: opens the message of an error.

    Raises:
        CheckpointError: it cannot be written: no such folder, a read-only one, a full disk.

    >>> import os, pathlib, tempfile
    >>> from ftrain.checkpoint.atomic import replacing
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(folder + "/a", "doctest") as file:
    ...         size = file.write(b"new")
    ...         print(os.path.exists(folder + "/a"))
    ...     print(pathlib.Path(folder + "/a").read_text(), os.listdir(folder))
    False
    new ['a']
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        raise CheckpointError(
            explain(
                f"{what}: a folder is no file to write to." if target.is_dir() else f"{what}: there is no such folder.",
                where=str(target if target.is_dir() else target.parent),
                expected="the path of a file, in a folder that exists",
                fix=f"os.makedirs({str(target.parent)!r})" if not target.is_dir() else f'"{target / "model"}"',
            )
        )
    made = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with made.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            made.chmod(target.stat().st_mode & 0o7777)
        made.replace(target)
        sync(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what went wrong before counts, e.g. that the folder cannot be written to
            made.unlink(missing_ok=True)
        cause = _of_the_system(error)
        if cause is None:
            raise
        raise CheckpointError(
            explain(
                f"{what}: the file cannot be written.",
                where=str(target),
                got=f"{type(cause).__name__}: {cause.strerror or cause}",
                cause="a full disk, a read-only file system, or a folder of another user",
                fix="the file that was there before is as it was" if target.exists() else None,
            )
        ) from error


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind another one: torch.save hides it behind a RuntimeError of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
