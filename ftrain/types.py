"""The shape of every function that users write or wrap, as Protocols whose docstrings are the contracts.

Five levels, each wrapped only by `A -> A`:

| level     | shape                                                                     | contract        |
|-----------|---------------------------------------------------------------------------|-----------------|
| loss      | `(params, buffers, batch, rng) -> (loss, (metrics, buffers))` + `scope`    | `LossFn`        |
| grad      | `(params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))`      | `GradFn`        |
| transform | `Transform(init, update)`                                                 | `Transform`     |
| step      | `(state, batch) -> (state, metrics)`                                      | `Step`          |
| hook      | `(state, event) -> state` or `Outcome(state, metrics, stop)`              | `Hook`          |

All of them are pure: they change none of their arguments, keep nothing between two calls, and draw random numbers only from
the key they are given or, inside a step, from torch's default generators, which the step seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from .metrics import Mean, Metric

__all__ = [
    "LOSS_SCALE",
    "Batch",
    "Checkpointer",
    "Engine",
    "EvalStep",
    "GradFn",
    "Hook",
    "InitFn",
    "LossFn",
    "Metrics",
    "Params",
    "Saver",
    "Schedule",
    "Step",
    "Transform",
    "UpdateFn",
    "ValueFn",
]

# Name of an entry of `buffers` that is the engine's, not the model's: see `Engine`.
LOSS_SCALE = "ftrain.loss_scale"

Params = dict[str, Tensor]
Batch = Any
Metrics = Mapping[str, Metric]
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


class InitFn(Protocol):
    """`init(params) -> state`: the optimizer's first state for these parameters, a pytree of tensors on their device."""

    def __call__(self, params: Any, /) -> Any: ...


class UpdateFn(Protocol):
    """`update(grads, state, params) -> (updates, state)`.

    `updates` has the structure and shapes of `grads` and is *added* to the parameters, in the wider of the two dtypes, and the
    sum is rounded once; its dtypes are those of `grads`, or float32 where `grads` are of half precision. The new state has the
    structure, shapes and dtypes of the old one. `params` are the parameters before the update; a transform that does not need
    them must accept them all the same.

    A transform that evaluates the loss again (a line search) declares one keyword more, `value_fn: ValueFn | None = None`;
    the step gives it to those alone.
    """

    def __call__(self, grads: Any, state: Any, params: Any, /) -> tuple[Any, Any]: ...


class ValueFn(Protocol):
    """`value_fn(params) -> (value, grads)`: loss and gradient of this step's batch at other parameters; `value` is 0-d."""

    def __call__(self, params: Any, /) -> tuple[Tensor, Any]: ...


class Transform(NamedTuple):
    """An optimizer, or a piece of one: two pure functions (the form of optax).

    Laws: `update` keeps structure, shapes, dtypes and devices of gradients and of its state; hyper-parameters may be Python
    numbers, 0-d tensors or schedules; nothing is read on the host. A state that has something to tell (its learning rate, a
    norm) is a NamedTuple with a method `metrics() -> {name: 0-d tensor}`, see `ftrain.optim.metrics`.

    >>> import torch, ftrain as ft
    >>> tx = ft.optim.sgd(0.5)
    >>> params = {"w": torch.ones(2)}
    >>> updates, state = tx.update({"w": torch.ones(2)}, tx.init(params), params)
    >>> updates["w"]
    tensor([-0.5000, -0.5000])
    """

    init: InitFn
    update: UpdateFn


class Schedule(Protocol):
    """`schedule(step) -> value`: a hyper-parameter as a function of the step; both are 0-d tensors (float64 for the value)."""

    def __call__(self, step: Tensor, /) -> Tensor: ...


class LossFn(Protocol):
    """The loss level: `(params, buffers, batch, rng) -> (loss, (metrics, buffers))`, made by `ftrain.bind`.

    `params` are the leaves that are differentiated, by path. `buffers` are all others (frozen parameters and the module's
    buffers), by path; those that came in are given back, with the values that the forward pass left. `loss` is a `Mean`:
    a total and its weight. `rng` is this call's key.
    """

    def __call__(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Mean, tuple[dict[str, Metric], Params]]: ...

    def scope(self, params: Params, buffers: Params, /) -> AbstractContextManager[Any]:
        """Install the leaves as the loss sees them; the grad level holds this open until the backward has finished."""
        ...


