"""What hooks that watch a metric have in common: its value, and what is said where it never appears or an argument makes no sense.

A name with a `/`, as in `"val/loss"`, is an evaluator's metric; one without is a metric of the step.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, HookError, HookWarning, LimitError, explain
from ...metrics import Mean, Metric
from ..cadences import Cadence
from ..events import Event

__all__ = [
    "check_choice",
    "check_evaluator",
    "check_every",
    "check_names",
    "check_numbers",
    "check_seen",
    "check_start",
    "named",
    "step_metric",
    "value_of",
    "weighed",
]


def named(hook: str, monitor: str, *before: str) -> str:
    """The hook as it was called, for messages; `before` are arguments that come first.

    >>> from ftrain.loops.hooks.monitors import named
    >>> named("plateau", "val/loss")
    "ft.hooks.plateau('val/loss')"
    """
    return f"ft.hooks.{hook}({', '.join([*before, repr(monitor)])})"


def value_of(found: Any, device: torch.device, who: str) -> Tensor:
    """The metric as float64 (), without a look at it.

    Raises:
        HookError: it is not a number.

    >>> import torch
    >>> from ftrain.loops.hooks.monitors import value_of
    >>> value_of(0.5, torch.device("cpu"), "ft.hooks.plateau('val/loss')")
    tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(found, Metric):
        found = found.compute()
    if isinstance(found, Tensor) and found.ndim == 0:
        return found.to(device, torch.float64)
    if isinstance(found, (int, float)):
        return torch.full((), float(found), dtype=torch.float64, device=device)
    raise HookError(
        explain(
            f"{who}: the metric is not a number.",
            expected="a number",
            got=type(found).__name__,
            cause="a metric of type Collect gives all values",
            fix="monitor a mean of it",
        )
    )


def step_metric(hook: str, monitor: str, event: Event, who: str) -> Any:
    """The metric of a step, as the step gave it; a step gives the same names each time.

    Raises:
        HookError: it gives no such metric.
    """
    found = event.metrics.get(monitor)
    if found is None:
        given = list(event.metrics)
        raise HookError(
            explain(
                f"{who}: the step gives no such metric.",
                where=f"step {event.step}",
                expected=" or ".join(map(repr, given)) or "a step with metrics",
                got=repr(monitor),
                fix=f"monitor={_close(monitor, given)!r}"
                if given
                else 'return state, {"loss": loss}   # from the step',
            )
        )
    return found


def weighed(found: Any, device: torch.device, who: str) -> tuple[Tensor, Tensor]:
    """The metric of a step as a total and a weight, float64 (): those of a mean; any other counts once.

    >>> import torch
    >>> from ftrain.loops.hooks.monitors import weighed
    >>> weighed(0.5, torch.device("cpu"), "ft.hooks.plateau('loss')")
    (tensor(0.5000, dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    value = value_of(found, device, who)
    if not isinstance(found, Mean):
        return value, torch.ones_like(value)
    weight = value_of(found.weight, device, who)
    total = value_of(found.total, device, who) if type(found) is Mean else value * weight
    return torch.where(weight > 0, total, 0.0), weight


def check_start(hook: str, monitor: str, event: Event, who: str) -> None:
    """Raise before the first step where the run has no evaluator of this name."""
    evaluator = monitor.partition("/")[0]
    if event.kind == "start" and evaluator not in event.evaluators:
        known = list(event.evaluators)
        raise HookError(
            explain(
                f"{who}: the run has no evaluator {evaluator!r}.",
                expected=" or ".join(f"{one + '/...'!r}" for one in known)
                if known
                else "an evaluator, whose metrics it can watch",
                got=repr(monitor),
                fix=named(hook, f"{_close(evaluator, known)}/{monitor.partition('/')[2]}")
                if known
                else f"ft.fit(..., evals={{{evaluator!r}: ft.Evaluator(ft.eval_step(model, metric_fn), data)}}, hooks=[{who}])",
            )
        )


def check_evaluator(hook: str, monitor: str, event: Event, who: str) -> None:
    """Raise at an evaluation by the evaluator that lacks the metric: what it does not give at first it never will."""
    evaluator = monitor.partition("/")[0] + "/"
    given = [name for name in event.metrics if name.startswith(evaluator)]
    if event.kind == "evaluation" and given:
        raise HookError(
            explain(
                f"{who}: the evaluator {evaluator[:-1]!r} gives no such metric.",
                where=f"the evaluation after step {event.step}",
                expected=" or ".join(map(repr, given)),
                got=repr(monitor),
                fix=named(hook, _close(monitor, given)),
            )
        )


def check_seen(hook: str, monitor: str, seen: Callable[[], bool], event: Event, who: str) -> None:
    """Warn at the end of a run in which the metric of an evaluator never appeared; `seen` is asked only if it matters.

    No error: the run is over, and its result is worth something.
    """
    # A run that was cut short in its first epoch, before any evaluation, is not the hook's mistake.
    evaluated = [name for name in event.metrics if "/" in name]
    if not (evaluated or event.clock.epochs) or seen():
        return
    warnings.warn(
        explain(
            f"{who}: the metric never appeared, so the hook did nothing.",
            expected=" or ".join(map(repr, evaluated)) if evaluated else "an evaluation in the course of the run",
            got=repr(monitor),
            cause=None
            if evaluated
            else f"the evaluator {monitor.partition('/')[0]!r} never ran: its cadence did not fire",
            fix=named(hook, _close(monitor, evaluated)) if evaluated else "ft.Evaluator(..., every=ft.every(epochs=1))",
        ),
        HookWarning,
        stacklevel=2,
    )


def check_names(hook: str, **names: object) -> None:
    """Raise unless all of these are names."""
    for key, name in names.items():
        if not isinstance(name, str) or not name:
            raise ArgumentError(
                explain(
                    f"ft.hooks.{hook}: {key}= is a name.",
                    expected="a str",
                    got=repr(name),
                    fix=f'ft.hooks.{hook}("val/loss")' if hook != "spike_guard" else f'{key}="loss"',
                )
            )


def check_choice(hook: str, key: str, given: object, *allowed: str) -> None:
    """Raise unless this is one of the words that are allowed."""
    if given not in allowed:
        raise LimitError(
            explain(
                f"ft.hooks.{hook}: {key}={given!r} is unknown.",
                expected=" or ".join(map(repr, allowed)),
                got=repr(given),
                fix=f"{key}={allowed[0]!r}",
            )
        )


def check_numbers(hook: str, *, whole: bool = True, least: int = 0, **numbers: Any) -> None:
    """Raise unless these are numbers, not below `least`; integers, where `whole`."""
    for key, number in numbers.items():
        kinds = (int,) if whole else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds) or not number >= least:
            expected = f"{'an integer' if whole else 'a number'} >= {least}"
            usable = isinstance(number, (int, float)) and math.isfinite(number)
            raise LimitError(
                explain(
                    f"ft.hooks.{hook}: {key}={number!r} makes no sense.",
                    expected=expected,
                    got=repr(number),
                    fix=f"{key}={max(abs(int(number)), least) if usable else 1}",
                )
            )


def check_every(hook: str, every: object) -> None:
    """Raise unless this is a cadence, or None."""
    if every is not None and not isinstance(every, Cadence):
        raise LimitError(
            explain(
                f"ft.hooks.{hook}: every= is no cadence.",
                expected="ft.every(...)",
                got=repr(every),
                fix="every=ft.every(steps=50)",
            )
        )


def _close(monitor: str, names: list[str]) -> str:
    return difflib.get_close_matches(monitor, names, n=1, cutoff=0.0)[0]
