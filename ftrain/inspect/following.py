"""`evaluate_checkpoints`: evaluation apart from the training, of the checkpoints that a run wrote or is writing.

Laws
----
- The results are, bit by bit, those that `fit` records with the same evaluators at the same steps, unless a hook changed the
  state between its evaluation and its checkpoint.
- The run's folder is only read: no lock is taken, nothing is written, and the run does not notice.
- A checkpoint that is there when the folder is looked at is evaluated, or it is said why not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.paths import Rename, Select
from ..loops import Cadence, Clock, Evaluator
from ..loops.arguments import check_averages, check_evaluators
from ..loops.evaluate import Compile, Prepared, Stopped, run, with_params
from ..loops.signals import Signals
from ..sinks import Record
from ..state import TrainState, check_state
from .appearing import Appearing, Found, Steps
from .requests import POLL, WHAT, check_evals, check_following, check_sinks, check_steps

__all__ = ["evaluate_checkpoints"]

SLICE = 0.1  # seconds after which a signal is seen while it waits


def evaluate_checkpoints(
    path: str | os.PathLike[str],
    like: TrainState,
    evals: Mapping[str, Evaluator],
    *,
    steps: Steps = "all",
    by: str | None = None,
    mode: str = "min",
    after: int | None = None,
    follow: bool = False,
    until: Cadence | None = None,
    timeout: float | None = None,
    poll: float = POLL,
    sinks: Sequence[Callable[[Record], None]] = (),
    select: Select | None = None,
    rename: Rename | None = None,
    cast: bool = False,
    compile: Compile = "auto",
    backend: str | Callable[..., Any] = "inductor",
    signals: bool = True,
) -> Generator[Record, None, str]:
    """Evaluate the checkpoints of a run, in the order of their steps; with `follow=True` also those that are still to come.

    For a process beside the training (another GPU, another machine with the same folder), or afterwards. The results are those
    that `fit(evals=...)` records at the same steps. The folder is only read. A checkpoint that the run deletes (`ft.keep`) before it
    was read is left out, with a `CheckpointWarning`; so is one that is damaged, unless it was named.

    Nothing in a folder says that a run will not go on, but where a hook or the data ended it. So where `follow=True` shall end by
    itself in any case, say the run's own limit, `until=ft.until(steps=...)`, or a `timeout`. A Ctrl-C or SIGTERM ends it, too:
    what was begun is left, the sinks are closed, and the loop over the records is over.

    Args:
        path: a folder of checkpoints. With `follow=True` it need not exist yet.
        like: a state of the same kind, e.g. `ft.init(model, tx)`; it may lie on the meta device. Its own device is where it evaluates.
        evals: evaluators by name, as for `fit`; of these, `every` and `sanity` are not looked at.
        steps: which checkpoints: `"all"`; `"latest"`, where `follow=True` passes over those that a newer one has overtaken; `"best"`; or
            a list of steps.
        by: the metric for `"best"`, as for `ft.restore`.
        mode: `"min"` or `"max"`, for `"best"`.
        after: only later steps than this one, e.g. the last that an earlier call gave.
        follow: go on as checkpoints appear.
        until: with `follow`: end after the first checkpoint at which this fires, counted as `fit` counts from the run's start.
        timeout: with `follow`: end after so many seconds without a new checkpoint.
        poll: with `follow`: seconds between two looks.
        sinks: called with each record before it is given; one with a `close(status)` is closed at the end.
        select: which leaves are taken from the checkpoint, as for `ft.restore`; the others stay as in `like`, but for the
            counters and the seed. To evaluate, the optimizer's state and the memory of hooks are not needed:
            `select=["params", "frozen", "buffers"]`.
        rename: what the leaves of the checkpoint are called in `like`, as for `ft.restore`.
        cast: convert tensors whose dtype differs.
        compile: as in `fit`.
        backend: a backend of `torch.compile`.
        signals: see above; False: leave signals alone. Handlers are in place only while it works, not in the body of your loop.

    Returns:
        A generator of records, one for each checkpoint and evaluator; `seconds` and `tokens` are the run's. Its value when it ends is
        why: `"complete"`, `"until"`, `"timeout"`, what ended the run, or the signal as in `ft.fit`.

    Raises:
        CheckpointError: there are no checkpoints, no such steps, or one that was named is damaged.
        RestoreError: a checkpoint is not like `like`; all differences are listed.
        ArgumentError, LimitError, DataError, StateError: bad input, before any checkpoint is read.

    >>> import tempfile, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> score = ft.eval_step(model, lambda model, batch: {"loss": model(batch).square().mean()})
    >>> state, data, evals = (
    ...     ft.init(model, tx),
    ...     [torch.ones(4, 1)] * 2,
    ...     {"val": ft.Evaluator(score, [torch.ones(8, 1)])},
    ... )
    >>> with tempfile.TemporaryDirectory() as path:
    ...     ckpt, quiet = ft.Checkpoints(path, keep=None), {"progress": False, "compile": False}
    ...     result = ft.fit(state, step, data, epochs=3, evals=evals, checkpoint=ckpt, **quiet)
    ...     records = list(ft.evaluate_checkpoints(path, state, evals, compile=False))
    >>> (
    ...     [record.step for record in records],
    ...     [record.metrics["loss"] for record in records] == list(result.history["val/loss"]),
    ... )
    ([2, 4, 6], True)
    """
    check_state(like, WHAT)
    check_steps(steps, after, by, mode, follow=follow)
    check_following(follow, until, timeout, poll)
    check_sinks(sinks)
    if until is not None:
        until = until.bound(None, True, WHAT)
    work = _Work(check_evals(evals), compile, backend, like, {"select": select, "rename": rename, "cast": cast})
    work.prepare(0 if like.device.type == "meta" else like.counters().seed)
    check_averages(work.ready, like)
    found = Appearing(path, steps, after=after, by=by, mode=mode)
    if not follow:
        saved = found.look()
        if not saved and not found.store.damaged:
            raise found.store.nothing()
        for step in () if isinstance(steps, str) else steps:
            found.store.document(step)  # raises where there is none, or it is damaged
    stop = _Stop(follow, until, timeout, poll)
    return _records(found, work, stop, tuple(sinks), Signals(signals))


@dataclass
class _Work:
    """The evaluators, ready for states with one seed."""

    evals: Mapping[str, Evaluator]
    compile: Compile
    backend: Any
    like: TrainState
    taking: Mapping[str, Any]
    seed: int | None = None
    ready: dict[str, Prepared] = field(default_factory=dict)

    def prepare(self, seed: int) -> None:
        """Data that is shuffled is so by the seed of the run."""
        if seed != self.seed:
            self.close()
            self.ready = check_evaluators(self.evals, seed, self.compile, self.backend)
            self.seed = seed

    def evaluate(self, found: Found, signals: Signals) -> list[Record]:
        """What the evaluators give, one after the other; raises `Stopped` upon a signal."""
        counters = found.state.counters()
        self.prepare(counters.seed)
        records = []
        for name, one in self.ready.items():
            what = f"the evaluator {name!r}"
            state = with_params(found.state, one.step, one.params, what)
            metrics = run(state, one.step, one.source, what, signals=signals, limit=one.limit)
            about = counters.epoch, counters.samples, found.clock.seconds, name, metrics
            records.append(Record(found.step, *about, tokens=found.clock.tokens))
        return records

    def close(self) -> None:
        for one in self.ready.values():
            one.source.close()


@dataclass
class _Stop:
    """When it is over, and the waiting until then."""

    follow: bool
    until: Cadence | None
    timeout: float | None
    poll: float
    before: Clock | None = None
    quiet: float = 0.0  # seconds since there was something to do

    def reached(self, clock: Clock) -> bool:
        before, self.before = self.before, clock
        return self.until is not None and self.until.fires(before, clock)

    def wait(self, signals: Signals) -> None:
        """Wait until it is time for the next look, or a signal comes."""
        seconds = self.poll if self.timeout is None else min(self.poll, self.timeout - self.quiet)
        began = time.monotonic()
        while signals.reason is None and (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(left, SLICE))
        self.quiet += time.monotonic() - began


def _records(
    found: Appearing, work: _Work, stop: _Stop, sinks: Sequence[Callable[[Record], None]], signals: Signals
) -> Generator[Record, None, str]:
    status = "error"
    try:
        while True:
            reason: str | None = None
            with signals:
                due = found.due()
            for step in due:
                stop.quiet = 0.0
                with signals:
                    records, reason = _one(found, work, stop, step, signals)
                    for record in records:
                        for sink in sinks:
                            sink(record)
                yield from records
                if reason is not None:
                    break
            with signals:
                reason = reason or signals.reason or _over(found, stop, due)
                if reason is None and not due:
                    stop.wait(signals)
            if reason is not None:
                status = reason
                return reason
    except GeneratorExit:  # the consumer has left its loop
        status = "closed"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        _close(work, found, sinks, status)


def _one(found: Appearing, work: _Work, stop: _Stop, step: int, signals: Signals) -> tuple[list[Record], str | None]:
    """The records of one checkpoint, and why it is the last, if it is."""
    if signals.reason is not None:
        return [], signals.reason
    one = found.load(step, work.like, **work.taking)
    if one is None:
        return [], None
    try:
        records = work.evaluate(one, signals)
    except Stopped:  # whoever goes on with after= begins with this checkpoint
        return [], signals.reason
    return records, "until" if stop.reached(one.clock) else None


def _over(found: Appearing, stop: _Stop, due: Sequence[int]) -> str | None:
    """Why it is over after a look, if it is."""
    if not stop.follow or found.complete():
        return "complete"
    if due:  # others may have appeared meanwhile
        return None
    return found.ended() or ("timeout" if stop.timeout is not None and stop.quiet >= stop.timeout else None)


def _close(work: _Work, found: Appearing, sinks: Sequence[Callable[[Record], None]], status: str) -> None:
    """Close what can be closed, each whatever the others do; the first failure is raised."""
    failures: list[BaseException] = []
    closing: list[Callable[[], object]] = [work.close, found.store.close]
    for sink in sinks:
        close = getattr(sink, "close", None)
        if close is not None:
            closing.append(lambda close=close: close(status))  # type: ignore[misc]  # bound now, not at the call
    for one in closing:
        try:
            one()
        except Exception as error:  # raised below, once all are closed
            failures.append(error)
    if failures and status not in ("error", "interrupted"):  # else an error is on its way already
        raise failures[0]
