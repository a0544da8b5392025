"""What is wrong with the arguments of `evaluate_checkpoints`, said before any checkpoint is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from .. import tree
from ..errors import ArgumentError, LimitError, explain
from ..loops import Cadence, Evaluator, every

__all__ = ["check_evals", "check_following", "check_sinks", "check_steps"]

WHAT = "ft.evaluate_checkpoints"
POLL = 5.0


def _refuse(name: str, value: object, expected: str, fix: str) -> ArgumentError:
    got = repr(value) if isinstance(value, (str, int, float, list, tuple)) else tree.describe(value)
    return ArgumentError(explain(f"{WHAT}: {name}= makes no sense.", expected=expected, got=got, fix=fix))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_steps(steps: object, after: object, by: object, mode: str, *, follow: bool) -> None:
    """Raise where the arguments that say which checkpoints are meant make no sense."""
    named = isinstance(steps, (list, tuple, range)) and len(steps) > 0 and all(map(_whole, steps))
    if not named and not (isinstance(steps, str) and steps in ("all", "latest", "best")):
        raise _refuse("steps", steps, '"all", "latest", "best", or a list of steps', "steps=[1000, 2000]")
    if after is not None and not _whole(after):
        raise _refuse("after", after, "a step, or None", "after=1000")
    if steps != "best" and (by is not None or mode != "min"):
        raise ArgumentError(
            explain(f'{WHAT}: by= and mode= go with steps="best".', got=f"steps={steps!r}, by={by!r}, mode={mode!r}")
        )
    if steps == "best" and follow:
        raise ArgumentError(
            explain(
                f'{WHAT}: which one is the best is known at the end, so steps="best" does not follow.',
                fix='steps="latest", follow=True',
            )
        )


def check_following(follow: object, until: object, timeout: object, poll: object) -> None:
    """Raise where the arguments that say when it ends make no sense."""
    if not isinstance(follow, bool):
        raise _refuse("follow", follow, "True or False", "follow=True")
    if until is not None and not isinstance(until, Cadence):
        raise _refuse("until", until, "ft.until(...), the run's own limit", "until=ft.until(steps=1000)")
    for name, value in (("timeout", timeout), ("poll", poll)):
        if value is None and name == "timeout":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise LimitError(explain(f"{WHAT}: {name}={value!r} makes no sense.", expected="seconds, more than 0"))
    asked = {"until": until is not None, "timeout": timeout is not None, "poll": poll != POLL}
    given = [name for name, one in asked.items() if one]
    if given and not follow:
        raise ArgumentError(
            explain(
                f"{WHAT}: {given[0]}= goes with follow=True.", got="follow=False", fix=f"follow=True, {given[0]}=..."
            )
        )


def check_sinks(sinks: object) -> None:
    """Raise where the arguments that stand for sinks make no sense."""
    if not isinstance(sinks, Sequence) or not all(callable(sink) for sink in sinks):
        raise _refuse("sinks", sinks, "a list of functions of a record", "sinks=[print]")


def check_evals(evals: Mapping[str, Evaluator]) -> dict[str, Evaluator]:
    """The evaluators, without what `fit` alone looks at; raises where they are something else."""
    if not isinstance(evals, Mapping) or not evals or not all(isinstance(one, Evaluator) for one in evals.values()):
        mapping = isinstance(evals, Mapping)
        got = {name: type(one).__name__ for name, one in evals.items()} if mapping else tree.describe(evals)
        raise _refuse("evals", str(got), "a dict of evaluators by name", 'evals={"val": ft.Evaluator(step, data)}')
    return {name: dataclasses.replace(one, every=every(epochs=1), sanity=0) for name, one in evals.items()}
