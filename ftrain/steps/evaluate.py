"""Steps that only read the state: `eval_step`, `predict_step`, and the way back to an ordinary module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from .. import rng
from ..data import Window
from ..errors import BatchError, explain
from ..metrics import normalise
from ..precision import Policy, as_policy
from ..state import TrainState, check_state
from ..types import Batch, Metrics
from .average import averaged
from .bind import batch_size, check_closure, padding, takes_rng
from .calls import check_batch, seeded_by
from .precision import cast_inputs, cast_outputs, check_precision, computing
from .skeleton import Installed, Skeleton

__all__ = ["eval_step", "predict_step", "to_module"]


class ReadStep:
    """A pure function of a state and a batch that leaves the state alone. Made by `eval_step` and `predict_step`."""

    def __init__(
        self,
        model: nn.Module,
        fn: Callable[..., Any],
        name: str,
        params: str | None,
        precision: str | int | Policy | None,
    ) -> None:
        self.wants_rng = takes_rng(fn, 2, name, f"{name}(model, batch) or {name}(model, batch, rng)")
        check_closure(model, fn, name)
        self.skeleton = Skeleton(model, train=False)
        self.fn = fn
        self.name = name
        self.params = params
        self.policy = None if precision is None else as_policy(precision, "ft.eval_step")

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        if torch.compiler.is_compiling():
            return self._read(state, batch)
        check_state(state, f"the step made from {self.name}")
        check_batch(batch, state.device)
        if isinstance(batch, Window):
            raise BatchError(
                explain(
                    "a window of batches stands where one batch is needed.",
                    expected="a batch",
                    got=f"ft.data.Window of {len(batch.batches)} batches",
                    cause="windows are for steps that accumulate gradients",
                    fix="for one in batch.batches: step(state, one)   # ft.evaluate and ft.predict do so by themselves",
                )
            )
        with seeded_by(state) as seed:
            return self._read(state, batch, seed)

    def _read(self, state: TrainState, batch: Batch, seed: int | None = None) -> Any:
        key = rng.fold_in(state.seed, state.step) if seed is None else rng.key(seed, state.device)
        params, own = state.params, state.buffers
        if self.params is not None:
            params, own = averaged(state, self.params, f"the step made from {self.name}")
        buffers = {**state.frozen, **own}
        self.skeleton.check(params, buffers)
        context: AbstractContextManager[Any] = nullcontext()
        if self.policy is not None:
            check_precision(self.policy, params)
            batch = cast_inputs(self.policy, batch)
            context = computing(self.policy, state.device)
        with torch.no_grad(), context, Installed(self.skeleton, params, buffers) as model:
            out = self.fn(model, batch, key) if self.wants_rng else self.fn(model, batch)
        return self._finish(out if self.policy is None else cast_outputs(self.policy, out), batch)

    def _finish(self, out: Any, batch: Batch) -> Any:
        return out


class EvalStep(ReadStep):
    """`(state, batch) -> metrics`."""

    def _finish(self, out: Any, batch: Batch) -> Metrics:
        mask = padding(batch)
        weight = float(batch_size(batch)) if mask is None else mask.sum().to(torch.get_default_dtype())
        return normalise(out, weight, f"the metrics that {self.name} returned")


def eval_step(
    model: nn.Module,
    metric_fn: Callable[..., Any],
    *,
    params: str | None = None,
    precision: str | int | Policy | None = None,
) -> EvalStep:
    """Make an evaluation step: the model in evaluation mode, no gradients, metrics as values.

    Args:
        model: the module; its code is used, its numbers are the state's.
        metric_fn: `metric_fn(model, batch)` or `metric_fn(model, batch, rng)`; returns a dict of metrics. A bare scalar is a
            mean over the batch and weighs as much as the batch has samples, padding left out.
        params: the name of averaged parameters to evaluate (`"ema"`, see `ft.with_ema`); default: the parameters themselves.
        precision: as for `ft.train_step`.

    Returns:
        `(state, batch) -> metrics`; the state is only read.

    Raises (when called):
        StateError: the state has no such average.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> step = ft.eval_step(model, lambda model, batch: {"mean": model(batch).mean()})
    >>> step(ft.init(model, ft.optim.sgd(0.1)), torch.zeros(4, 2))["mean"].weight
    tensor(4.)
    """
    return EvalStep(model, metric_fn, "metric_fn", params, precision)


def predict_step(
    model: nn.Module,
    fn: Callable[..., Any] | None = None,
    *,
    params: str | None = None,
    precision: str | int | Policy | None = None,
) -> ReadStep:
    """Make a prediction step: the model in evaluation mode, no gradients, any tree of tensors as output.

    Args:
        model: the module; its code is used, its numbers are the state's.
        fn: `fn(model, batch)` or `fn(model, batch, rng)`; default: `model(batch)`.
        params: the name of averaged parameters to predict with; default: the parameters themselves.
        precision: as for `ft.train_step`.

    Returns:
        `(state, batch) -> outputs`.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 3)
    >>> ft.predict_step(model)(ft.init(model, ft.optim.sgd(0.1)), torch.zeros(4, 2)).shape
    torch.Size([4, 3])
    """
    return ReadStep(model, _forward if fn is None else fn, "the prediction function", params, precision)


def _forward(model: nn.Module, batch: Batch) -> Any:
    return model(batch)


def to_module(model: nn.Module, state: TrainState, *, params: str | None = None) -> nn.Module:
    """An ordinary module with the state's tensors: a copy of `model`, in evaluation mode or not as `model` is.

    Args:
        model: the module from which the state was made; not changed.
        state: its tensors are copied, so neither side can change the other.
        params: the name of averaged parameters to put in; default: the parameters themselves.

    Raises:
        StructureError: the state belongs to another model.
        StateError: the state has no such average.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 3)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> trained = ft.to_module(model, state)
    >>> torch.equal(trained.weight, state.params["weight"]), trained.weight.requires_grad
    (True, True)
    """
    check_state(state, "ft.to_module")
    values, buffers = (state.params, state.buffers) if params is None else averaged(state, params, "ft.to_module")
    leaves = {**values, **state.frozen, **buffers}
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
