"""The step level: `as_step`, `make_step`, and `train_step` as a composition of the public pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import rng
from ..errors import ArgumentError, StateError, explain
from ..precision import Policy, as_policy
from ..state import TrainState, check_state
from ..types import Batch, GradFn, Metrics, Transform
from .accumulate import Accumulated, with_accumulation
from .bind import batch_size, bind
from .calls import check_batch, seeded_by
from .float8 import with_float8
from .grad import value_and_grad
from .loss_scale import with_loss_scale
from .precision import with_precision
from .remat import Modules, with_remat
from .update import Update
from .watching import WATCHER
from .wrap import check_level, step_result

__all__ = ["Stepped", "as_step", "make_step", "train_step"]


class Stepped:
    """A step made of a function that leaves the counters alone. Made by `as_step`; call it: `state, metrics = step(state, batch)`."""

    # Tells a compiled step and a loop that this step advances `step` by one and `samples` by the batch size, always.
    advances = True

    def __init__(self, fn: Callable[[TrainState, Batch], tuple[TrainState, Any]], uses: Iterable[Any]) -> None:
        self.fn = fn
        self.uses = tuple(uses)

    def __repr__(self) -> str:
        return f"as_step({getattr(self.fn, '__name__', self.fn)!r})"

    def init(self, state: TrainState) -> TrainState:
        """The state with the sub-states of the wrappers that the step is made of, where it has none yet."""
        for part in self.uses:
            state = part.init(state)
        return state

    def names(self) -> set[str]:
        """The names of the sub-states that the step keeps in `state.extra`."""
        return {name for part in self.uses for name in part.states}

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """Raise unless state and batch suit the updates that the step is made of."""
        for part in self.uses:
            part.check(state, batch)

    def check_rows(self, n: int) -> None:
        """Raise where a batch of `n` samples cannot be cut into micro-batches; asked before a run."""
        for part in self.uses:
            accumulated = _accumulated(getattr(part, "grad_fn", None))
            if accumulated is not None:
                accumulated.check_rows(n)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if torch.compiler.is_compiling():
            return self._step(state, batch)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self(state, batch)
        watcher = WATCHER.get()
        if watcher is not None:
            watched: tuple[TrainState, Metrics] = watcher(self, state, batch)
            return watched
        check_state(state, "a train step")
        check_batch(batch, state.device)
        self.check(state, batch)
        with seeded_by(state) as seed:
            return self._step(state, batch, seed)

    def _step(self, state: TrainState, batch: Batch, seed: int | None = None) -> tuple[TrainState, Metrics]:
        new, metrics = step_result(self.fn(state, batch), repr(self))
        if new.step is not state.step and seed is not None and new.counters() != state.counters():
            raise StateError(
                explain(
                    "the function given to ft.as_step counted its steps itself, so they would be counted twice.",
                    where="state.step, state.samples",
                    expected="the counters of the state that it was given",
                    got=str(new.counters()),
                    cause="it calls a step, or state.advance, where an update of ft.make_update is meant",
                    fix="update = ft.make_update(grad, tx)   # in place of the step\nstate.replace(params=...)   # in place of state.advance",
                )
            )
        return new.advance(batch_size(batch)), metrics


class TrainStep(Stepped):
    """A pure step made of one gradient and one optimizer. Made by `make_step`."""

    def __init__(self, grad_fn: GradFn, tx: Transform) -> None:
        self.update = Update(grad_fn, tx, None, "ft.make_step")
        super().__init__(self.update, (self.update,))
        self.grad_fn = grad_fn
        self.tx = tx

    def __repr__(self) -> str:
        return f"make_step({self.grad_fn!r}, ...)"

    def _step(self, state: TrainState, batch: Batch, seed: int | None = None) -> tuple[TrainState, Metrics]:
        key = rng.fold_in(state.seed, state.step) if seed is None else rng.key(seed, state.device)
        changes, metrics = self.update.changes(state, batch, key)
        return state.advance(batch_size(batch), **changes), metrics


def as_step(fn: Callable[[TrainState, Batch], tuple[TrainState, Any]], *, uses: Iterable[Any] = ()) -> Stepped:
    """Make a step of a function that you write by hand, out of updates or of anything else.

    Law: `state, metrics = fn(state, batch)`, then `step + 1` and `samples + batch size`; torch's default generators are seeded by
    (seed, step) for the time of the call.

    Args:
        fn: `(state, batch) -> (state, metrics)`, pure, which leaves the counters alone.
        uses: the updates (`ft.make_update`) in it: their sub-states, and their checks of state and batch.

    Returns:
        A step like those of `ft.train_step`: for `ft.compile`, `ft.fit`, `ft.with_ema` and the rest.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> update = ft.make_update(
    ...     ft.value_and_grad(ft.bind(model, lambda model, batch: model(batch).square().mean())), tx
    ... )
    >>> def twice(state, batch):
    ...     state, _ = update(state, batch)
    ...     return update(state, batch)
    >>> step = ft.as_step(twice, uses=[update])
    >>> state, metrics = step(ft.init(model, tx), torch.ones(4, 2))
    >>> state.step, state.opt.count
    (tensor(1), tensor(2))
    """
    if hasattr(fn, "advances"):
        raise ArgumentError(
            explain(
                "ft.as_step wants a function that leaves the counters alone, and this is a step already.",
                expected="(state, batch) -> (state, metrics), made of updates",
                got=repr(fn),
                cause="`step` and `samples` would be counted twice",
                fix="ft.as_step(update, uses=[update])   # update = ft.make_update(grad, tx)",
            )
        )
    check_level(fn, "step", "ft.as_step")
    parts = tuple(uses) if isinstance(uses, Iterable) else (None,)
    for part in parts:
        if not isinstance(part, Update):
            raise StateError(
                explain(
                    "ft.as_step: uses= holds something that is no update.",
                    expected="what ft.make_update gives",
                    got=type(uses if part is None else part).__name__,
                    fix="ft.as_step(fn, uses=[update])",
                )
            )
    return Stepped(fn, parts)


def make_step(grad_fn: GradFn, tx: Transform) -> TrainStep:
    """Make a step from a grad-level function and an optimizer.

    Law: `params' = params + tx.update(grads, opt, params)`; `step' = step + 1`; `samples' = samples + batch size`. The metrics
    are those of the loss, the loss itself under `"loss"`, and what the optimizer's state reports (`lr`, `grad_norm` ...).

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
    (tensor(1), ['loss', 'lr'])
    """
    return TrainStep(grad_fn, tx)


def train_step(
    model: nn.Module,
    loss_fn: Callable[..., Any],
    tx: Transform,
    *,
    precision: str | int | Policy | None = None,
    accumulate: int = 1,
    remat: Modules | None = None,
) -> TrainStep:
    """Make the usual training step.

    It is exactly this composition, which you may write by hand and wrap at any level; what is not asked for is left out:

        loss = ft.bind(model, loss_fn)                # (params, buffers, batch, rng) -> (loss, (metrics, buffers))
        loss = ft.with_remat(loss, remat)             # remat="blocks.*"
        loss = ft.with_float8(loss)                   # precision="fp8-mixed"
        loss = ft.with_precision(loss, precision)     # precision="bf16-mixed"
        grad = ft.value_and_grad(loss)                # (params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))
        grad = ft.with_accumulation(grad, accumulate) # also for windows (ft.data.window)
        grad = ft.with_loss_scale(grad)               # precision="16-mixed"
        step = ft.make_step(grad, tx)                 # (state, batch) -> (state, metrics)

    Args:
        model: the module. Its code is used, its numbers are the state's; it is copied and never changed.
        loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, rng)`; returns a scalar loss or `(loss, metrics)`.
        tx: the optimizer with which the state was made.
        precision: `"32-true"`, `"64-true"`, `"bf16-mixed"`, `"16-mixed"`, `"bf16-true"`, `"16-true"`, `"fp8-mixed"` or an `ft.Policy`;
            default: whatever dtypes model and batch have.
        accumulate: micro-batches into which each batch is cut.
        remat: modules whose activations are computed again in the backward pass.

    Returns:
        A pure function `(state, batch) -> (state, metrics)`; `ft.compile` makes it fast.

    Raises:
        ModelError: lazy parameters, a `loss_fn` of another form, one that uses the outer model, or a `remat` without a match.
        PrecisionError: an unknown precision.
        LimitError: `accumulate` is not a positive integer.

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
    policy = None if precision is None else as_policy(precision, "ft.train_step")
    loss: Any = bind(model, loss_fn)
    if remat is not None:
        loss = with_remat(loss, remat)
    if policy is not None and policy.float8:
        loss = with_float8(loss)
    if policy is not None:
        loss = with_precision(loss, policy)
    grad: Any = with_accumulation(value_and_grad(loss), accumulate)
    if policy is not None and policy.loss_scale:
        grad = with_loss_scale(grad)
    return make_step(grad, tx)


def _accumulated(grad_fn: Any) -> Accumulated | None:
    """The accumulation among a gradient's wrappers, if there is one."""
    while grad_fn is not None and not isinstance(grad_fn, Accumulated):
        grad_fn = getattr(grad_fn, "inner", None)
    return grad_fn
