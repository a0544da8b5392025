"""The hooks of a run: which of them hear an event, and the fold of the state over them.

Laws
----
- Only hooks that want an event are called, and where none does, no event is made.
- At a step at which nothing is due, only the hooks that hear every step are looked at; so the others cost nothing there.
- A hook's result has the structure, shapes, dtypes and devices of what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .. import tree
from ..errors import HookError, MetricError, explain
from ..metrics import Collect, Last, Metric
from ..state import TrainState
from .cadences import Cadence, Clock, Moment
from .events import CHANGES, Event, Hook, Many, On, Outcome, When, check_hook, name_of

__all__ = ["Hooks", "went_back"]

Filter = tuple[str | Cadence, ...]


class _Entry(NamedTuple):
    """A hook, and all the conditions around it: each of the filters, and each of the predicates."""

    name: str
    hook: Any
    filters: tuple[Filter, ...]
    predicates: tuple[Any, ...]


class Hooks:
    """The hooks of a run, called in order.

    Args:
        hooks: as given to `fit`.
        length: batches in an epoch of the run's data, or None.
        tokens: whether the run counts tokens.
    """

    def __init__(self, hooks: Sequence[Any], length: int | None = None, tokens: bool = False) -> None:
        self._entries: list[_Entry] = []
        names: set[str] = set()
        for position, hook in enumerate(hooks):
            check_hook(hook, "hooks=", f"hooks[{position}]")
            for one in _flat(hook):
                if isinstance(one.hook, Hook) and one.name in names:
                    raise HookError(
                        explain(f"two hooks with memory have the name {one.name!r}.", fix="give each a name of its own")
                    )
                if isinstance(one.hook, Hook):
                    names.add(one.name)
                self._entries.append(one._replace(filters=_bound(one.filters, length, tokens)))
        self.before: Clock | None = None
        # Those that hear every step, whatever the time is.
        self._steady = [one for one in self._entries if all("step" in filter for filter in one.filters)]
        self.steady = bool(self._steady)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def listens(self, kind: str, now: Clock, *, due: bool = True) -> bool:
        """Whether any hook wants this event; cheap, asked before an event is made. `due`: see `__call__`."""
        return any(self._wants(one, kind, now) for one in self._entries) if due else self.steady

    def moments(self, now: Clock) -> list[Moment]:
        """When a hook may be called next for a step, those left out that are called at every one."""
        found: list[Moment] = []
        for one in self._entries:
            if one.filters and not all("step" in filter for filter in one.filters):
                found.extend(_moments(one.filters, now))
        return found

    def check_names(self, taken: set[str]) -> None:
        """Raise where a hook would keep its memory under a name that the step uses."""
        for one in self._entries:
            if isinstance(one.hook, Hook) and one.name in taken:
                raise HookError(
                    explain(
                        f"the step keeps something under the name {one.name!r}, and so does a hook.",
                        where=f"state.extra[{one.name!r}]",
                        expected="a name of its own for each wrapper and each hook with memory",
                        fix=f'ft.Hook("{one.name}_hook", init, update)   # or name= of a ready-made hook',
                    )
                )

    def init(self, state: TrainState) -> TrainState:
        """The state with the memory of those hooks that have none in it yet, or one of another form: that of another hook."""
        extra = dict(state.extra)
        changed = False
        for one in self._entries:
            if not isinstance(one.hook, Hook):
                continue
            fresh = _memory(one.name, one.hook.init(state.replace(extra=dict(extra))))
            if one.name not in extra or not _alike(extra[one.name], fresh):
                extra[one.name], changed = fresh, True
        return state.replace(extra=extra) if changed else state

    def __call__(self, state: TrainState, event: Event, *, due: bool = True) -> Outcome:
        """Run the hooks that want this event; gives the last state, all their metrics, and the first reason to stop.

        Metrics are floats, or `Metric`s on the device. After a hook that went back to an earlier state no other is called: the
        event did not happen.

        Args:
            state: where the first hook begins.
            event: what happened.
            due: False at a step before all `moments`: no cadence can fire, so only those are called that hear every step.
        """
        metrics: dict[str, Any] = {}
        stop: str | None = None
        looks = event.kind not in CHANGES
        for one in self._entries if due else self._steady:
            if due and not self._wants(one, event.kind, event.clock):
                continue
            if one.predicates and not _agrees(one, event):
                continue
            if isinstance(one.hook, Hook):
                new, found, why = _with_memory(one.name, one.hook, state, event)
            else:
                new, found, why = _read(one.name, one.hook(state, event), state, event)
            if looks:
                _check_look(one.name, event, state, Outcome(new, found, why))
            for key, value in (found or {}).items():
                _add(metrics, key, _metric(one.name, key, value), one.name)
            stop = stop or why
            before, state = state, new
            if went_back(before, state, one.name, event.kind):
                break
        return Outcome(state, metrics, stop)

    def witness(self, state: TrainState | None, event: Event) -> Iterator[Exception]:
        """Let each hook see an exception, whatever the others do with it; gives what they raised themselves."""
        for one in self._entries:
            try:
                if not self._wants(one, event.kind, event.clock) or not _agrees(one, event):
                    continue
                if not isinstance(one.hook, Hook):
                    found = one.hook(state, event)
                    if found is not state:
                        _check_look(one.name, event, state, found if isinstance(found, Outcome) else Outcome(found))
                elif state is not None and one.name in state.extra:
                    _check_look(one.name, event, state, _with_memory(one.name, one.hook, state, event))
            except Exception as error:
                yield error

    def passed(self, now: Clock | None) -> None:
        """This moment is over: cadences are asked next about what comes after it."""
        self.before = now

    def _wants(self, one: _Entry, kind: str, now: Clock) -> bool:
        if not one.filters:
            return kind in CHANGES
        return all(any(self._fires(when, kind, now) for when in filter) for filter in one.filters)

    def _fires(self, when: str | Cadence, kind: str, now: Clock) -> bool:
        if isinstance(when, str):
            return when == kind
        return kind in ("start", "step", "epoch") and when.fires(None if kind == "start" else self.before, now)


def _flat(hook: Any, filters: tuple[Filter, ...] = (), predicates: tuple[Any, ...] = ()) -> Iterator[_Entry]:
    """The hooks inside of one, each with all the conditions around it."""
    if isinstance(hook, On):
        yield from _flat(hook.hook, (*filters, hook.when), predicates)
    elif isinstance(hook, When):
        yield from _flat(hook.hook, filters, (*predicates, hook.predicate))
    elif isinstance(hook, Many):
        for one in hook.hooks:
            yield from _flat(one, filters, predicates)
    else:
        yield _Entry(name_of(hook), hook, filters, predicates)


def _bound(filters: tuple[Filter, ...], length: int | None, tokens: bool) -> tuple[Filter, ...]:
    return tuple(
        tuple(one if isinstance(one, str) else one.bound(length, tokens, "a hook") for one in filter)
        for filter in filters
    )


def _moments(filters: tuple[Filter, ...], now: Clock) -> list[Moment]:
    """When to ask next whether the filters let a step through: each cadence is asked at each of its moments."""
    found: list[Moment] = []
    for filter in filters:
        cadences = [when for when in filter if isinstance(when, Cadence)]
        if not cadences and "step" not in filter:
            return []
        if "step" not in filter:
            found.extend(moment for cadence in cadences for moment in cadence.moments(now))
    return found


def _agrees(one: _Entry, event: Event) -> bool:
    for predicate in one.predicates:
        found = predicate(event)
        if not isinstance(found, (bool, np.bool_)):
            raise HookError(
                explain(
                    f"the predicate of the hook {one.name!r} gave no bool at a {event.kind!r} event.",
                    expected="True or False",
                    got=tree.describe(found),
                    cause="a tensor has to be read from the device to be a bool" if isinstance(found, Tensor) else None,
                    fix="ft.when(lambda event: event.step > 10, hook)",
                )
            )
        if not found:
            return False
    return True


def _check_look(name: str, event: Event, state: TrainState | None, out: Outcome) -> None:
    """Raise where a hook changed something at an event at which nothing can be changed any more."""
    if out.state is not state or out.metrics or out.stop is not None:
        raise HookError(
            explain(
                f"the hook {name!r} changed something at a {event.kind!r} event, where it can only look.",
                cause="the checkpoint is made" if event.kind == "saved" else "the run is over",
                expected="the state as it was given, no metrics and no reason to stop",
                fix='return state   # and do the work at a "step" or "evaluation" event',
            )
        )


def went_back(before: TrainState, after: TrainState, name: str, kind: str = "step") -> bool:
    """Whether a hook gave an earlier state; raises where it changed what only the loop and `ft.init` may."""
    if after.step is before.step and after.epoch is before.epoch and after.seed is before.seed:
        return False  # the very same tensors, as mostly: nothing has to be read
    old, new = before.counters(), after.counters()
    for field, why, fix in (
        ("epoch", "steps go back with an earlier state, the data does not", "earlier.replace(epoch=state.epoch)"),
        (
            "seed",
            "all randomness of a run comes from its seed, by which a checkpoint knows it",
            "state.replace(params=...)",
        ),
    ):
        if getattr(old, field) != getattr(new, field):
            raise HookError(
                explain(
                    f"the hook {name!r} returned a state of another {field}.",
                    where=f"state.{field}",
                    expected=str(getattr(old, field)),
                    got=str(getattr(new, field)),
                    cause=why,
                    fix=f"return {fix}",
                )
            )
    if new.step > old.step and kind != "start":
        raise HookError(
            explain(
                f"the hook {name!r} returned a state of steps that were not made.",
                where="state.step",
                expected=f"at most {old.step}",
                got=str(new.step),
                cause="only the loop counts on; a hook may begin anew at the start, or go back to an earlier state",
                fix="return state.replace(params=...)",
            )
        )
    return new.step < old.step


def _add(metrics: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Note a metric; one that another hook told at this event as well is merged with that."""
    held = metrics.get(key)
    if isinstance(held, Metric) and type(held) is type(value):
        value = held.merge(value)
    elif held is not None and type(held) is not type(value):
        raise MetricError(
            explain(
                f"the hook {name!r} tells a metric that another hook tells in another form.",
                where=key,
                expected=type(held).__name__,
                got=type(value).__name__,
                fix="a name of its own for each",
            )
        )
    metrics[key] = value


