"""`fit`: a consumer of the loop that evaluates, records, shows progress, and stops. You could have written it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import rng
from ..data import Epochs, as_epochs
from ..sinks import History, Progress, Record, console
from ..state import TrainState, check_state
from ..steps.kinds import optimizers
from ..steps.train import Stepped
from ..types import Checkpointer
from .arguments import check_arguments, check_averages, check_evaluators
from .cadences import Cadence
from .calling import Hooks
from .evaluate import Compile, Evaluator, prepare
from .limits import Limits
from .loop import ready
from .session import Session
from .signals import Signals
from .snapshot import Snapshot
from .units import every

__all__ = ["Result", "fit"]


@dataclass(frozen=True)
class Result:
    """What `fit` gives back.

    Attributes:
        state: the last state; yours to keep.
        history: the records.
        reason: why it ended: `"epochs"`, `"steps"`, `"until"`, `"data"` (an iterator at its end), a hook's words, or the signal:
            `"interrupted"` (Ctrl-C), `"terminated"` (SIGTERM), `"preempted"` (SIGUSR1).

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
    at_least: Cadence | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    evals: Mapping[str, Evaluator] | None = None,
    hooks: Sequence[Any] = (),
    sinks: Sequence[Callable[[Record], None]] = (),
    log: Cadence | None = None,
    tokens: Callable[[Any], int] | None = None,
    progress: bool | Progress = True,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
    donate: bool = False,
    checkpoint: Checkpointer | None = None,
    resume: Any = None,
    snapshot: Cadence | None = None,
    signals: bool = True,
) -> Result:
    """Train: apply `step` to batch after batch, evaluate, record, and give back the last state with its history.

    At each step, in this order: step, hooks, evaluation, hooks, record, checkpoint, hooks, sinks. Nothing is read from the device between
    two log points, and no file is written without `checkpoint=`. The same state, step and data give the same result, whatever ran
    before, and in however many pieces it is run.

    Args:
        state: where to begin. It stays valid: `fit` works on one copy (none with `donate=True`).
        step: `(state, batch) -> (state, metrics)`, e.g. `ft.train_step(model, loss_fn, tx)`; one from `ft.compile` is taken as it is.
        data: an `ft.data.source`, a list of batches, a DataLoader or other iterable, a function `epoch -> iterable`, or, with
            `batch_size=`, a tuple or dict of arrays of equal length; several batches a step with `ft.data.window`. Batches are any
            tree of tensors and arrays, and are moved to the state's device.
        epochs: how many epochs to run. With none of `epochs`, `steps`, `until`: one. All limits count from here; with `resume=`,
            from where the run began.
        steps: how many steps to run.
        until: stop when this fires, e.g. `ft.until(seconds=3600)`.
        at_least: what a hook says about stopping is not heeded before this fires, e.g. `ft.until(epochs=2)`.
        batch_size: for arrays: samples in a batch.
        shuffle: for arrays: a new order in each epoch, a function of the state's seed and the epoch.
        evals: evaluators by name; their results are recorded under `name/metric`.
        hooks: pure functions `(state, event) -> state` (see `ft.Event`, `ft.Outcome`, `ft.Hook`, `ft.on`).
        sinks: functions of a `Record`, called at each record; one with a `close(status)` is closed at the end.
        log: when to record training metrics, as a mean over the steps since the record before; default: every 50 steps. Also at
            the end of each epoch and of the run.
        tokens: `batch -> int`, how many tokens a batch has, for `ft.every(tokens=...)` and its like; asked on the host before each
            step, so it should look at shapes, not at values.
        progress: a line on the console; False for none.
        compile: `"auto"` takes the highest rung that works (see `ft.compile`); True the whole step or an error; False eager.
        backend: a backend of `torch.compile`.
        donate: let the first step take the memory of `state`, which is then gone.
        checkpoint: where and when to save, e.g. `ft.Checkpoints("run/ckpt", every=ft.every(epochs=1))`. The last state is saved too.
        resume: `"auto"`: go on with the newest checkpoint, or begin where there is none; `"latest"`: there has to be one; a step
            (an integer): that one, which has to be the newest; None: begin, in a place without checkpoints. The same call
            made again completes the run; one that was complete is given back as it was.
        snapshot: how often to keep a copy of the state in memory, for exceptions (see below); costs the size of the state. A step
            that fails has consumed its state where it is compiled.
        signals: end the run at the next step upon Ctrl-C, SIGTERM or SIGUSR1, saving if there is `checkpoint=`; a second Ctrl-C
            raises. The handlers before are put back. False: leave signals alone.

    Returns:
        `Result(state, history, reason)`.

    Raises:
        StateError, LimitError, DataError, LossError, BatchError, MetricError, HookError: bad input, before any harm is done.
        CheckpointError, RestoreError: the checkpoints cannot be written, or are those of another run.
        Whatever the user's code raises comes through, with the step, epoch and batch added as a note, and `error.ftrain`, a
        `Failure`, which has the newest valid state.

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
    check_arguments(
        evals, hooks, sinks, log, progress, checkpoint=checkpoint, resume=resume, snapshot=snapshot, tokens=tokens
    )
    seed = state.counters().seed
    source = as_epochs(data, seed=seed, batch_size=batch_size, shuffle=shuffle, what="ft.fit")
    source.check("ft.fit")
    length, counted = source.length, tokens is not None
    limits = Limits.of(epochs, steps, until, source, "ft.fit", at_least=at_least, tokens=counted)
    called = Hooks(hooks, length, counted)
    evaluators = check_evaluators(evals or {}, seed, compile, backend, length=length, tokens=counted)
    compiled = prepare(step, compile, donate=True, backend=backend)
    called.check_names(compiled.step.names() if isinstance(compiled.step, Stepped) else set())
    given = None if donate else state
    state = called.init(ready(state, compiled, data, source))
    check_averages(evaluators, state)
    # What hooks, sinks and careless steps draw from numpy or random is a function of the state, and does not outlive the call.
    streams = rng.Isolated(rng.fold_in_host(seed, state.counters().step, 0xF17))
    session = Session(
        (log or every(steps=50)).bound(length, counted, "ft.fit: log="),
        evaluators,
        called,
        sinks,
        snapshot=None if snapshot is None else snapshot.bound(length, counted, "ft.fit: snapshot="),
        signals=Signals(signals),
        streams=streams,
        at_least=limits.at_least,
        tokens=tokens,
    )
    status, failed = "error", False
    try:
        found: Snapshot | None = None
        if checkpoint is not None:
            session.saver = checkpoint.open(
                state,
                resume=resume,
                facts=source.facts,
                evaluators=list(evaluators),
                optimizers=optimizers(compiled.step),
            )
            session.agenda.saving = session.saver.every.bound(length, counted, "ft.fit: checkpoint=")
            found = session.saver.found
        if found is not None:
            state = found.state
        elif not donate:
            state = state.copy()
        begin = state.counters().step - (0 if found is None else found.position.clock.steps)
        session.told.progress = _progress(progress, begin, limits, source)
        with session.signals, streams:
            state, status = session.drive(state, compiled, source, limits, found)
            if session.saver is not None:
                session.saver.wait()  # under our handlers still: a second SIGTERM would end the process in the middle of a save
        return Result(state, History(session.told.records), status)
    except BaseException as error:
        status, failed = "interrupted" if isinstance(error, KeyboardInterrupt) else "error", True
        session.fail(error, given)
        raise
    finally:
        session.close(status, failed=failed)


def _progress(progress: bool | Progress, start: int, limits: Limits, source: Epochs) -> Progress | None:
    if progress is False:
        return None
    if progress is not True:
        return progress
    return console(start=start, steps=limits.steps, epochs=limits.epochs, steps_per_epoch=source.length)
