"""One update: a gradient and an optimizer, applied to all parameters or to one group. The step level without the counters."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import rng, tree
from ..errors import ModelError, StateError, explain
from ..metrics import Last, Mean, Metric
from ..optim import Partition, apply_updates
from ..optim import metrics as reports
from ..optim.guard import select
from ..optim.transform import takes_value_fn
from ..state import TrainState, check_state, check_transform
from ..types import Batch, GradFn, Metrics, Params, Transform
from .calls import seeded_by
from .grad import constants
from .regions import region
from .wrap import check_level

__all__ = ["Update", "make_update"]

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
        if torch.compiler.is_compiling():
            changes, metrics = self.changes(state, batch, self._key(state) if key is None else key)
            return state.replace(**changes), metrics
        check_state(state, "an update")
        self.check(state, batch)
        with seeded_by(state, *self._salt) as seed:
            if key is None:
                key = self._key(state) if seed is None else rng.key(seed, state.device)
            changes, metrics = self.changes(state, batch, key)
        return state.replace(**changes), metrics

    def _key(self, state: TrainState) -> Tensor:
        """This update's key where the host does not know it: in a trace, and inside vmap."""
        key = rng.fold_in(state.seed, state.step)
        for number in self._salt:
            key = rng.fold_in(key, number)
        return key

    def arguments(self, state: TrainState) -> tuple[Params, dict[str, Any]]:
        """What the gradient is taken with respect to, and what else it is given: `params` and `buffers` of the grad level."""
        old, others = state.params, {}
        if self._select is not None:
            old = self._chosen(state.params)
            others = constants({name: p for name, p in state.params.items() if name not in old})
        given: dict[str, Any] = {**state.frozen, **state.buffers, **others}
        for name in self.states:
            given[name] = state.extra[name]
        return old, given

    def changes(self, state: TrainState, batch: Batch, key: Tensor) -> tuple[dict[str, Any], dict[str, Metric]]:
        """The fields of the state that the update changes, and the metrics."""
        old, given = self.arguments(state)
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
