"""Which optimizers a step is made of: what tells the run of one from that of another whose state has the same form.

A `Transform` is two functions, which know where they were written and what they enclose. Its description is that place and the
flags among what is enclosed (`decoupled=True` is what tells AdamW from Adam). Numbers are left out: to go on with another learning
rate is no other run.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..types import Transform

__all__ = ["optimizers"]


def optimizers(step: Any) -> list[str]:
    """The rules of the optimizers in a step, each once, in the order in which they are found.

    >>> import torch, ftrain as ft
    >>> from ftrain.steps.kinds import optimizers
    >>> loss = lambda model, batch: model(batch).sum()
    >>> tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.sgd(0.1))
    >>> optimizers(ft.train_step(torch.nn.Linear(1, 1), loss, tx))
    ['clipping.clip_by_global_norm()', 'sgd.sgd(dampens=False, decays=False, keeps=False, maximize=False, nesterov=False)']
    """
    return list(dict.fromkeys(name for one in _found(step, set()) if (name := _described(one))))


def _found(value: Any, seen: set[int]) -> Iterator[types.FunctionType]:
    """The update functions of rules within a value."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    inner: list[Any] = []
    if isinstance(value, Transform):
        if isinstance(value.update, types.FunctionType):
            yield value.update
        inner = [value.update]
    elif isinstance(value, types.FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _full(cell)]
    elif isinstance(value, functools.partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, (tuple, list)):
        inner = list(value)
    elif type(value).__module__.startswith("ftrain.") and hasattr(value, "__dict__"):
        inner = list(vars(value).values())
    for one in inner:
        yield from _found(one, seen)


def _full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # not assigned yet
        return False


def _described(update: types.FunctionType) -> str:
    """Where a rule was written, and its flags; nothing for what only hands on to others."""
    maker = update.__qualname__.split(".")[0]
    if maker in ("chain", "forwarding"):
        return ""
    flags = []
    for name, cell in zip(update.__code__.co_freevars, update.__closure__ or (), strict=True):
        if not _full(cell):
            continue
        if isinstance(cell.cell_contents, bool):
            flags.append(f"{name}={cell.cell_contents}")
        elif isinstance(cell.cell_contents, type):  # an optimizer of torch, say
            flags.append(f"{name}={cell.cell_contents.__name__}")
    return f"{update.__module__.rpartition('.')[2]}.{maker}({', '.join(sorted(flags))})"
