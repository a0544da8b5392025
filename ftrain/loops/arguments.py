"""What is wrong with the arguments of `fit`, said before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import tree
from ..data.window import ungrouped
from ..errors import DataError, LimitError, explain
from ..state import TrainState
from ..steps.evaluate import EvalStep, ReadStep
from ..steps.train import Stepped
from .cadences import Cadence
from .evaluate import Compile, Evaluator, Prepared, check_count, check_end, prepare, with_params
from .events import Hook

__all__ = ["check_arguments", "check_averages", "check_evaluators"]


def check_arguments(
    evals: object,
    hooks: object,
    sinks: object,
    log: object,
    progress: object,
    *,
    checkpoint: object = None,
    resume: object = None,
    snapshot: object = None,
    tokens: object = None,
) -> None:
    """Raise where an argument of `fit` is another kind of thing than it must be."""

    def refuse(name: str, value: object, expected: str, fix: str) -> None:
        raise LimitError(
            explain(f"ft.fit: {name}= makes no sense.", expected=expected, got=tree.describe(value), fix=fix)
        )

    if evals is not None and not isinstance(evals, Mapping):
        refuse("evals", evals, "a dict of evaluators by name", 'evals={"val": ft.Evaluator(step, data)}')
    if not isinstance(hooks, Sequence) or isinstance(hooks, Hook):  # which is a tuple
        refuse("hooks", hooks, "a list of hooks", "hooks=[hook]")
    if not isinstance(sinks, Sequence) or not all(callable(sink) for sink in sinks):
        refuse("sinks", sinks, "a list of functions of a record", "sinks=[print]")
    if log is not None and not isinstance(log, Cadence):
        refuse("log", log, "ft.every(...)", "log=ft.every(steps=10)")
    if not isinstance(progress, bool) and not all(hasattr(progress, name) for name in ("refresh", "record", "close")):
        refuse("progress", progress, "True, False, or what ft.sinks.console gives", "progress=False")
    if checkpoint is not None and not hasattr(checkpoint, "open"):
        refuse("checkpoint", checkpoint, "where and when to save", 'checkpoint=ft.Checkpoints("run/ckpt")')
    if snapshot is not None and not isinstance(snapshot, Cadence):
        refuse("snapshot", snapshot, "ft.every(...)", "snapshot=ft.every(steps=100)")
    if tokens is not None and not callable(tokens):
        refuse("tokens", tokens, "a function batch -> int", 'tokens=lambda batch: batch["tokens"].numel()')
    if resume is not None and checkpoint is None:
        refuse(
            "resume", resume, "None, as there is no checkpoint=", 'checkpoint=ft.Checkpoints("run/ckpt"), resume="auto"'
        )


def check_evaluators(
    evals: Mapping[str, Evaluator],
    seed: int,
    compile: Compile,
    backend: str | Callable[..., Any],
    *,
    length: int | None = None,
    tokens: bool = False,
) -> dict[str, Prepared]:
    """The evaluators, ready to run, by name; raises where one cannot."""
    found: dict[str, Prepared] = {}
    for name, one in evals.items():
        if not isinstance(one, Evaluator):
            raise DataError(
                explain(
                    f"ft.fit: evals[{name!r}] is no evaluator.",
                    expected="ft.Evaluator(step, data)",
                    got=type(one).__name__,
                    fix=f"evals={{{name!r}: ft.Evaluator(ft.eval_step(model, metric_fn), val_data)}}",
                )
            )
        if not isinstance(name, str) or not name or name == "train" or "/" in name:
            raise DataError(
                explain(
                    f"ft.fit: an evaluator cannot be called {name!r}.",
                    expected='a name without "/", not "train"',
                    got=repr(name),
                    fix='evals={"val": ft.Evaluator(...)}',
                )
            )
        if not isinstance(one.every, Cadence):
            raise DataError(
                explain(
                    f"ft.fit: evals[{name!r}].every is no cadence.",
                    expected="ft.every(epochs=1)",
                    got=repr(one.every),
                    fix="ft.Evaluator(..., every=ft.every(epochs=1))",
                )
            )
        what = f"the evaluator {name!r}"
        check_count(what, "limit", one.limit)
        check_count(what, "sanity", one.sanity, 0)
        source = ungrouped(one.data, seed=seed, batch_size=one.batch_size, what=what)
        source.check(what)
        check_end(what, source, one.limit)
        if source.once:
            raise DataError(
                explain(
                    f"ft.fit: the data of the evaluator {name!r} is an iterator, which is at its end after one evaluation.",
                    expected="a list, a DataLoader, or a function epoch -> iterable",
                )
            )
        step = prepare(one.step, compile, donate=False, backend=backend, what=what)
        trains = isinstance(step.step, Stepped)
        if trains or (isinstance(step.step, ReadStep) and not isinstance(step.step, EvalStep)):
            raise DataError(
                explain(
                    f"{what}: its step is one that {'trains' if trains else 'predicts'}.",
                    expected="(state, batch) -> metrics",
                    got=repr(step.step),
                    fix=f"evals={{{name!r}: ft.Evaluator(ft.eval_step(model, metric_fn), data)}}",
                )
            )
        cadence = one.every.bound(length, tokens, what)
        found[name] = Prepared(step, source, cadence, one.params, one.limit, one.sanity)
    return found


def check_averages(evaluators: Mapping[str, Prepared], state: TrainState) -> None:
    """Raise where an evaluator wants averaged parameters that the state does not have."""
    for name, one in evaluators.items():
        with_params(state, one.step, one.params, f"the evaluator {name!r}")
