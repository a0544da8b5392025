"""What an error out of a model says besides its own words: in which module it was raised, and what the batch was like (PEP 678)."""

from __future__ import annotations

import traceback
from types import FrameType

from torch import nn

from .. import tree
from ..errors import FtrainError
from ..loops.failing import annotate
from ..types import Batch
from .fakes import LIBRARIES, place, users_own

__all__ = ["described", "with_circumstances"]

_SHOWN = 20  # leaves of the batch that are listed


def with_circumstances(error: BaseException, batch: Batch, what: str) -> None:
    """Add a note to an error of the user's code or of torch; what ftrain raises by itself says such things already.

    Args:
        error: with its traceback.
        batch: what the step or the model was given.
        what: the public function in which it was raised.

    >>> import torch
    >>> from ftrain.inspect.circumstances import with_circumstances
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(9, 1))
    >>> try:
    ...     model(batch := torch.ones(4, 3))
    ... except RuntimeError as error:
    ...     with_circumstances(error, batch, "ft.check")
    ...     print(error.__notes__[0].partition(", at")[0])
    ftrain: raised in ft.check, in the module '1' (Linear)
    """
    if isinstance(error, FtrainError):
        return
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = f"ftrain: raised in {what}{_module(frames)}"
    frame = users_own(list(traceback.extract_tb(error.__traceback__)))
    if frame is not None and not frame.filename.startswith(LIBRARIES):  # a line of torch tells nobody anything
        where += f", at {place(frame)}"
    annotate(error, "\n".join([where, *described(batch)]))


def described(batch: Batch) -> list[str]:
    """A line for each leaf of a batch: its path, dtype and shape.

    >>> import torch
    >>> from ftrain.inspect.circumstances import described
    >>> described({"x": torch.ones(2, 3)})
    ["  batch['x']: float32[2, 3]"]
    """
    leaves = list(tree.items(batch, "batch"))
    lines = [f"  {path}: {tree.describe(leaf).partition(' on ')[0]}" for path, leaf in leaves[:_SHOWN]]
    return lines + ([f"  ... {len(leaves) - _SHOWN} more"] if len(leaves) > _SHOWN else [])


def _module(frames: list[FrameType]) -> str:
    """The innermost module whose call did not come to its end, by its path in the model; nothing where there is none."""
    called = [frame.f_locals.get("self") for frame in frames if frame.f_code is nn.Module._call_impl.__code__]
    modules = [one for one in called if isinstance(one, nn.Module)]
    if not modules:
        return ""
    inner = modules[-1]
    kind = type(inner).__name__
    # The whole model is what the loss function was given, though it may have called a part of it only.
    roots = [one for frame in frames for one in frame.f_locals.values() if isinstance(one, nn.Module)]
    for root in (*roots, modules[0]):
        for path, module in root.named_modules():
            if module is inner:
                return f", in the module {path!r} ({kind})" if path else f", in the model ({kind})"
    return f", in a module of type {kind}"
