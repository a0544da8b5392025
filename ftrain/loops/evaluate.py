"""Evaluation and prediction: they read a state, and cannot disturb training.

Laws
----
- The result is that of all batches merged; the last, short one counts as much as it has samples.
- Batch i is evaluated under a key of its own, a function of (seed, step, i); the global generators stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from .. import rng
from ..data import Epochs, Feed
from ..data.window import ungrouped
from ..errors import DataError, LimitError, MetricError, StateError, explain
from ..metrics import normalise
from ..state import TrainState, check_state
from ..steps.average import averaged
from ..steps.compile import CompiledStep
from ..steps.compile import compile as compile_step
from .cadences import Cadence
from .meter import Meter
from .signals import Signals
from .units import every

__all__ = ["Evaluator", "Prepared", "check_count", "evaluate", "predict", "prepare", "with_params"]

Compile = bool | Literal["auto"] | str

# Compiled forms are kept with the step, so that a second fit (another fold, another learning rate) does not compile again.
_KEPT = "_ftrain_compiled"


def prepare(
    step: Callable[..., Any],
    compile: Compile,
    *,
    donate: bool,
    backend: str | Callable[..., Any] = "inductor",
    what: str = "ft.fit",
) -> CompiledStep:
    """The compiled form of a step, made once for each step and way of compiling.

    Args:
        step: a step; one that is compiled already is taken as it is.
        compile: `"auto"`: the highest rung that works; True: the whole step, or an error; False: eager.
        donate: whether the input's memory is reused.
        backend: a backend of `torch.compile`.
        what: how errors call the caller.
    """
    if isinstance(step, CompiledStep):
        return step
    if not (isinstance(compile, bool) or compile == "auto"):
        raise LimitError(explain(f"compile={compile!r} makes no sense.", expected='"auto", True or False'))
    check_step_fn(step, what)
    rung: Any = "auto" if compile == "auto" else ("step" if compile else "eager")
    kept: dict[Any, CompiledStep] = getattr(step, "__dict__", {}).setdefault(_KEPT, {})
    key = (rung, donate, backend)
    # Compared, since the dict may be another's: methods of one class share it, and functools.wraps copies it.
    if key not in kept or kept[key].step != step:
        kept[key] = compile_step(step, donate=donate, rung=rung, backend=backend)
    return kept[key]


def check_step_fn(step: object, what: str) -> None:
    """Raise unless something can be called as a step."""
    if isinstance(step, torch.nn.Module):
        raise StateError(
            explain(
                f"{what}: a module stands where a step is needed.",
                expected="(state, batch) -> ...",
                got=type(step).__name__,
                fix="ft.train_step(model, loss_fn, tx), ft.eval_step(model, metric_fn) or ft.predict_step(model)",
            )
        )
    if not callable(step):
        raise StateError(
            explain(f"{what}: this is no step.", expected="a function (state, batch) -> ...", got=type(step).__name__)
        )


@dataclass(frozen=True)
class Evaluator:
    """An evaluation that `fit` runs at its own cadence; its name is its key in `evals=`.

    Attributes:
        step: `(state, batch) -> metrics`, e.g. `ft.eval_step(model, metric_fn)`.
        data: as for `fit`; iterated once for each evaluation, in its own order.
        every: when; default: after each epoch. `ft.every(steps=500) | ft.at(0)` also evaluates before the first step.
        batch_size: for arrays: samples in a batch.
        params: the name of averaged parameters to evaluate (`"ema"`, see `ft.with_ema`); default: those that the step takes.
        limit: how many batches at most; default: all.
        sanity: so many batches are evaluated before the first step of a run, their results are dropped: what is wrong with the
            evaluation is then known before the first epoch is spent.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> step = ft.eval_step(model, lambda model, batch: {"mean": model(batch).mean()})
    >>> ft.Evaluator(step, [torch.ones(4, 2)], every=ft.every(epochs=1)).every
    every(epochs=1)
    """

    step: Callable[[TrainState, Any], Any]
    data: Any
    every: Cadence = field(default_factory=lambda: every(epochs=1))
    batch_size: int | None = None
    params: str | None = None
    limit: int | None = None
    sanity: int = 0


class Prepared(NamedTuple):
    """An evaluator that is ready to run: a compiled step, data of a known kind, and what else it was told."""

    step: CompiledStep
    source: Epochs
    every: Cadence
    params: str | None = None
    limit: int | None = None
    sanity: int = 0


def evaluate(
    state: TrainState,
    eval_step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    batch_size: int | None = None,
    params: str | None = None,
    limit: int | None = None,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
) -> dict[str, Any]:
    """Evaluate a state on data.

    Args:
        state: only read.
        eval_step: `(state, batch) -> metrics`, e.g. `ft.eval_step(model, metric_fn)`.
        data: an iterable of batches, a DataLoader, a function `epoch -> iterable`, or arrays with `batch_size=`.
        batch_size: for arrays: samples in a batch.
        params: the name of averaged parameters to use (`"ema"`); default: those that the step takes.
        limit: how many batches at most; default: all.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.

    Returns:
        The metrics by name, as floats (a tensor for `Collect`).

    Raises:
        DataError: the data has no batches.
        StateError: the state has no such average.
        LimitError: a limit that is no positive integer.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> step = ft.eval_step(model, lambda model, batch: {"size": batch.sum(dim=1).mean()})
    >>> ft.evaluate(ft.init(model, ft.optim.sgd(0.1)), step, torch.ones(10, 2) * 0.5, batch_size=4, compile=False)
    {'size': 1.0}
    """
    check_state(state, "ft.evaluate")
    check_count("ft.evaluate", "limit", limit)
    state = with_params(state, eval_step, params, "ft.evaluate")
    source = ungrouped(data, seed=state.counters().seed, batch_size=batch_size, what="ft.evaluate")
    source.check("ft.evaluate")
    check_end("ft.evaluate", source, limit)
    try:
        step = prepare(eval_step, compile, donate=False, backend=backend, what="ft.evaluate")
        return run(state, step, source, limit=limit)
    finally:
        source.close()


_END: Any = object()


class Stopped(Exception):
    """A signal asks the run to end: the evaluation that is running is left."""


def run(
    state: TrainState,
    step: CompiledStep,
    source: Epochs,
    name: str = "ft.evaluate",
    *,
    signals: Signals | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate over one pass of prepared data; raises `Stopped` where a signal comes in between."""
    meter = Meter()
    counters = state.counters()
    # Whatever a metric draws from numpy or random is a function of the state too, and disturbs nobody else's stream.
    with rng.Isolated(rng.fold_in_host(counters.seed, counters.step, 0xE7A1)):
        for out in _outputs(state, step, source, name, limit):
            if signals is not None and signals.reason is not None:
                raise Stopped
            if isinstance(out, tuple):
                raise MetricError(
                    explain(
                        f"{name}: the step returned a tuple, not metrics.",
                        fix="ft.eval_step(model, metric_fn), not a train step",
                    )
                )
            meter.add(normalise(out, None, "the metrics that the evaluation step returned"))
        return meter.fetch()


