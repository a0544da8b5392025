"""Events, and hooks: pure transformers of the state that are called on them.

A hook is `(state, event) -> state`, or returns `Outcome(state, metrics, stop)`. A hook with memory is `Hook(name, init, update)`:
`init(state)` gives its first memory, a tree of tensors that lives in `state.extra[name]`; `update(state, memory, event)` gives
what a plain hook gives and the new memory, as a pair.

Hooks are called on the host, in the order of their list, at every event, or only when `on(...)` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import tree
from ..errors import HookError, MetricError, explain
from ..state import TrainState
from .units import Cadence, Clock

__all__ = ["Event", "Hook", "Hooks", "Outcome", "on"]

KINDS = ("start", "step", "evaluation", "epoch", "end")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: `"start"`, `"step"`, `"evaluation"`, `"epoch"` or `"end"`.
        step: steps taken, as counted by the state.
        epoch: epochs completed.
        samples: samples seen.
        clock: how far the run is, counted from its start.
        metrics: the step's metrics on the device (`"step"`), the results by full name as floats (`"evaluation"`), or the newest
            recorded value of each metric by full name (`"end"`).
        reason: why the run ends (`"end"`).

    >>> import ftrain as ft
    >>> ft.Event("step", 3, 0, 48).kind
    'step'
    """

    kind: str
    step: int
    epoch: int
    samples: int
    clock: Clock = field(default_factory=Clock)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None


class Outcome(NamedTuple):
    """What a hook may return instead of a state: the state, metrics to record, and a reason to stop.

    >>> import ftrain as ft
    >>> ft.Outcome(state=None, stop="enough").stop
    'enough'
    """

    state: Any
    metrics: Mapping[str, Any] | None = None
    stop: str | None = None


class Hook(NamedTuple):
    """A hook with memory.

    >>> import torch, ftrain as ft
    >>> def update(state, memory, event):
    ...     return state, {"calls": memory["calls"] + 1}
    >>> ft.Hook("counter", lambda state: {"calls": torch.zeros((), dtype=torch.int64)}, update).name
    'counter'
    """

    name: str
    init: Callable[[TrainState], Any]
    update: Callable[[TrainState, Any, Event], Any]


@dataclass(frozen=True)
class _On:
    when: tuple[str | Cadence, ...]
    hook: Any


def on(when: str | Cadence | tuple[str | Cadence, ...], hook: Any) -> Any:
    """Call a hook only at events of one kind, or only at steps when a cadence fires.

    Args:
        when: a kind of event, or e.g. `ft.every(steps=100)`, or a tuple of such: at any of them.
        hook: a function `(state, event) -> state`, or a `Hook`.

    Raises:
        HookError: an unknown kind.

    >>> import ftrain as ft
    >>> hook = ft.on("epoch", lambda state, event: state)
    """
    several = when if isinstance(when, tuple) else (when,)
    for one in several:
        if isinstance(one, str) and one not in KINDS:
            raise HookError(explain(f"ft.on: there are no events of kind {one!r}.", expected=", ".join(KINDS)))
        if not isinstance(one, (str, Cadence)):
            raise HookError(
                explain("ft.on wants a kind of event or a cadence.", expected=", ".join(KINDS), got=repr(one))
            )
    return _On(several, hook)


class Hooks:
    """The hooks of a run, called in order."""

    def __init__(self, hooks: Sequence[Any]) -> None:
        self._hooks: list[tuple[str, tuple[str | Cadence, ...] | None, Any]] = []
        names: set[str] = set()
        for position, hook in enumerate(hooks):
            when, inner = (hook.when, hook.hook) if isinstance(hook, _On) else (None, hook)
            if not (isinstance(inner, Hook) or callable(inner)):
                raise HookError(
                    explain(
                        "hooks= holds something that is no hook.",
                        where=f"hooks[{position}]",
                        expected="a function (state, event) -> state, or ft.Hook(name, init, update)",
                        got=type(inner).__name__,
                    )
                )
            name = inner.name if isinstance(inner, Hook) else getattr(inner, "__name__", repr(inner))
            if isinstance(inner, Hook) and name in names:
                raise HookError(
                    explain(f"two hooks with memory have the name {name!r}.", fix="give each a name of its own")
                )
            names.add(name)
            self._hooks.append((name, when, inner))
        self.before = Clock()

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def listens(self, kind: str, now: Clock) -> bool:
        """Whether any hook wants this event; cheap, asked before an event is made."""
        return any(self._wants(when, kind, now) for _, when, _ in self._hooks)

    def check_names(self, taken: set[str]) -> None:
        """Raise where a hook would keep its memory under a name that the step uses."""
        for name, _, hook in self._hooks:
            if isinstance(hook, Hook) and name in taken:
                raise HookError(
                    explain(
                        f"the step keeps something under the name {name!r}, and so does a hook.",
                        where=f"state.extra[{name!r}]",
                        expected="a name of its own for each wrapper and each hook with memory",
                        fix=f'ft.Hook("{name}_hook", init, update)   # or name= of a ready-made hook',
                    )
                )

    def init(self, state: TrainState) -> TrainState:
        """The state with the memory of those hooks that have none in it yet."""
        extra = dict(state.extra)
        for name, _, hook in self._hooks:
            if isinstance(hook, Hook) and name not in extra:
                extra[name] = hook.init(state)
        return state if extra.keys() == state.extra.keys() else state.replace(extra=extra)

    def __call__(self, state: TrainState, event: Event) -> Outcome:
        """Run the hooks that want this event; gives the last state, all their metrics, and the first reason to stop."""
        metrics: dict[str, Any] = {}
        stop: str | None = None
        for name, when, hook in self._hooks:
            if not self._wants(when, event.kind, event.clock):
                continue
            if isinstance(hook, Hook):
                state, found, why = self._with_memory(name, hook, state, event)
            else:
                state, found, why = _read(name, hook(state, event), state, event)
            for key, value in (found or {}).items():
                if not isinstance(value, (int, float)):
                    raise MetricError(
                        explain(
                            f"the hook {name!r} returned a metric that is not a number.",
                            where=key,
                            got=tree.describe(value),
                        )
                    )
                metrics[key] = float(value)
            stop = stop or why
        return Outcome(state, metrics, stop)

    def passed(self, now: Clock) -> None:
        """This moment is over: cadences are asked next about what comes after it."""
        self.before = now

    def _wants(self, when: tuple[str | Cadence, ...] | None, kind: str, now: Clock) -> bool:
        return when is None or any(self._fires(one, kind, now) for one in when)

    def _fires(self, when: str | Cadence, kind: str, now: Clock) -> bool:
        if isinstance(when, Cadence):
            return kind in ("start", "step") and when.fires(None if kind == "start" else self.before, now)
        return when == kind

    def _with_memory(self, name: str, hook: Hook, state: TrainState, event: Event) -> Outcome:
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
        tree.check_same(
            memory, out[1], root=f"state.extra[{name!r}]", what=f"the hook {name!r} changed the form of its memory."
        )
        return found._replace(state=found.state.replace(extra={**found.state.extra, name: out[1]}))


def _read(name: str, out: Any, state: TrainState, event: Event) -> Outcome:
    outcome = out if isinstance(out, Outcome) else Outcome(out)
    if not isinstance(outcome.state, TrainState):
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
    return outcome
