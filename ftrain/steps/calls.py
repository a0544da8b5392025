"""What every call of a step does first: look at its batch, and make torch's generators a function of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import BatchError, explain
from ..optim.lists import inside_transform
from ..state import TrainState
from ..types import Batch

__all__ = ["check_batch", "seeded_by"]


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def seeded_by(state: TrainState, *salt: int) -> rng.seeded | _nothing:
    """Context in which torch's default generators are a function of the state's seed and step; gives that number, the key.

    Where the counters have no value of their own (fake tensors, inside vmap) it does nothing: whoever set that up decides about
    randomness.
    """
    if type(state.step) is not Tensor or state.step.is_meta or inside_transform():
        return _nothing()
    counters = state.counters()
    return rng.seeded(rng.fold_in_host(counters.seed, counters.step, *salt), state.device)


def check_batch(batch: Batch, device: torch.device) -> None:
    """Raise unless every leaf of a batch is a tensor on the state's device.

    >>> import torch
    >>> from ftrain.steps.calls import check_batch
    >>> check_batch({"x": [1.0, torch.zeros(2)]}, torch.device("cpu"))
    Traceback (most recent call last):
    ftrain.errors.BatchError: the batch holds something that is not a tensor.
      where:    batch['x'][0]
      expected: a tensor on cpu
      got:      float
      fix:      torch.as_tensor(batch['x'][0])   # ft.fit and ft.loop convert arrays and numbers by themselves
    """
    for leaf in tree.leaves(batch):
        if not isinstance(leaf, Tensor) or leaf.device != device:
            _bad_batch(batch, device)


def _bad_batch(batch: Batch, device: torch.device) -> None:
    for path, leaf in tree.items(batch, root="batch"):
        if not isinstance(leaf, Tensor):
            raise BatchError(
                explain(
                    "the batch holds something that is not a tensor.",
                    where=path,
                    expected=f"a tensor on {device}",
                    got=tree.describe(leaf),
                    fix=f"torch.as_tensor({path})   # ft.fit and ft.loop convert arrays and numbers by themselves"
                    if isinstance(leaf, (bool, int, float)) or hasattr(leaf, "__array__")
                    else "a dict, tuple or list of tensors; leave out what is not numeric",
                )
            )
        if leaf.device != device:
            raise BatchError(
                explain(
                    "the batch lies on another device than the state.",
                    where=path,
                    expected=f"a tensor on {device}",
                    got=tree.describe(leaf),
                    fix=f'{path}.to("{device}")   # ft.fit and ft.loop move batches by themselves',
                )
            )
