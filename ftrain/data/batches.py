"""One batch: making tensors of it, and moving it to the state's device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import tree
from ..errors import BatchError, explain

__all__ = ["host_tensor", "no_batch", "to_device"]


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch whose leaves are tensors on `device`; one that is so already is handed through as it is.

    Args:
        batch: any tree of tensors, numpy arrays and numbers.
        device: where the state lies.

    Raises:
        BatchError: the batch is None; or a leaf is something else (a string, say), with its path.

    >>> import numpy as np, torch
    >>> from ftrain.data import to_device
    >>> to_device({"x": np.zeros(2, dtype=np.float32), "n": 3}, torch.device("cpu"))
    {'x': tensor([0., 0.]), 'n': tensor(3)}
    """
    if type(batch) is dict:  # the usual batch, without the cost of a general tree
        for leaf in batch.values():
            if type(leaf) is not Tensor or leaf.device != device:
                break
        else:
            return batch
    for leaf in tree.leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.device != device:
            return tree.unflatten(
                tree.structure(batch),
                [
                    host_tensor(leaf, path).to(device, non_blocking=True)
                    for path, leaf in tree.items(batch, root="batch")
                ],
            )
    if batch is None:
        raise no_batch()
    return batch


def no_batch() -> BatchError:
    """The error for None, which is a tree without leaves, and so would go on to the user's model."""
    return BatchError(
        explain(
            "the data gave None in the place of a batch.",
            expected="a tree of tensors",
            cause="a function or collate_fn that returns nothing, or None for what is to be left out",
            fix="ft.data.source(...).filter(...)   # leave such batches out",
        )
    )


def host_tensor(leaf: Any, path: str) -> Tensor:
    """A leaf as a tensor: one that is a tensor already where it lies, others on the CPU.

    Args:
        leaf: a tensor, a numpy array or a number.
        path: where it stands in the batch, for the error.

    Raises:
        BatchError: it is something else.
    """
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "biufc":
        # torch warns of arrays that may not be written to, and would alias them
        array = np.asarray(leaf)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if isinstance(leaf, (bool, int, float)):
        return torch.tensor(leaf)
    raise BatchError(
        explain(
            "the batch holds something that cannot be a tensor.",
            where=path,
            expected="a tensor, a numeric numpy array or a number",
            got=tree.describe(leaf),
            fix="make batches of dicts, tuples or lists of tensors; leave out what is not numeric, e.g. in collate_fn",
        )
    )
