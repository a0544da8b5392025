"""The step level: `make_update`, `as_step`, `make_step`, and `train_step` as a composition of the public pieces."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng, tree
from ..errors import ArgumentError, BatchError, ModelError, StateError, explain
from ..metrics import Last, Mean, Metric
from ..optim import Partition, apply_updates
from ..optim import metrics as reports
from ..optim.guard import select
from ..optim.lists import inside_transform
from ..optim.transform import takes_value_fn
from ..precision import Policy, as_policy
from ..state import TrainState, check_state, check_transform
from ..types import Batch, GradFn, Metrics, Params, Transform
from .accumulate import Accumulated, with_accumulation
from .bind import batch_size, bind
from .float8 import with_float8
from .grad import constants, value_and_grad
from .loss_scale import with_loss_scale
from .precision import with_precision
from .regions import region
from .remat import Modules, with_remat
from .wrap import check_level, step_result

__all__ = ["as_step", "check_batch", "make_step", "make_update", "seeded_by", "train_step"]

# What an optimizer's state reports is shown as it is now, but for these, which differ from batch to batch.
_AVERAGED = ("grad_norm",)


class Update:
    """`(state, batch) -> (state, metrics)`: a gradient and an optimizer, applied; the counters stay. Made by `make_update`."""

    def __init__(
        self, grad_fn: GradFn, tx: Transform | Partition, only: str | None, what: str = "ft.make_update"
    ) -> None:
        check_level(grad_fn, "grad", what)
        check_transform(tx, what)
        self.grad_fn = grad_fn
        self.tx: Any = tx
        self.only = only
        # Two updates of one step draw from streams of their own.
        self._salt = () if only is None else (zlib.crc32(only.encode()),)
        self._select: Callable[[Params], dict[str, Params]] | None = None
        if only is not None:
            self._select, self.tx = _group(tx, only)
        self.states: dict[str, Callable[[Params], Any]] = dict(getattr(grad_fn, "states", {}))
        self.guards: tuple[str, ...] = tuple(getattr(grad_fn, "guards", ()))
        self._searches = takes_value_fn(self.tx)
        self._structure: Any = None  # of the optimizer's state in the last call, which suited

    def __repr__(self) -> str:
        return f"make_update({self.grad_fn!r}, {'...' if self.only is None else f'only={self.only!r}'})"

    def init(self, state: TrainState) -> TrainState:
        """The state with the sub-states of the gradient's wrappers, where it has none yet."""
        missing = {name: make for name, make in self.states.items() if name not in state.extra}
        if not missing:
            return state
        params = self._chosen(state.params)
        return state.replace(extra={**state.extra, **{name: make(params) for name, make in missing.items()}})

    def check(self, state: TrainState, batch: Batch | None = None) -> None:
        """Raise unless the state was made with this optimizer and has the wrappers' sub-states, and the batch can be cut."""
        opt = self._own(state.opt)
        if tree.structure(opt) != self._structure:
            # Which leaves a state trains is its own matter, so what is known from the one before may not hold for this one.
            chosen = self._chosen(state.params)
            expected = self.tx.init({name: torch.empty_like(p, device="meta") for name, p in chosen.items()})
            structure = tree.structure(expected)
            if tree.structure(opt) != structure:
                tree.check_same(
                    expected,
                    opt,
                    root="state.opt" if self.only is None else f"state.opt[{self.only!r}]",
                    what="the state was made with another optimizer than the step.",
                    fix="state = ft.init(model, tx)   # with the tx that the step was made with",
                )
            self._structure = structure
        for name in self.states:
            if name not in state.extra:
                raise StateError(
                    explain(
                        "the state lacks what a wrapper of the step keeps in it.",
                        where=f"state.extra[{name!r}]",
                        expected=f"a sub-state {name!r}",
                        got=f"state.extra with {', '.join(state.extra) or 'nothing'}",
                        fix="state = step.init(state)   # once, before the first step; ft.fit and ft.loop do it themselves\n"
                        "step = ft.as_step(fn, uses=[update])   # a step written by hand names its updates",
                    )
                )

    def _chosen(self, params: Params) -> Params:
        return params if self._select is None else self._select(params)[str(self.only)]

    def _own(self, opt: Any) -> Any:
        if self.only is None:
            return opt
        if not (isinstance(opt, dict) and self.only in opt):
            raise StateError(
                explain(
                    f"an update of the group {self.only!r} alone wants an optimizer's state with groups.",
                    where="state.opt",
                    expected=f"a dict with {self.only!r}",
                    got=f"a dict with {', '.join(opt)}" if isinstance(opt, dict) else type(opt).__name__,
                    fix="tx = ft.optim.partition(labels, {...}); state = ft.init(model, tx)",
                )
            )
        return opt[self.only]

    def __call__(self, state: TrainState, batch: Batch, key: Tensor | None = None) -> tuple[TrainState, Metrics]:
        salt = self._salt
        if torch.compiler.is_compiling():
            if key is None:
                key = rng.fold_in(state.seed, state.step)
                for number in salt:
                    key = rng.fold_in(key, number)
            changes, metrics = self.changes(state, batch, key)
            return state.replace(**changes), metrics
        check_state(state, "an update")
        self.check(state, batch)
        with seeded_by(state, *salt) as seed:
            if key is None:
                key = rng.fold_in(state.seed, state.step) if seed is None else rng.key(seed, state.device)
            changes, metrics = self.changes(state, batch, key)
        return state.replace(**changes), metrics

    def changes(self, state: TrainState, batch: Batch, key: Tensor) -> tuple[dict[str, Any], dict[str, Metric]]:
        """The fields of the state that the update changes, and the metrics."""
        old, others = state.params, {}
        if self._select is not None:
            old = self._chosen(state.params)
            others = constants({name: p for name, p in state.params.items() if name not in old})
        given: dict[str, Any] = {**state.frozen, **state.buffers, **others}
        for name in self.states:
            given[name] = state.extra[name]
        grads, loss, (metrics, new) = self.grad_fn(old, given, batch, key)
        finite = None
        for name in self.guards:
            guard: Any = new[name]
            finite = guard.finite if finite is None else finite & guard.finite
        value_fn = self._value_fn(given, batch, key) if self._searches else None
        if (
            torch.compiler.is_compiling()
        ):  # where the leaves of the gradient came in from outside (see steps/compile.py)
            old = constants(old)
        before = self._own(state.opt)
        run = region(self, self._apply, needed=False)
        params, opt = (
            run(grads, before, old, finite) if value_fn is None else self._apply(grads, before, old, finite, value_fn)
        )
        buffers = {name: new[name] for name in state.buffers}
        if finite is not None and buffers:
            buffers = select(finite, buffers, dict(state.buffers))
        found = {"loss": loss, **_told(opt, loss, self.only), **metrics}
        if self.only is not None:
            params = {name: params.get(name, p) for name, p in state.params.items()}
            opt = {**state.opt, self.only: opt}
        changes: dict[str, Any] = {"params": params, "opt": opt, "buffers": buffers}
        if self.states:
            changes["extra"] = {**state.extra, **{name: new[name] for name in self.states}}
        return changes, found

    def _apply(
        self, grads: Params, opt: Any, params: Params, finite: Tensor | None = None, value_fn: Any = None
    ) -> tuple[Params, Any]:
        more = {} if value_fn is None else {"value_fn": value_fn}
        updates, after = self.tx.update(grads, opt, params, **more)
        new = apply_updates(params, updates)
        return (new, after) if finite is None else select(finite, (new, after), (params, opt))

    def _value_fn(self, given: dict[str, Any], batch: Batch, key: Tensor) -> Callable[[Params], tuple[Tensor, Params]]:
        def value_fn(params: Params, /) -> tuple[Tensor, Params]:
            grads, loss, _ = self.grad_fn(params, given, batch, key)
            return loss.compute(), grads

        return value_fn


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


