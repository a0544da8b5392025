"""The loop: a generator of ticks, one for each step.

Laws
----
- `loop` is a fold: the state of the n-th tick is `step` applied n times to the first state, over the batches in order.
- A consumer may replace the state between two ticks (`ticks.send(state)`), also by an earlier one: steps and samples are then
  counted from there, and the batches that come next are taken. Nothing else of the loop can be changed from outside.
- It reads nothing from the device between ticks, and holds nothing after it ended.
- `loop(tick.state, step, data, start=tick.position())` gives the ticks that are left: same states, same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from .. import tree
from ..data import Epochs, Feed, as_epochs
from ..errors import DataError, StateError, explain
from ..metrics import normalise
from ..state import TrainState, check_state
from ..steps.bind import batch_size as count_samples
from ..steps.calls import seeded_by
from ..steps.compile import CompiledStep
from ..steps.train import Stepped
from ..types import Metrics
from .cadences import Cadence, Clock
from .limits import Limits
from .position import Position, check_position
from .ticks import Run, Tick

__all__ = ["loop"]


Ticks = Generator[Tick, TrainState | None, str]


def loop(
    state: TrainState,
    step: Callable[[TrainState, Any], Any],
    data: Any,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    until: Cadence | None = None,
    batch_size: int | None = None,
    shuffle: bool = True,
    tokens: Callable[[Any], int] | None = None,
    epoch_ends: bool = False,
    start: Position | None = None,
) -> Ticks:
    """Apply a step to batch after batch, and give a `Tick` after each.

    Args:
        state: where to begin. With a donated step it is gone after the first tick.
        step: `(state, batch) -> (state, metrics)`, compiled or not; taken as it is.
        data: an `ft.data.source` or any iterable of batches, a DataLoader, a function `epoch -> iterable`, or arrays with
            `batch_size=`.
        epochs: how many epochs to run from here. Default, with neither `steps` nor `until`: one, or all there is.
        steps: how many steps to run from here.
        until: stop when this fires, e.g. `ft.until(seconds=60)`.
        batch_size: for arrays: samples in a batch.
        shuffle: for arrays: a new order in each epoch, as a function of the state's seed and the epoch.
        tokens: `batch -> int`, how many tokens a batch has, for `ft.until(tokens=...)`; asked on the host, so it should look at
            shapes, not at values. Of a window, each of its batches is asked.
        epoch_ends: also give a tick with `end=True` when an epoch is complete, after its last step.
        start: where in the data to begin, from `tick.position()` of the run that made `state`. Limits then count from where that
            run began: with the same `epochs=`, the two together do what it alone would have done.

    Returns:
        A generator. `ticks.send(new_state)` in the loop's body makes it go on with another state; it returns the tick again, so
        that the next round of a `for` goes on with the next step. Its value when it ends is the limit that was reached.

    Raises:
        StateError: `state` is not a `TrainState`, or the step gave none.
        DataError: the data has no batches.
        LimitError: a limit makes no sense.

    >>> import torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(2, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> batches = [torch.ones(4, 2)] * 3
    >>> [tick.step for tick in ft.loop(ft.init(model, tx), step, batches, epochs=2)]
    [1, 2, 3, 4, 5, 6]
    """
    check_state(state, "ft.loop")
    if not callable(step):
        raise StateError(
            explain("ft.loop wants a step as its second argument.", expected="a function", got=type(step).__name__)
        )
    begin = state.counters()
    source = as_epochs(data, seed=begin.seed, batch_size=batch_size, shuffle=shuffle, what="ft.loop")
    source.check("ft.loop")
    endless = epochs is None and steps is None and until is None and source.length is None
    # A for loop can be left at any time, so data without a length is no error here, as it is for fit.
    counted = tokens is not None
    limits = Limits(1, None, None) if endless else Limits.of(epochs, steps, until, source, "ft.loop", tokens=counted)
    position = Position(begin.epoch) if start is None else check_position(start, begin, "ft.loop")
    state = ready(state, step, data, source)
    run = Run.of(source, begin, position.clock, tokens)
    return _closed(_run(state, step, run, limits, position, epoch_ends=epoch_ends), source)


def _closed(ticks: Ticks, source: Epochs) -> Ticks:
    """The ticks; and, however they end, the end of the data's workers."""
    try:
        return (yield from ticks)
    finally:
        source.close()


def _run(
    state: TrainState,
    step: Callable[..., Any],
    run: Run,
    limits: Limits,
    position: Position,
    *,
    epoch_ends: bool,
) -> Ticks:
    call = step if isinstance(step, (CompiledStep, Stepped)) else _seeded(step)
    source, device = run.source, state.device
    count, _, samples, _ = state.counters()
    waited, fresh = 0.0, True
    now, reached = _asked(limits, source, position)
    place = position.data
    if reached is not None:
        return reached
    like: Any = tree.map(_shell, state)
    while True:
        epoch, over = run.begin.epoch + run.done, len(place.get("over", ()))
        run.feed = feed = Feed(source(epoch, place), device, source.finish, epoch)
        run.left, whole, read = None, False, feed.read
        try:
            for batch in feed:
                size = run.count(batch)
                state, metrics = _result(call(state, batch))
                if fresh:
                    _check(like, state)
                    fresh = False
                count += 1
                samples += size
                read = feed.read
                run.before = None if limits.until is None else now
                tick = Tick(
                    state, metrics, count, epoch, samples, feed.read - 1, waited + feed.waited, False, run.words, run
                )
                state = yield from _give(tick)
                count, samples = tick.step, tick.samples
                if feed.read == source.length:
                    continue  # the last batch: the epoch is completed first, then the limits are looked at
                if limits.steps is not None and count - run.begin.step >= limits.steps:
                    return "steps"
                if limits.until is not None:
                    before, now = now, run.clock(tick)
                    if limits.until.fires(before, now):
                        return "until"
            whole = True
        finally:
            run.leave(None if whole else read)
        # Asked for now: once the next epoch is begun, what it takes over from this one is gone.
        place = run.next = source.start()
        waited += feed.waited
        # An epoch may be shorter than a window that is carried on: then it leaves over more than the one before.
        if feed.read == 0 and len(place.get("over", ())) <= over:
            raise DataError(_empty(epoch, run.done, source))
        run.done += 1
        state = state.next_epoch()
        run.before = None if limits.until is None else now
        tick = Tick(state, {}, count, epoch, samples, feed.read - 1, waited, True, run.words, run)
        if epoch_ends:
            state = yield from _give(tick)
            count, samples = tick.step, tick.samples
        before, now = now, run.clock(tick)
        reached = _over(limits, source, before, now)
        if reached is not None:
            return reached


def _asked(limits: Limits, source: Epochs, position: Position) -> tuple[Clock, str | None]:
    """Where a run goes on: the clock at which limits were asked last, and which of them was reached already."""
    now, place = position.clock, position.data
    if not now.steps and not now.epochs and not place["batch"]:
        return now, None
    # A cadence that fires at one moment compares two clocks.
    before = position.before
    if before is None:  # a run without `until=`: the clock before is that of a step ago; how many samples is not known
        epochs = now.epochs - 1 if now.epochs and not place["batch"] else now.epochs
        before = now._replace(steps=max(now.steps - 1, 0), epochs=epochs)
    if place["batch"] == source.length:  # left after an epoch's last step: the epoch is completed first, as ever
        return before, None
    return now, _over(limits, source, before, now)


def _over(limits: Limits, source: Epochs, before: Clock, now: Clock) -> str | None:
    """Why the run ends here, between two steps, if it does."""
    return limits.reached(before, now) or ("data" if source.once and now.epochs else None)


def ready(state: TrainState, step: Any, data: Any, source: Epochs) -> TrainState:
    """The state with the sub-states that the step needs; raises where a batch is known beforehand to be of a wrong size."""
    inner = step.step if isinstance(step, CompiledStep) else step
    check = getattr(inner, "check_rows", None)
    if check is not None:
        known = source.sizes
        if known is None and isinstance(data, list):
            known = tuple(dict.fromkeys(count_samples(batch) for batch in data))
        for n in known or ():
            check(n)
    init = getattr(inner, "init", None)
    return state if init is None else init(state)


def _give(tick: Tick) -> Generator[Tick, TrainState | None, TrainState]:
    """Yield a tick, again for each state that the consumer sends; gives the state with which to go on."""
    held = tick.state
    sent = yield tick
    while sent is not None:
        new = _sent(sent, held)
        if new.step is not held.step or new.samples is not held.samples:
            tick.step, _, tick.samples, _ = new.counters()
        tick.state = held = new
        sent = yield tick
    return tick.state


def _seeded(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that nobody else seeds: its draws become a function of the state's seed and step."""

    def call(state: TrainState, batch: Any) -> Any:
        with seeded_by(state):
            new, metrics = _result(step(state, batch))
        return new, normalise(metrics, None, "the metrics that the step returned")

    return call


def _result(out: Any) -> tuple[TrainState, Metrics]:
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], TrainState):
        return out
    got = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
    raise StateError(
        explain(
            "the step did not return (state, metrics).",
            expected="(TrainState, dict of metrics)",
            got=got,
            fix='return state.advance(batch_size, params=params), {"loss": loss}',
        )
    )