def _metric(hook: str, key: str, value: Any) -> Any:
    if isinstance(value, (int, float, np.number)):
        return float(value)
    if isinstance(value, Metric) and not isinstance(value, Collect):
        return value
    if isinstance(value, Tensor) and value.ndim == 0:
        return Last(value.detach())
    raise MetricError(
        explain(
            f"the hook {hook!r} returned a metric that is not a number.",
            where=key,
            expected="a number, a 0-d tensor, or a metric of ftrain.metrics other than Collect",
            got=tree.describe(value),
        )
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether two memories are of one form."""
    return tree.same_structure(a, b) and all(
        isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)
    )


def _memory(name: str, memory: Any) -> Any:
    """Raise unless a hook's first memory is a tree of tensors."""
    for path, leaf in tree.items(memory, "memory"):
        if not isinstance(leaf, Tensor):
            raise HookError(
                explain(
                    f"the memory of the hook {name!r} holds something that is no tensor.",
                    where=path,
                    expected="a tree of tensors: it lives in the state",
                    got=tree.describe(leaf),
                    fix="torch.tensor(0.0)",
                )
            )
    return memory


def _with_memory(name: str, hook: Hook, state: TrainState, event: Event) -> Outcome:
    memory = state.extra[name]
    out = hook.update(state, memory, event)
    if not (isinstance(out, tuple) and not isinstance(out, Outcome) and len(out) == 2):
        raise HookError(
            explain(
                f"the hook {name!r} did not return (state, memory) at a {event.kind!r} event.",
                got=type(out).__name__,
                fix="return state, memory",
            )
        )
    found = _read(name, out[0], state, event)
    if out[1] is memory and found.state is state:
        return found  # nothing happened, as at most steps
    if out[1] is not memory:
        tree.check_same(
            memory, out[1], root=f"state.extra[{name!r}]", what=f"the hook {name!r} changed the form of its memory."
        )
    return found._replace(state=found.state.replace(extra={**found.state.extra, name: out[1]}))


def _read(name: str, out: Any, state: TrainState, event: Event) -> Outcome:
    outcome = out if isinstance(out, Outcome) else Outcome(out)
    if not isinstance(outcome.state, TrainState) and not (outcome.state is None and state is None):
        raise HookError(
            explain(
                f"the hook {name!r} returned no state at a {event.kind!r} event.",
                expected="a TrainState, or ft.Outcome(state, metrics, stop)",
                got=type(outcome.state).__name__,
                cause="forgot to return state?",
                fix="return state",
            )
        )
    if outcome.state is not state:
        tree.check_same(
            state,
            outcome.state,
            root="state",
            what=f"the hook {name!r} returned a state that is not like the one it was given, at a {event.kind!r} event.",
            fix="return state.replace(params=...)",
        )
    if (outcome.stop is not None and (not isinstance(outcome.stop, str) or not outcome.stop)) or not isinstance(
        outcome.metrics, (Mapping, type(None))
    ):
        raise HookError(
            explain(
                f"the hook {name!r} returned an outcome that makes no sense, at a {event.kind!r} event.",
                expected="ft.Outcome(state, metrics, stop): a dict of metrics, and a reason in words, or None for each",
                got=f"metrics={outcome.metrics!r}, stop={outcome.stop!r}",
                fix='return ft.Outcome(state, {"name": value}, stop="it is good enough")',
            )
        )
    return outcome
