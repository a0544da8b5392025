"""Files that `torch.save` wrote, read so that nothing in them is run."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, RestoreError, explain
from .paths import some

__all__ = ["check_file", "load", "state_dict"]


def check_file(path: str | os.PathLike[str], what: str) -> None:
    """Raise unless there is such a file."""
    if not Path(path).is_file():
        raise CheckpointError(
            explain(
                f"{what}: there is no such file.",
                where=str(Path(path).absolute()),
                got="a folder" if Path(path).is_dir() else None,
                fix="ft.restore(folder, like=state)   # for a folder of checkpoints" if Path(path).is_dir() else None,
            )
        )


def load(path: str | os.PathLike[str], what: str) -> Any:
    """What a file holds: mapped, not read, where its format allows that, so that what is not taken costs nothing.

    Raises:
        CheckpointError: it cannot be read, or holds what would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of many kinds; all say that it cannot be read
        code = re.search(r"GLOBAL \S+|Trying to (?:call|instantiate) .*", str(error))
        raise CheckpointError(
            explain(
                f"{what}: the file holds more than tensors and plain values, and none of it is run."
                if code
                else f"{what}: the file cannot be read; it is of another format, or damaged.",
                where=str(path),
                got=code.group(0) if code else None,
                cause=None if code else _reason(error),
                fix="torch.save(model.state_dict(), path)   # where it comes from"
                if code
                else "ft.checkpoint.from_safetensors(path, state)   # for a safetensors file",
            )
        ) from None  # torch's own text says how to run the code


def _reason(error: Exception) -> str:
    """What torch says is wrong, without its advice to run what is in the file."""
    text = str(error).partition("WeightsUnpickler error:")[2] if str(error).startswith("Weights only") else str(error)
    lines = text.strip().splitlines()
    return ": ".join([type(error).__name__, *(line.strip()[:300] for line in lines[:1])])


def state_dict(loaded: Any, key: str | None, path: str, what: str) -> dict[str, Any]:
    """The state dict in what was loaded: all of it, or the entry `key`.

    Raises:
        RestoreError: there is none; what there is instead is named.
    """
    found = loaded
    if key is not None:
        if not isinstance(loaded, dict) or key not in loaded:
            raise RestoreError(
                explain(
                    f"{what}: the file has no entry {key!r}.",
                    where=path,
                    expected="the name of an entry that is a state dict",
                    got=_entries(loaded),
                )
            )
        found = loaded[key]
    if isinstance(found, dict) and all(isinstance(name, str) for name in found):
        if not found or any(isinstance(one, Tensor) for one in found.values()):
            return found
        inner = [name for name, one in found.items() if isinstance(one, dict) and _is_state_dict(one)]
    else:
        inner = []
    raise RestoreError(
        explain(
            f"{what}: this is no state dict.",
            where=path,
            expected="tensors by name",
            got=_entries(found),
            fix=f"key={inner[0]!r}" if inner else "torch.save(model.state_dict(), path)   # where it comes from",
        )
    )


def _is_state_dict(one: Mapping[Any, Any]) -> bool:
    return bool(one) and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in one.items())


def _entries(loaded: Any) -> str:
    return f"entries {some(map(repr, loaded))}" if isinstance(loaded, dict) else type(loaded).__name__
