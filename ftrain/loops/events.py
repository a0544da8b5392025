"""Events, and hooks: pure transformers of the state that are called on them.

A hook is `(state, event) -> state`, or returns `Outcome(state, metrics, stop)`. A hook with memory is `Hook(name, init, update)`:
`init(state)` gives its first memory, a tree of tensors that lives in `state.extra[name]`; `update(state, memory, event)` gives
what a plain hook gives and the new memory, as a pair.

Hooks are called on the host, in the order of their list. `on`, `when`, `once` and `compose` make one of others and say when it
is called; they nest.

Laws
----
- A run goes on from the state that a hook returned, also from an earlier one (a smaller `state.step`): then the step that was
  made did not happen, and the batches that come next are taken.
- At `"saved"` and `"exception"` nothing can be changed any more: a hook only looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import HookError, explain
from ..state import TrainState
from .cadences import Cadence, Clock

__all__ = [
    "CHANGES",
    "KINDS",
    "Event",
    "Hook",
    "Many",
    "On",
    "Outcome",
    "When",
    "compose",
    "name_of",
    "on",
    "once",
    "when",
]

CHANGES = ("start", "step", "evaluation", "epoch", "end")
KINDS = (*CHANGES, "saved", "exception")


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        kind: `"start"`: before the first step. `"step"`: after each. `"evaluation"`: after evaluators ran. `"epoch"`: an epoch is
            complete. `"saved"`: a checkpoint was handed to the disk. `"end"`: the run is over. `"exception"`: it failed.
        step: steps taken, as counted by the state.
        epoch: epochs completed.
        samples: samples seen.
        tokens: tokens seen since the run began, where `fit(tokens=...)` counts them.
        clock: how far the run is, counted from its start.
        metrics: the step's metrics on the device (`"step"`), the results by full name as floats (`"evaluation"`), or the newest
            recorded value of each metric by full name (`"end"`).
        reason: why the run ends (`"end"`).
        path: the folder of checkpoints (`"saved"`); it may still be written to.
        error: what was raised (`"exception"`).
        evaluators: the names of the run's evaluators.

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
    tokens: int = 0
    path: str | None = None
    error: BaseException | None = None
    evaluators: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """What a hook may return instead of a state: the state, metrics to record, and a reason to stop.

    Metrics are numbers, 0-d tensors (they stay on the device until the next record; the last value counts) or metrics of
    `ftrain.metrics` (they are merged until then).

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
class On:
    """A hook, and the kinds and cadences at which it is called. Made by `on`."""

    when: tuple[str | Cadence, ...]
    hook: Any


@dataclass(frozen=True)
class When:
    """A hook, and a function of the event that says whether it is called. Made by `when`."""

    predicate: Callable[[Event], bool]
    hook: Any


@dataclass(frozen=True)
class Many:
    """Several hooks as one. Made by `compose`."""

    hooks: tuple[Any, ...]


def on(when: str | Cadence | tuple[str | Cadence, ...], hook: Any) -> Any:
    """Call a hook only at events of one kind, or only when a cadence fires; other steps cost nothing.

    Args:
        when: a kind of event, or e.g. `ft.every(steps=100)`, or a tuple of such: at any of them. Cadences are asked before the
            first step, after each step and at the end of each epoch.
        hook: a function `(state, event) -> state`, a `Hook`, or what `on`, `when`, `once`, `compose` gave.

    Raises:
        HookError: an unknown kind.

    >>> import ftrain as ft
    >>> hook = ft.on("epoch", lambda state, event: state)
    """
    several = when if isinstance(when, tuple) else (when,)
    if not several:
        raise HookError(
            explain("ft.on: at none of these events is the hook ever called.", expected=", ".join(KINDS), got="()")
        )
    for one in several:
        if isinstance(one, str) and one not in KINDS:
            raise HookError(explain(f"ft.on: there are no events of kind {one!r}.", expected=", ".join(KINDS)))
        if not isinstance(one, (str, Cadence)):
            raise HookError(
                explain("ft.on wants a kind of event or a cadence.", expected=", ".join(KINDS), got=repr(one))
            )
    return On(several, check_hook(hook, "ft.on"))


def when(predicate: Callable[[Event], bool], hook: Any) -> Any:
    """Call a hook only at events for which a function of the event says so.

    Args:
        predicate: `event -> bool`; called at every event that the hook would hear otherwise.
        hook: as for `on`.

    Raises:
        HookError: the predicate is no function, or gave no bool (when called).

    >>> import ftrain as ft
    >>> hook = ft.on("step", ft.when(lambda event: event.step in (10, 100, 1000), lambda state, event: state))
    """
    if not callable(predicate) or isinstance(predicate, (Cadence, Hook)):
        raise HookError(
            explain(
                "ft.when wants a function of the event.",
                expected="event -> bool",
                got=repr(predicate),
                fix="ft.on(ft.every(steps=10), hook)   # for cadences and kinds of events",
            )
        )
    return When(predicate, check_hook(hook, "ft.when"))