def predict(
    state: TrainState,
    predict_step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    batch_size: int | None = None,
    params: str | None = None,
    limit: int | None = None,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
) -> Iterator[Any]:
    """Predict batch after batch, in the order of the data.

    Args:
        state: only read.
        predict_step: `(state, batch) -> outputs`, e.g. `ft.predict_step(model)`.
        data: an iterable of batches, a DataLoader, a function `epoch -> iterable`, or arrays with `batch_size=`.
        batch_size: for arrays: samples in a batch.
        params: the name of averaged parameters to use (`"ema"`); default: those that the step takes.
        limit: how many batches at most; default: all.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.

    Returns:
        A generator of outputs, on the state's device.

    Raises:
        DataError: the data has no batches.
        StateError: the state has no such average.
        LimitError: a limit that is no positive integer.

    >>> import torch, ftrain as ft
    >>> model = torch.nn.Linear(2, 1)
    >>> state = ft.init(model, ft.optim.sgd(0.1))
    >>> outputs = ft.predict(state, ft.predict_step(model), torch.ones(5, 2), batch_size=2, compile=False)
    >>> torch.cat(list(outputs)).shape
    torch.Size([5, 1])
    """
    check_state(state, "ft.predict")
    check_count("ft.predict", "limit", limit)
    state = with_params(state, predict_step, params, "ft.predict")
    source = ungrouped(data, seed=state.counters().seed, batch_size=batch_size, what="ft.predict")
    source.check("ft.predict")
    step = prepare(predict_step, compile, donate=False, backend=backend, what="ft.predict")

    def outputs() -> Iterator[Any]:
        found = _outputs(state, step, source, "ft.predict", limit)
        counters = state.counters()
        # Entered for each batch, not for the whole: in between it is the user's code that runs.
        streams = rng.Isolated(rng.fold_in_host(counters.seed, counters.step, 0xE7A1))
        try:
            while True:
                with streams:
                    out = next(found, _END)
                if out is _END:
                    return
                yield out
        finally:
            found.close()
            source.close()

    return outputs()


def _outputs(
    state: TrainState, step: CompiledStep, source: Epochs, name: str, limit: int | None = None
) -> Generator[Any, None, None]:
    counters = state.counters()
    count = 0
    feed = Feed(source(0), state.device, source.finish, 0)
    try:
        for count, batch in enumerate(feed, start=1):
            seed = rng.fold_in_host(counters.seed, 0xE7A1, count)
            own = state.replace(seed=torch.tensor(seed, dtype=torch.int64, device=state.device))
            own.__dict__["_host"] = counters._replace(seed=seed)
            yield step(own, batch)
            if count == limit:
                break
    finally:
        feed.close()
    if count == 0:
        raise DataError(explain(f"{name}: the data has no batches.", expected="at least one batch"))


def with_params(state: TrainState, step: Any, name: str | None, what: str) -> TrainState:
    """The state as an evaluation sees it: with averaged parameters and buffers in the place of its own.

    Raises:
        StateError: the state has no such average, or the step takes one already.
    """
    if name is None:
        return state
    inner = step.step if isinstance(step, CompiledStep) else step
    own = getattr(inner, "params", None)
    if isinstance(own, str):
        raise StateError(
            explain(
                f"{what}: params={name!r}, and the step takes {own!r} already.",
                expected="one of the two",
                fix="ft.eval_step(model, metric_fn)   # without params=",
            )
        )
    params, buffers = averaged(state, name, what)
    return state.replace(params=params, buffers={**state.buffers, **buffers})


def check_end(what: str, source: Epochs, limit: int | None) -> None:
    """Raise where an evaluation would never come to an end."""
    if source.endless and limit is None:
        raise DataError(
            explain(
                f"{what}: the data is endless, so the evaluation would be, too.",
                expected="data with an end, or a limit",
                fix="limit=100   # in batches; or source.take(n)",
            )
        )


def check_count(what: str, name: str, n: object, least: int = 1) -> None:
    """Raise unless this is None or a count."""
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < least):
        raise LimitError(
            explain(
                f"{what}: {name}={n!r} makes no sense.",
                expected=f"an integer >= {least}, in batches",
                got=repr(n),
                fix=f"{name}={max(least, 1)}",
            )
        )