class GradFn(Protocol):
    """The grad level: `(params, buffers, batch, rng) -> (grads, loss, (metrics, buffers))`; `grads` is like `params`.

    `params` may be a part of the parameters; the others are then among `buffers`. A wrapper with a state of its own names it in
    `states: {name: init(params)}`; it finds it in `buffers` under that name and hands the next one back there. A wrapper that
    decides whether an update is made names its state in `guards` too; that state's field `finite` is a 0-d bool.
    """

    def __call__(
        self, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]: ...


class Engine(Protocol):
    """How a gradient is computed: the one place that knows about devices."""

    def value_and_grad(
        self, loss_fn: LossFn, params: Params, buffers: Params, batch: Batch, rng: Tensor, /
    ) -> tuple[Params, Mean, tuple[dict[str, Metric], Params]]:
        """The gradient of `loss.total / loss.weight` with respect to `params`, and what the loss returned.

        A weight of 0 gives a gradient of 0. Where `buffers` has an entry `LOSS_SCALE` (0-d), the gradient is that many times
        larger, and the entry is neither given to the loss nor handed back.
        """
        ...


class Step(Protocol[S]):
    """The step level: `(state, batch) -> (state, metrics)`.

    The new state has the structure, shapes, dtypes and devices of the old one, which stays as it is unless the step was
    compiled with `donate=True`. `metrics` is a dict of monoids (`ftrain.metrics`) or 0-d tensors.
    """

    def __call__(self, state: S, batch: Batch, /) -> tuple[S, Metrics]: ...


class EvalStep(Protocol[S_contra]):
    """`(state, batch) -> metrics`, made by `ftrain.eval_step`; the state is only read."""

    def __call__(self, state: S_contra, batch: Batch, /) -> Metrics: ...


class Hook(Protocol[S_contra]):
    """`(state, event) -> state`, or `Outcome(state, metrics, stop)`; called between steps, on the host."""

    def __call__(self, state: S_contra, event: Any, /) -> Any: ...


class Checkpointer(Protocol):
    """What `fit(checkpoint=...)` takes: a place for checkpoints, and when and which to keep. `ft.Checkpoints` is one."""

    def open(
        self,
        like: Any,
        *,
        resume: Any,
        facts: Mapping[str, Any],
        evaluators: Sequence[str],
        optimizers: Sequence[str] = (),
    ) -> Saver:
        """Begin a run.

        Args:
            like: the state with which the run would begin; a restored one is of the same kind.
            resume: what the user passed to `fit`.
            facts: what tells the run's data from other data.
            evaluators: the names of the run's evaluators.
            optimizers: what tells the optimizers of the step from others; empty where that is not known.

        Raises:
            CheckpointError, RestoreError: the place cannot be written to, or holds a run of another kind. Nothing was done then.
        """
        ...


class Saver(Protocol):
    """The checkpoints of one run that goes on. A snapshot is a `ftrain.loops.Snapshot`.

    Attributes:
        every: the cadence at which `fit` saves.
        found: the snapshot to go on from, or None.
        on_exception: whether `fit` saves when an exception ends the run.
        on_signal: whether `fit` saves when a signal ends the run.
        path: where the checkpoints are.
    """

    every: Any
    found: Any
    on_exception: bool
    on_signal: bool
    path: str

    def save(self, snapshot: Any, /) -> None:
        """Save; the snapshot's memory may be overwritten as soon as this returns."""
        ...

    def amend(self, snapshot: Any, /) -> None:
        """The metrics of this step, which has a checkpoint that was made before they were known."""
        ...

    def undo(self, step: int, /) -> None:
        """Hooks went back to this step: delete what this run saved of later ones."""
        ...

    def check_metrics(self, evaluator: str, metrics: Mapping[str, Any], /) -> None:
        """Raise where what to keep depends on a metric that this evaluator was to give, and does not."""
        ...

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        ...

    def load(self, step: int, /) -> Any:
        """The state of a checkpoint."""
        ...

    def wait(self) -> None:
        """Return when all that was saved is complete; raises what went wrong."""
        ...

    def close(self, cut: bool = False, /) -> None:
        """End: as `wait`, and others may write to the place now. `cut`: the run did not come to its end."""
        ...