def make_update(grad_fn: GradFn, tx: Transform | Partition, *, only: str | None = None) -> Update:
    """Make one update of a hand-written step: gradient, optimizer, new parameters. Counters stay as they are.

    Args:
        grad_fn: as made by `ftrain.value_and_grad`, possibly wrapped.
        tx: the optimizer with which the state was made.
        only: a label of `ft.optim.partition`: only that group's parameters are differentiated and updated, with its own
            optimizer. Default: all.

    Returns:
        `(state, batch) -> (state, metrics)`, pure; put it into `ft.as_step`.

    Raises:
        ModelError: `tx` has no such group.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(2, 1)})
    >>> tx = ft.optim.partition({"a.*": "a", "b.*": "b"}, {"a": ft.optim.sgd(0.1), "b": ft.optim.adam(0.1)})
    >>> grad = ft.value_and_grad(ft.bind(model, lambda model, batch: (model["a"](batch) * model["b"](batch)).mean()))
    >>> update = ft.make_update(grad, tx, only="b")
    >>> state = ft.init(model, tx)
    >>> new, metrics = update(state, torch.ones(4, 2))
    >>> [name for name in new.params if not torch.equal(new.params[name], state.params[name])]
    ['b.weight', 'b.bias']
    """
    return Update(grad_fn, tx, only)


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


def _told(opt: Any, loss: Mean, group: str | None) -> dict[str, Metric]:
    """What the optimizer's state reports, as metrics in a dtype that packs with the loss."""
    dtype = loss.total.dtype
    found: dict[str, Metric] = {}
    one = None
    for name, value in reports(opt).items():
        if one is None:
            one = torch.ones_like(loss.total)
        kind = Mean if name.partition("/")[0] in _AVERAGED else Last
        found[name if group is None else f"{name}/{group}"] = kind(value.to(dtype, copy=True), one)
    return found


def _group(tx: Any, only: str) -> tuple[Callable[[Params], dict[str, Params]], Transform]:
    """How to choose a group's parameters, and its optimizer."""
    if not isinstance(tx, Partition):
        raise ModelError(
            explain(
                f"ft.make_update: only={only!r} wants an optimizer with groups.",
                expected="ft.optim.partition(labels, {label: transform})",
                got=type(tx).__name__,
                fix=f'tx = ft.optim.partition({{"{only}.*": "{only}", ...}}, {{"{only}": ..., ...}})',
            )
        )
    if only not in tx.transforms:
        near = difflib.get_close_matches(only, tx.transforms, 1)
        raise ModelError(
            explain(
                f"ft.make_update: the optimizer has no group {only!r}.",
                expected=", ".join(tx.transforms),
                fix=f"only={near[0] if near else next(iter(tx.transforms))!r}",
            )
        )
    return tx.select, tx.transforms[only]


def _accumulated(grad_fn: Any) -> Accumulated | None:
    """The accumulation among a gradient's wrappers, if there is one."""
    while grad_fn is not None and not isinstance(grad_fn, Accumulated):
        grad_fn = getattr(grad_fn, "inner", None)
    return grad_fn


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
