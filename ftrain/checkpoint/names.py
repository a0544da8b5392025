"""The names under which plain torch keeps a state's tensors: those of the module's `state_dict`.

Laws
----
- With the module they are exactly the keys of its `state_dict()`: what is tied under all of its names, buffers that are not persistent
  left out.
- Without it they are the state's own: what is tied under its first name, every buffer.
- The module is neither changed nor read for numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, CheckpointError, explain
from ..state import TrainState
from ..steps.average import averaged
from ..steps.skeleton import Installed, Skeleton

__all__ = ["check_model", "state_dict", "ties"]


def state_dict(state: TrainState, model: nn.Module | None, params: str | None, what: str) -> dict[str, Any]:
    """A state's tensors under the names of its module; they share memory with the state.

    Args:
        state: the state.
        model: the module from which it was made, or None.
        params: the name of averaged parameters to take in the place of the parameters, e.g. `"ema"`.
        what: opens the message of an error.

    Returns:
        A dict; with `model` it is what its `state_dict()` gives, with `_metadata`, and with extra state as the module has it now.

    Raises:
        StateError: the state has no such average.
        StructureError: the state belongs to another model.
        CheckpointError: a tensor that has no numbers, is sparse, or is no plain tensor.

    >>> import torch, ftrain as ft
    >>> from ftrain.checkpoint.names import state_dict
    >>> model = torch.nn.BatchNorm1d(2)
    >>> sorted(state_dict(ft.init(model, ft.optim.sgd(0.1)), model, None, "doctest"))
    ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']
    """
    values, buffers = (state.params, state.buffers) if params is None else averaged(state, params, what)
    leaves = {**values, **state.frozen}
    for name, leaf in itertools.chain(leaves.items(), buffers.items()):
        _check_plain(name, leaf, what)
    if model is None:
        return {**leaves, **buffers}
    skeleton = Skeleton(model, train=True)
    skeleton.check(leaves, buffers)
    with Installed(skeleton, leaves, buffers, calls=False) as module:
        found: dict[str, Any] = module.state_dict()
    return found


def ties(model: nn.Module) -> dict[str, str]:
    """The other names of each tensor that has several: `{name: first name}`; the first is that of the state.

    >>> import torch
    >>> from ftrain.checkpoint.names import ties
    >>> one = torch.nn.Linear(2, 2)
    >>> ties(torch.nn.Sequential(one, one))
    {'1.weight': '0.weight', '1.bias': '0.bias'}
    """
    found: dict[str, str] = {}
    kinds: tuple[Iterable[tuple[str, Tensor]], ...] = (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )
    for named in kinds:
        first: dict[int, str] = {}
        for name, leaf in named:
            if first.setdefault(id(leaf), name) != name:
                found[name] = first[id(leaf)]
    return found


def check_model(model: object, what: str) -> None:
    """Raise unless it is a module, or None."""
    if model is not None and not isinstance(model, nn.Module):
        raise ArgumentError(
            explain(
                f"{what}: model= is the module from which the state was made.",
                expected="torch.nn.Module",
                got=type(model).__name__,
                fix="model=model",
            )
        )


def _check_plain(name: str, leaf: Any, what: str) -> None:
    if type(leaf) not in (Tensor, nn.Parameter):
        sharded = type(leaf).__name__ == "DTensor"
        got, fix = type(leaf).__name__, "leaf.full_tensor()   # on each rank, and export on one" if sharded else None
    elif leaf.is_meta or leaf.layout != torch.strided:
        got, fix = f"{leaf.dtype}, {leaf.layout}, on {leaf.device}", None
    else:
        return
    raise CheckpointError(
        explain(
            f"{what}: this cannot be exported.",
            where=name,
            expected="a dense tensor with numbers in it",
            got=got,
            fix=fix,
        )
    )
