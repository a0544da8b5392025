"""`fit`: a consumer of the loop that evaluates, records, shows progress, and stops. You could have written it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import rng, tree
from ..data import Epochs, as_epochs
from ..data.window import ungrouped
from ..errors import DataError, LimitError, LossError, explain
from ..sinks import History, Progress, Record, console
from ..state import TrainState, check_state
from ..steps.train import Stepped
from .evaluate import Compile, Evaluator, prepare, run
from .events import Event, Hook, Hooks
from .limits import Limits
from .loop import Tick, loop, ready
from .meter import Meter
from .units import Cadence, Clock, every

__all__ = ["Result", "fit"]


@dataclass(frozen=True)
class Result:
    """What `fit` gives back.

    Attributes:
        state: the last state; yours to keep.
        history: the records.
        reason: why it ended: `"epochs"`, `"steps"`, `"until"`, `"data"` (an iterator at its end), or a hook's words.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> result = ft.fit(ft.init(model, tx), step, [torch.ones(4, 1)] * 3, progress=False, compile=False)
    >>> result.reason, len(result.history), result.state.counters().samples
    ('epochs', 1, 12)
    """

    state: TrainState
    history: History
    reason: str

    def __repr__(self) -> str:
        return f"Result(reason={self.reason!r}, {self.history!r})"


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    until: Cadence | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    evals: Mapping[str, Evaluator] | None = None,
    hooks: Sequence[Any] = (),
    sinks: Sequence[Callable[[Record], None]] = (),
    log: Cadence | None = None,
    progress: bool | Progress = True,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
    donate: bool = False,
) -> Result:
    """Train: apply `step` to batch after batch, evaluate, record, and give back the last state with its history.

    At each step, in this order: step, hooks, evaluation, hooks, record, sinks. Nothing is read from the device between two log
    points, and no file is written. The same state, step and data give the same result, whatever ran before.

    Args:
        state: where to begin. It stays valid: `fit` works on one copy (none with `donate=True`).
        step: `(state, batch) -> (state, metrics)`, e.g. `ft.train_step(model, loss_fn, tx)`; one from `ft.compile` is taken as it is.
        data: a list of batches, a DataLoader or other iterable, a function `epoch -> iterable`, or, with `batch_size=`, a tuple or
            dict of arrays of equal length. Batches are any tree of tensors and arrays, and are moved to the state's device.
        epochs: how many epochs to run from here. With none of `epochs`, `steps`, `until`: one.
        steps: how many steps to run from here.
        until: stop when this fires, e.g. `ft.until(seconds=3600)`.
        batch_size: for arrays: samples in a batch.
        shuffle: for arrays: a new order in each epoch, a function of the state's seed and the epoch.
        evals: evaluators by name; their results are recorded under `name/metric`.
        hooks: pure functions `(state, event) -> state` (see `ft.Event`, `ft.Outcome`, `ft.Hook`, `ft.on`).
        sinks: functions of a `Record`, called at each record; one with a `close(status)` is closed at the end.
        log: when to record training metrics, as a mean over the steps since the record before; default: every 50 steps. Also at
            the end of each epoch and of the run.
        progress: a line on the console; False for none.
        compile: `"auto"` takes the highest rung that works (see `ft.compile`); True the whole step or an error; False eager.
        backend: a backend of `torch.compile`.
        donate: let the first step take the memory of `state`, which is then gone.

    Returns:
        `Result(state, history, reason)`.

    Raises:
        StateError, LimitError, DataError, LossError, BatchError, MetricError, HookError: bad input, before any harm is done.
        Whatever the user's code raises comes through, with the step, epoch and batch added as a note.

    >>> import torch, ftrain as ft
    >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.adam(0.1)
    >>> def loss_fn(model, batch):
    ...     return (model(batch["x"]) - batch["y"]).square().mean()
    >>> state = ft.init(model, tx, seed=0)
    >>> step = ft.train_step(model, loss_fn, tx)
    >>> result = ft.fit(state, step, {"x": x, "y": 3 * x}, batch_size=16, epochs=30, progress=False, compile=False)
    >>> result.reason, result.state.counters().step, float(result.history["loss"][-1]) < 1e-2
    ('epochs', 120, True)
    """
    check_state(state, "ft.fit")
    _check_arguments(evals, hooks, sinks, log, progress)
    seed = state.counters().seed
    source = as_epochs(data, seed=seed, batch_size=batch_size, shuffle=shuffle, what="ft.fit")
    source.check("ft.fit")
    limits = Limits.of(epochs, steps, until, source, "ft.fit")
    called = Hooks(hooks)
    evaluators = _evaluators(evals or {}, seed, compile, backend)
    compiled = prepare(step, compile, donate=True, backend=backend)
    called.check_names(compiled.step.names() if isinstance(compiled.step, Stepped) else set())
    state = ready(state, compiled, data, source)
    state = called.init(state if donate else state.copy())
    shown = _progress(progress, state, limits, source)
    session = _Session(log or every(steps=50), evaluators, called, sinks, shown)
    session.donated = donate
    status = "error"
    try:
        # What hooks, sinks and careless steps draw from numpy or random is a function of the state, and does not outlive the call.
        with rng.Isolated(rng.fold_in_host(seed, state.counters().step, 0xF17)):
            state, status = session.drive(state, compiled, source, limits)
        return Result(state, History(session.records), status)
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        session.note(error)
        raise
    finally:
        session.close(status)


class _Session:
    """What `fit` keeps while it runs: the records so far, and when the next thing is due."""

    def __init__(
        self,
        log: Cadence,
        evaluators: dict[str, tuple[Any, Epochs, Cadence]],
        hooks: Hooks,
        sinks: Sequence[Callable[[Record], None]],
        progress: Progress | None,
    ) -> None:
        self.log, self.evaluators, self.hooks, self.sinks, self.progress = log, evaluators, hooks, sinks, progress
        self.records: list[Record] = []
        self.meter = Meter()
        self.extra: dict[str, Any] = {}  # metrics from hooks, for the next record
        self.began = time.perf_counter()
        self.asked = Clock()  # when the cadences were last asked
        self.due = 0.0  # the first step at which one of them may fire
        self.tick: Tick | None = None
        self.start = (0, 0)  # the state's counts of steps and samples when the run began
        self.length: int | None = None  # batches in an epoch
        self.done = 0  # epochs completed in this run
        self.unchecked = True
        self.donated = False

    def drive(
        self, state: TrainState, step: Callable[..., Any], source: Epochs, limits: Limits
    ) -> tuple[TrainState, str]:
        """Consume the loop; gives the last state and why it ended."""
        begin = state.counters()
        self.start = (begin.step, begin.samples)
        self.length = source.length
        state, stop = self.attend(Tick(state, {}, begin.step, begin.epoch, begin.samples, -1), "start", None)
        if stop is not None:
            return state, stop
        ticks = loop(state, step, source, epochs=limits.epochs, steps=limits.steps, until=limits.until, epoch_ends=True)
        add, hooks, show = self.meter.add, bool(self.hooks), self.progress
        refresh = math.inf if show is None else self.began
        reason: str | None = None
        while True:
            try:
                tick = next(ticks)
            except StopIteration as ended:
                reason = ended.value
                break
            state = tick.state
            self.tick = tick
            if not tick.end:
                add(tick.metrics)
                if self.unchecked:
                    self.first_loss(tick)
            if hooks or tick.end or tick.step - begin.step >= self.due:
                new, stop = self.attend(tick, "epoch" if tick.end else "step", self.asked)
                if new is not state:
                    state = ticks.send(new).state
                if stop is not None:
                    reason = stop
                    ticks.close()
                    break
            if show is not None and time.perf_counter() >= refresh:
                now = time.perf_counter()
                show.refresh(tick.step, self.epochs(tick), tick.samples, now - self.began)
                refresh = now + show.interval
        assert self.tick is not None, "a loop gives a tick or raises"
        assert reason is not None, "a loop says why it ended"
        last = History(self.records).last()
        outcome = self.hooks(state, self.event("end", self.tick, self.clock(self.tick), metrics=last, reason=reason))
        self.extra |= outcome.metrics or {}
        self.record(self.tick)
        return outcome.state, reason

    def attend(self, tick: Tick, kind: str, before: Clock | None) -> tuple[TrainState, str | None]:
        """What is due at this point: hooks, evaluation, hooks, record. Gives the state and a reason to stop."""
        now = self.clock(tick)
        state, stop = tick.state, None
        if self.hooks and self.hooks.listens(kind, now):
            state, stop = self.happens(state, self.event(kind, tick, now, metrics=tick.metrics))
        if kind != "epoch":
            self.hooks.passed(now)
        due = [(name, *rest) for name, (*rest, cadence) in self.evaluators.items() if cadence.fires(before, now)]
        if due and self.progress is not None and before is not None:
            self.progress.refresh(tick.step, self.epochs(tick), tick.samples, now.seconds)
        results: list[Record] = []
        for name, step, source in due:
            metrics = run(state, step, source, f"the evaluator {name!r}")
            results.append(Record(tick.step, self.epochs(tick), tick.samples, self.seconds(), name, metrics))
        if results and self.hooks.listens("evaluation", now):
            named = {name: value for record in results for name, value in record.named().items()}
            state, why = self.happens(state, self.event("evaluation", tick, now, metrics=named))
            stop = stop or why
        last = (
            kind == "step" and tick.batch + 1 == self.length
        )  # its record is made at the end of the epoch, which comes next
        if before is not None and not last and (tick.end or self.log.fires(before, now)):
            self.record(tick)
        for record in results:
            self.emit(record)
        cadences = [self.log, *(cadence for _, _, cadence in self.evaluators.values())]
        self.due = min(cadence.next_step(now) for cadence in cadences)
        self.asked = now
        return state, stop

    def happens(self, state: TrainState, event: Event) -> tuple[TrainState, str | None]:
        outcome = self.hooks(state, event)
        self.extra |= outcome.metrics or {}
        return outcome.state, outcome.stop

    def event(
        self, kind: str, tick: Tick, now: Clock, *, metrics: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> Event:
        return Event(kind, tick.step, self.epochs(tick), tick.samples, now, metrics or {}, reason)

    def clock(self, tick: Tick) -> Clock:
        if tick.end:
            self.done += 1
        return Clock(tick.step - self.start[0], self.done, tick.samples - self.start[1], self.seconds())

    def epochs(self, tick: Tick) -> int:
        return tick.epoch + 1 if tick.end else tick.epoch

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def record(self, tick: Tick) -> None:
        """Bring the metrics since the last record to the host, and hand them on."""
        if not self.meter and not self.extra:
            return
        metrics = {**self.meter.fetch(), **self.extra}
        self.extra = {}
        self.emit(Record(tick.step, self.epochs(tick), tick.samples, self.seconds(), "train", metrics))

    def emit(self, record: Record) -> None:
        self.records.append(record)
        if self.progress is not None:
            self.progress.record(record)
        for sink in self.sinks:
            sink(record)

    def first_loss(self, tick: Tick) -> None:
        """The one look at a value before the first log point: a run that begins with NaN is wrong from the start."""
        self.unchecked = False
        loss = tick.metrics.get("loss")
        value = None if loss is None else float(loss.compute())  # sync: once in a run
        if value is not None and not math.isfinite(value):
            raise LossError(
                explain(
                    f"the loss is {value} at the first step.",
                    where=f"step {tick.step}, the first batch",
                    expected="a finite number",
                    cause="inputs that are not normalised or hold NaN, a log or division by zero, or half precision",
                    fix="loss_fn(ft.to_module(model, state), batch)   # look at it eagerly, with torch.autograd.set_detect_anomaly",
                )
            )

    def note(self, error: BaseException) -> None:
        """Say where it happened (PEP 678)."""
        tick = self.tick
        if tick is None:
            where = "before the first step was complete"
        else:
            batch = "the end of the epoch" if tick.end else f"batch {tick.batch}"
            where = f"after step {tick.step} was complete (epoch {tick.epoch}, {batch})"
        kept = "was given away (donate=True)" if self.donated else "is unchanged"
        error.add_note(f"ftrain: raised in ft.fit, {where}. The state given to ft.fit {kept}.")

    def close(self, status: str) -> None:
        """Close what can be closed, each whatever the others do; the first failure is raised."""
        failures: list[BaseException] = []
        for one in (self.progress, *self.sinks):
            close = getattr(one, "close", None)
            if close is not None:
                try:
                    close(status)
                except Exception as error:  # raised below, once all are closed
                    failures.append(error)
        if failures and status not in ("error", "interrupted"):  # else an error is on its way already
            raise failures[0]


def _check_arguments(evals: object, hooks: object, sinks: object, log: object, progress: object) -> None:
    def refuse(name: str, value: object, expected: str, fix: str) -> None:
        raise LimitError(
            explain(f"ft.fit: {name}= makes no sense.", expected=expected, got=tree.describe(value), fix=fix)
        )

    if evals is not None and not isinstance(evals, Mapping):
        refuse("evals", evals, "a dict of evaluators by name", 'evals={"val": ft.Evaluator(step, data)}')
    if not isinstance(hooks, Sequence) or isinstance(hooks, Hook):
        refuse("hooks", hooks, "a list of hooks", "hooks=[hook]")
    if not isinstance(sinks, Sequence) or not all(callable(sink) for sink in sinks):
        refuse("sinks", sinks, "a list of functions of a record", "sinks=[print]")
    if log is not None and not isinstance(log, Cadence):
        refuse("log", log, "ft.every(...)", "log=ft.every(steps=10)")
    if not isinstance(progress, bool) and not all(hasattr(progress, name) for name in ("refresh", "record", "close")):
        refuse("progress", progress, "True, False, or what ft.sinks.console gives", "progress=False")


def _evaluators(
    evals: Mapping[str, Evaluator], seed: int, compile: Compile, backend: str | Callable[..., Any]
) -> dict[str, tuple[Any, Epochs, Cadence]]:
    found: dict[str, tuple[Any, Epochs, Cadence]] = {}
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
        if name == "train" or "/" in name:
            raise DataError(
                explain(f"ft.fit: an evaluator cannot be called {name!r}.", expected='a name without "/", not "train"')
            )
        if not isinstance(one.every, Cadence):
            raise DataError(
                explain(
                    f"ft.fit: evals[{name!r}].every is no cadence.", expected="ft.every(epochs=1)", got=repr(one.every)
                )
            )
        source = ungrouped(one.data, seed=seed, batch_size=one.batch_size, what=f"the evaluator {name!r}")
        source.check(f"the evaluator {name!r}")
        if source.once:
            raise DataError(
                explain(
                    f"ft.fit: the data of the evaluator {name!r} is an iterator, which is at its end after one evaluation.",
                    expected="a list, a DataLoader, or a function epoch -> iterable",
                )
            )
        found[name] = (
            prepare(one.step, compile, donate=False, backend=backend, what=f"the evaluator {name!r}"),
            source,
            one.every,
        )
    return found


def _progress(progress: bool | Progress, state: TrainState, limits: Limits, source: Epochs) -> Progress | None:
    if progress is False:
        return None
    if progress is not True:
        return progress
    return console(start=state.counters().step, steps=limits.steps, epochs=limits.epochs, steps_per_epoch=source.length)