def once(at: str | Cadence | tuple[str | Cadence, ...], hook: Any, *, name: str | None = None) -> Any:
    """Call a hook at the first event of a kind, or when a cadence fires for the first time, and then never again.

    That it was called is remembered in the state, so also a run that is resumed calls it once.

    Args:
        at: as for `on`.
        hook: a function `(state, event) -> state`, or a `Hook`.
        name: of the memory in `state.extra`; default: `once_` and the name of the function.

    Raises:
        HookError: an unknown kind, or several hooks.

    >>> import ftrain as ft
    >>> hook = ft.once(ft.until(epochs=3), lambda state, event: state, name="warm")
    """
    check_hook(hook, "ft.once")
    if isinstance(hook, (On, When, Many)):
        raise HookError(
            explain(
                "ft.once wants a single hook.",
                expected="a function (state, event) -> state, or ft.Hook(name, init, update)",
                got=type(hook).__name__,
                fix="ft.once(when, hook)   # with the condition in the first place",
            )
        )
    inner = hook if isinstance(hook, Hook) else Hook(name_of(hook), _nothing, _plain(hook))

    def init(state: TrainState) -> dict[str, Any]:
        return {"done": torch.zeros((), dtype=torch.bool), "inner": inner.init(state)}

    def update(state: TrainState, memory: dict[str, Any], event: Event) -> Any:
        if memory["done"]:  # sync: none, this bool lies on the CPU
            return state, memory
        out = inner.update(state, memory["inner"], event)
        if not (isinstance(out, tuple) and not isinstance(out, Outcome) and len(out) == 2):
            return out  # refused by the caller
        return out[0], {"done": torch.ones_like(memory["done"]), "inner": out[1]}

    return on(at, Hook(name or "once_" + name_of(inner).strip("<>"), init, update))


def compose(*hooks: Any) -> Any:
    """Several hooks as one, called in this order.

    Raises:
        HookError: none, or something that is no hook.

    >>> import ftrain as ft
    >>> both = ft.compose(lambda state, event: state, ft.on("epoch", lambda state, event: state))
    >>> rare = ft.on(ft.every(steps=100), both)
    """
    if not hooks:
        raise HookError(explain("ft.compose wants at least one hook.", fix="ft.compose(first, second)"))
    for hook in hooks:
        check_hook(hook, "ft.compose")
    return Many(hooks)


def check_hook(hook: Any, what: str, where: str | None = None) -> Any:
    """Raise unless this is a hook."""
    if isinstance(hook, Hook):
        return _check_named(hook, what, where)
    if isinstance(hook, (On, When, Many)):
        return hook
    if callable(hook) and not isinstance(hook, type):
        return _check_call(hook, what, where)
    raise HookError(
        explain(
            f"{what} holds something that is no hook." if where else f"{what}: this is no hook.",
            where=where,
            expected="a function (state, event) -> state, or ft.Hook(name, init, update)",
            got=f"the class {hook.__name__}" if isinstance(hook, type) else type(hook).__name__,
        )
    )


def _check_named(hook: Hook, what: str, where: str | None) -> Hook:
    if (
        not isinstance(hook.name, str)
        or not hook.name
        or "/" in hook.name
        or not callable(hook.init)
        or not callable(hook.update)
    ):
        raise HookError(
            explain(
                f"{what}: this is no hook with memory.",
                where=where,
                expected='ft.Hook(name, init, update): a name without "/", and two functions',
                got=f"ft.Hook({hook.name!r}, {hook.init!r}, {hook.update!r})",
                fix='ft.Hook("counter", lambda state: {"n": torch.zeros(())}, update)',
            )
        )
    return hook


def _check_call(hook: Any, what: str, where: str | None) -> Any:
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # a function of C, say
        return hook
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise HookError(
            explain(
                f"{what}: {name} cannot be called with a state and an event: {error}.",
                where=where,
                expected="a function (state, event) -> state",
                got=f"{name}{signature}",
                cause="what makes a hook was passed, not the hook",
                fix=f"{getattr(hook, '__name__', 'make')}(...)   # called",
            )
        ) from None
    return hook


def name_of(hook: Any) -> str:
    """How messages call a hook.

    >>> import ftrain as ft
    >>> from ftrain.loops.events import name_of
    >>> name_of(ft.Hook("counter", dict, print))
    'counter'
    """
    return hook.name if isinstance(hook, Hook) else getattr(hook, "__name__", type(hook).__name__)


def _nothing(state: TrainState) -> dict[str, Any]:
    return {}


def _plain(hook: Callable[[TrainState, Event], Any]) -> Callable[[TrainState, Any, Event], Any]:
    def update(state: TrainState, memory: Any, event: Event) -> Any:
        return hook(state, event), memory

    return update
