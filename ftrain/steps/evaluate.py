"""Steps that only read the state: `eval_step`, `predict_step`, and the way back to an ordinary module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import rng
from ..metrics import normalise
from ..state import TrainState, check_state
from ..types import Batch, Metrics
from .bind import batch_size, check_closure, takes_rng
from .skeleton import Installed, Skeleton
from .train import check_batch, seeded_by

__all__ = ["eval_step", "predict_step", "to_module"]


class ReadStep:
    """A pure function of a state and a batch that leaves the state alone. Made by `eval_step` and `predict_step`."""

    def __init__(self, model: nn.Module, fn: Callable[..., Any], name: str) -> None:
        self.wants_rng = takes_rng(fn, 2, name, f"{name}(model, batch) or {name}(model, batch, rng)")
        check_closure(model, fn, name)
        self.skeleton = Skeleton(model, train=False)
        self.fn = fn
        self.name = name

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        if torch.compiler.is_compiling():
            return self._read(state, batch)
        check_state(state, f"the step made from {self.name}")
        check_batch(batch, state.device)
        with seeded_by(state) as seed:
            return self._read(state, batch, seed)

    def _read(self, state: TrainState, batch: Batch, seed: int | None = None) -> Any:
        key = rng.fold_in(state.seed, state.step) if seed is None else rng.key(seed, state.device)
        buffers = {**state.frozen, **state.buffers}
        self.skeleton.check(state.params, buffers)
        with torch.no_grad(), Installed(self.skeleton, state.params, buffers) as model:
            out = self.fn(model, batch, key) if self.wants_rng else self.fn(model, batch)
        return self._finish(out, batch)

    def _finish(self, out: Any, batch: Batch) -> Any:
        return out


class EvalStep(ReadStep):
    """`(state, batch) -> metrics`."""

    def _finish(self, out: Any, batch: Batch) -> Metrics:
        return normalise(out, float(batch_size(batch)), f"the metrics that {self.name} returned")


def eval_step(model: nn.Module, metric_fn: Callable[..., Any]) -> EvalStep:
    """Make an evaluation step: the model in evaluation mode, no gradients, metrics as values.

    Args:
        model: the module; its code is used, its numbers are the state's.
        metric_fn: `metric_fn(model, batch)` or `metric_fn(model, batch, rng)`; returns a dict of metrics. A bare scalar is a
            mean over the batch and weighs as much as the batch has samples.

    Returns:
        `(state, batch) -> metrics`; the state is only read.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> step = ft.eval_step(model, lambda model, batch: {"mean": model(batch).mean()})
    >>> step(ft.init(model, ft.optim.sgd(0.1)), torch.zeros(4, 2))["mean"].weight
    tensor(4.)
    """
    return EvalStep(model, metric_fn, "metric_fn")


def predict_step(model: nn.Module, fn: Callable[..., Any] | None = None) -> ReadStep:
    """Make a prediction step: the model in evaluation mode, no gradients, any tree of tensors as output.

    Args:
        model: the module; its code is used, its numbers are the state's.
        fn: `fn(model, batch)` or `fn(model, batch, rng)`; default: `model(batch)`.

    Returns:
        `(state, batch) -> outputs`.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 3)
    >>> ft.predict_step(model)(ft.init(model, ft.optim.sgd(0.1)), torch.zeros(4, 2)).shape
    torch.Size([4, 3])
    """
    return ReadStep(model, _forward if fn is None else fn, "the prediction function")


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(batch)


def to_module(model: nn.Module, state: TrainState) -> nn.Module:
    """An ordinary module with the state's tensors: a copy of `model`, in evaluation mode or not as `model` is.

    Args:
        model: the module from which the state was made; not changed.
        state: its tensors are copied, so neither side can change the other.

    Raises:
        StructureError: the state belongs to another model.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 3)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> trained = ft.to_module(model, state)
    >>> torch.equal(trained.weight, state.params["weight"]), trained.weight.requires_grad
    (True, True)
    """
    check_state(state, "ft.to_module")
    leaves = {**state.params, **state.frozen, **state.buffers}
    named = dict(model.named_parameters())
    Skeleton(model, train=True).check({**state.params, **state.frozen}, state.buffers)
    memo: dict[int, Any] = {}
    for name, leaf in {**named, **dict(model.named_buffers())}.items():
        own = leaves[name].detach().clone()
        memo[id(leaf)] = nn.Parameter(own, leaf.requires_grad) if name in named else own
    module = copy.deepcopy(model, memo)
    for part in module.modules():
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
    return module
