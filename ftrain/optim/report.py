"""What a step can tell of its optimizer, such as the learning rate: values that lie in the optimizer's state.

A state that has something to tell is a NamedTuple with a method `metrics() -> {name: 0-d tensor}`. `metrics(opt)` finds all of
them, however deep they lie in chains, groups and wrappers, so that no wrapper has to hand anything on.

Laws
----
- `metrics` reads the state only, and nothing on the host.
- Below a dict (the groups of `partition`, say) a name gets the key: `lr/head`.
- A wrapper's own name hides the same name further inside; of two that stand side by side, the second is called `name_2`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..types import Schedule
from .transform import value_at

__all__ = ["lr_at", "lr_leaf", "metrics"]


def metrics(opt: Any) -> dict[str, Tensor]:
    """The values that the optimizer's states report, by name: learning rates, the norm before clipping, what was skipped ...

    Args:
        opt: a state of any transform, as `state.opt`.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.chain(ft.optim.clip_by_global_norm(1.0), ft.optim.sgd(0.5))
    >>> params = {"w": torch.zeros(2)}
    >>> _, opt = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    >>> ft.optim.metrics(opt)
    {'grad_norm': tensor(5.), 'lr': tensor(0.5000)}
    """
    found: dict[str, Tensor] = {}
    _visit(opt, "", frozenset(), found)
    return found


def _visit(node: Any, label: str, hidden: frozenset[str], into: dict[str, Tensor]) -> None:
    if isinstance(node, dict):
        # A dict of tensors is parameters or moments, of which nothing is to be told.
        if not isinstance(next(iter(node.values()), None), Tensor):
            for key, child in node.items():
                _visit(child, f"{label}/{key}", hidden, into)
        return
    if not isinstance(node, (tuple, list)):
        return
    own = getattr(node, "metrics", None)
    if own is not None:
        told = own()
        for name, value in told.items():
            if name not in hidden:
                into[_free(f"{name}{label}", into)] = value
        hidden = hidden | frozenset(told)  # not told.keys(): dynamo of torch 2.11 cannot join it
    for child in node:
        if isinstance(child, (tuple, list, dict)):
            _visit(child, label, hidden, into)


def _free(name: str, taken: dict[str, Tensor]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


def lr_leaf(lr: float | Tensor | Schedule, count: Tensor) -> Tensor:
    """The leaf in which an optimizer's state shows its learning rate, before the first update: float32 ().

    Not float64: dynamo (2.13) takes a 0-d float64 input on a CPU for a number, reads it at each call in a guard against NaN,
    and would compile again when a norm becomes NaN.

    >>> import torch
    >>> from ftrain.optim.report import lr_leaf
    >>> lr_leaf(0.1, torch.tensor(0))
    tensor(0.1000)
    """
    rate = value_at(lr, count)
    if isinstance(rate, Tensor):
        return rate.detach().to(torch.float32, copy=True)
    return torch.full((), rate, dtype=torch.float32, device=count.device)


def lr_at(rate: float | Tensor, leaf: Tensor) -> Tensor:
    """The leaf after an update that was made with this rate: a tensor of its own, never the rate itself.

    >>> import torch
    >>> from ftrain.optim.report import lr_at
    >>> lr_at(0.2, torch.tensor(0.1))
    tensor(0.2000)
    """
    if isinstance(rate, Tensor):
        return rate.to(torch.float32, copy=True)
    return torch.full_like(leaf, rate)