def _check(before: TrainState, after: TrainState) -> None:
    tree.check_same(
        before,
        after,
        root="state",
        what="the step returned a state that is not like the one it was given.",
        fix="state.replace(params=...)   # with leaves of the same structure, shape, dtype and device",
    )


def _sent(sent: object, state: TrainState) -> TrainState:
    new = check_state(sent, "ticks.send")
    tree.check_same(
        state,
        new,
        root="state",
        what="the state sent to the loop is not like the one it had.",
        fix="ticks.send(state.replace(...))",
    )
    if new.epoch is not state.epoch and new.counters().epoch != state.counters().epoch:
        raise StateError(
            explain(
                "the state sent to the loop is of another epoch.",
                expected=f"epoch {state.counters().epoch}, where the data is",
                got=f"epoch {new.counters().epoch}",
                cause="an earlier state was kept over the end of an epoch; steps go back with it, the data does not",
                fix="ticks.send(earlier.replace(epoch=tick.state.epoch))",
            )
        )
    return new


def _empty(epoch: int, done: int, source: Epochs) -> str:
    if done:
        return explain(
            f"the data has no batches in epoch {epoch}, after {done} that had.",
            cause="an iterator that is at its end" if source.length is None else None,
            fix="pass a list, a DataLoader, or a function epoch -> iterable",
        )
    return explain(
        "the data has no batches.",
        expected="at least one batch",
        got="none in the first epoch",
        cause="an empty dataset, or a loader with drop_last=True and fewer samples than a batch",
    )


def _shell(leaf: Any) -> Any:
    """A tensor of the same shape, dtype and device that has no memory of its own."""
    return leaf.new_empty((1,)).expand(leaf.shape) if leaf.ndim else leaf.new_empty(())
