"""The step level: `make_step`, and `train_step` as a composition of the public pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng, tree
from ..errors import BatchError, explain
from ..optim import apply_updates
from ..state import TrainState, check_state, check_transform
from ..types import Batch, GradFn, Metrics, Params, Transform
from .bind import batch_size, bind
from .grad import value_and_grad
from .regions import region

__all__ = ["check_batch", "make_step", "seeded_by", "train_step"]


class TrainStep:
    """A pure step made of a gradient and an optimizer. Call it: `state, metrics = step(state, batch)`."""

    # Tells a compiled step and a loop that this step advances `step` by one and `samples` by the batch size, always.
    advances = True

    def __init__(self, grad_fn: GradFn, tx: Transform) -> None:
        check_transform(tx, "ft.make_step")
        self.grad_fn = grad_fn
        self.tx = tx
        self._opt: Any = None  # an optimizer's state without memory, and its structure: known after the first call
        self._structure: Any = None

    def check(self, state: TrainState) -> None:
        """Raise unless the state was made with this optimizer."""
        if self._opt is None:
            self._opt = self.tx.init({name: torch.empty_like(p, device="meta") for name, p in state.params.items()})
            self._structure = tree.structure(self._opt)
        if tree.structure(state.opt) != self._structure:
            tree.check_same(
                self._opt,
                state.opt,
                root="state.opt",
                what="the state was made with another optimizer than the step.",
                fix="state = ft.init(model, tx)   # with the tx that the step was made with",
            )

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if torch.compiler.is_compiling():
            return self._step(state, batch)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self(state, batch)
        check_state(state, "a train step")
        check_batch(batch, state.device)
        self.check(state)
        with seeded_by(state) as seed:
            return self._step(state, batch, seed)

    def _step(self, state: TrainState, batch: Batch, seed: int | None = None) -> tuple[TrainState, Metrics]:
        key = rng.fold_in(state.seed, state.step) if seed is None else rng.key(seed, state.device)
        given = {**state.frozen, **state.buffers}
        grads, loss, (metrics, new) = self.grad_fn(state.params, given, batch, key)
        old = state.params
        if (
            torch.compiler.is_compiling()
        ):  # where the leaves of the gradient came in from outside (see steps/compile.py)
            old = {name: p.detach() for name, p in old.items()}
        params, opt = region(self, self._update)(grads, state.opt, old)
        state = state.advance(
            batch_size(batch), params=params, opt=opt, buffers={name: new[name] for name in state.buffers}
        )
        return state, {"loss": loss, **metrics}

    def _update(self, grads: Params, opt: Any, params: Params) -> tuple[Params, Any]:
        updates, opt = self.tx.update(grads, opt, params)
        return apply_updates(params, updates), opt


def make_step(grad_fn: GradFn, tx: Transform) -> TrainStep:
    """Make a step from a grad-level function and an optimizer.

    Law: `params' = params + tx.update(grads, opt, params)`; `step' = step + 1`; `samples' = samples + batch size`. The metrics
    are those of the loss, and the loss itself under `"loss"`.

    Args:
        grad_fn: as made by `ftrain.value_and_grad`, possibly wrapped.
        tx: the optimizer with which the state was made.

    Returns:
        `(state, batch) -> (state, metrics)`, pure.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> loss = ft.bind(model, lambda model, batch: model(batch).square().mean())
    >>> step = ft.make_step(ft.value_and_grad(loss), tx)
    >>> state, metrics = step(ft.init(model, tx), torch.ones(8, 2))
    >>> state.step, sorted(metrics)
    (tensor(1), ['loss'])
    """
    return TrainStep(grad_fn, tx)


def train_step(model: nn.Module, loss_fn: Callable[..., Any], tx: Transform) -> TrainStep:
    """Make the usual training step.

    It is exactly this composition, which you may write by hand and wrap at any level:

        loss = ft.bind(model, loss_fn)       # (params, buffers, batch, rng) -> (loss, (metrics, buffers))
        grad = ft.value_and_grad(loss)       # (params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))
        step = ft.make_step(grad, tx)        # (state, batch) -> (state, metrics)

    Args:
        model: the module. Its code is used, its numbers are the state's; it is copied and never changed.
        loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, rng)`; returns a scalar loss or `(loss, metrics)`.
        tx: the optimizer with which the state was made.

    Returns:
        A pure function `(state, batch) -> (state, metrics)`; `ft.compile` makes it fast.

    Raises:
        ModelError: lazy parameters, a `loss_fn` of another form, or one that uses the outer model.

    Randomness: torch's default generators are seeded by (seed, step) for the time of the call, so dropout is a function of the
    state; the global generators are afterwards as they were.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.adamw(1e-2)
    >>> step = ft.train_step(model, lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), tx)
    >>> state = ft.init(model, tx, seed=0)
    >>> batch = {"x": torch.ones(8, 2), "y": torch.zeros(8, 1)}
    >>> new, metrics = step(state, batch)
    >>> new.step, state.step, type(metrics["loss"]).__name__
    (tensor(1), tensor(0), 'Mean')
    """
    return make_step(value_and_grad(bind(model, loss_fn)), tx)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None: ...


def seeded_by(state: TrainState) -> rng.seeded | _nothing:
    """Context in which torch's default generators are a function of the state's seed and step; gives that number, the key.

    Where the counters have no value of their own (fake tensors, inside vmap) it does nothing: whoever set that up decides about
    randomness.
    """
    if type(state.step) is not Tensor or state.step.is_meta or torch._C._functorch.maybe_current_level() is not None:
        return _nothing()
    counters = state.counters()
    return rng.seeded(rng.fold_in_host(counters.seed, counters.step), state.device)


def check_batch(batch: Batch, device: torch.device) -> None:
    """Raise unless every leaf of a batch is a tensor on the state's device.

    >>> import torch
    >>> from ftrain.steps.train import check_batch
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
