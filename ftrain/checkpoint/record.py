"""The JSON of one checkpoint: what is in it, what wrote it, and a sum that tells damage.

    {"format": 1, "step": 300, "folder": "...", "versions": {...}, "index": {...}, "plain": ..., "document": ..., "check": "..."}

`index` finds the leaves in the arrays (see `packing`), `plain` holds the plain trees, `document` the user's own. `check` is the
SHA-256 of the rest, so that a flipped bit is an error and not another number.

A checkpoint of an older format is brought up to date as it is read, by `MIGRATIONS`; the files stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import optree
import torch

from .._version import __version__
from ..errors import CheckpointError, explain

__all__ = ["FORMAT", "MIGRATIONS", "make", "read", "versions"]

FORMAT = 1
Record = dict[str, Any]


def _from_0(record: Record) -> Record:
    """Format 0, which no release wrote: an entry of the index was a list `[dtype, shape, keys of the array, place]`; no sum."""
    names = ("dtype", "shape", "array", "at")
    index = {
        path: {name: part for name, part in zip(names, entry, strict=False) if part is not None}
        for path, entry in record["index"].items()
    }
    return seal({**record, "format": 1, "index": index})


# What makes a record of the next format out of one of this format.
MIGRATIONS: dict[int, Callable[[Record], Record]] = {0: _from_0}


def versions() -> dict[str, str]:
    """The versions of what wrote the checkpoint."""
    return {
        "ftrain": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "optree": optree.__version__,
        "orbax": metadata.version("orbax-checkpoint"),
    }


def seal(record: Record) -> Record:
    """The record with its sum."""
    body = {key: value for key, value in record.items() if key != "check"}
    return {**body, "check": _sum(body)}


def _sum(body: Record) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def make(step: int, folder: str, index: Any, plain: Any, document: Any) -> Record:
    """The record of a new checkpoint."""
    return seal(
        {
            "format": FORMAT,
            "step": step,
            "folder": folder,
            "versions": versions(),
            "index": index,
            "plain": plain,
            "document": document,
        }
    )


def read(path: Path) -> Record:
    """Read a record, check it, and bring it up to date.

    Raises:
        CheckpointError: it is missing, damaged, or of a format that this version does not know.
    """
    where = str(path.parent.parent)
    try:
        record = json.loads(path.read_bytes())
        form = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(where, f"{path.name} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(form, int) or not isinstance(record.get("index"), dict):
        raise _damaged(where, f"{path} is no record of a checkpoint")
    if form > FORMAT:
        raise CheckpointError(
            explain(
                f"this checkpoint has the format {form}, which this version of ftrain does not know.",
                where=where,
                expected=f"format {FORMAT} or older (ftrain {__version__})",
                got=f"format {form}, written by ftrain {record.get('versions', {}).get('ftrain', '?')}",
                fix="pip install --upgrade ftrain",
            )
        )
    while form < FORMAT:
        if form not in MIGRATIONS:
            raise _damaged(where, f"there is no format {form}")
        record = MIGRATIONS[form](record)
        form = record["format"]
    if record.get("check") != _sum({key: value for key, value in record.items() if key != "check"}):
        raise _damaged(where, f"the sum of {path.name} is not that of its contents")
    return dict(record)


def _damaged(where: str, cause: str) -> CheckpointError:
    return CheckpointError(
        explain("this checkpoint is damaged.", where=where, cause=cause, fix="restore another step of this folder")
    )
