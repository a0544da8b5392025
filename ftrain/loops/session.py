"""What `fit` keeps while it runs: records, metrics that are not recorded yet, what is due and when; and how it goes on elsewhere.

Law: a session that took over another's snapshot does what that one would have done.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import rng
from ..data import Epochs
from ..errors import LossError, explain
from ..sinks import History, Progress, Record
from ..state import TrainState
from ..steps.compile import CompiledStep
from ..types import Saver
from .evaluate import Stopped, run
from .events import Event, Hooks
from .limits import Limits
from .loop import Tick, loop
from .meter import Meter, pack_metrics, unpack_metrics
from .position import Position
from .signals import Signals
from .snapshot import Failure, Snapshot
from .units import Cadence, Clock

__all__ = ["Session"]

_LIMITS = ("epochs", "steps", "until")
Sink = Callable[[Record], None]
Attended = tuple[TrainState, str | None]  # the state to go on with, and a reason to stop


class Session:
    """One call of `fit`."""

    def __init__(
        self,
        log: Cadence,
        evaluators: dict[str, tuple[Any, Epochs, Cadence]],
        hooks: Hooks,
        sinks: Sequence[Sink],
        *,
        snapshot: Cadence | None = None,
        signals: Signals,
        streams: rng.Isolated,
    ) -> None:
        self.log, self.evaluators, self.hooks, self.sinks = log, evaluators, hooks, sinks
        self.every, self.signals, self.streams = snapshot, signals, streams
        self.saver: Saver | None = None
        self.progress: Progress | None = None
        self.records: list[Record] = []
        self.meter = Meter()
        self.extra: dict[str, Any] = {}  # metrics from hooks, for the next record
        self.began = time.perf_counter()
        self.begin = (0, 0)  # the state's counts of steps and samples when the run began
        self.done = 0  # epochs completed in this run
        self.waited = 0.0  # seconds spent waiting for data up to the last record
        self.asked: Clock | None = None  # when the cadences were last asked
        self.due = 0.0  # the first step at which one of them may fire
        self.final = False  # whether this is the last step of its epoch, where something that is due depends on it
        self.ended: str | None = None  # why the run is over, where a hook or the data said so
        self.owed = False  # a checkpoint that was due at the last step of an epoch, and is made at the epoch's end
        self.tick: Tick | None = None
        self.start = Position(0)  # where this process began
        self.step: Any = None
        self.source: Any = None
        self.unchecked = True
        # What is happening at this tick, and what was there before it: where it does not come to its end, it is done again.
        self.attending: str | None = None
        self.before: tuple[dict[str, Any], Clock] = ({}, Clock())
        self.hooked: Attended | None = None  # what the first hooks of this tick gave
        self.kept: Snapshot | None = None  # the copy that an exception carries
        self.unsettled = False  # whether that was made before this step's evaluation had come to its end
        self.saved: int | None = None  # the newest step with a checkpoint

    # -- the run --------------------------------------------------------------------------------------------------------------

    def drive(
        self, state: TrainState, step: Callable[..., Any], source: Epochs, limits: Limits, found: Snapshot | None
    ) -> tuple[TrainState, str]:
        """Consume the loop; gives the last state and why it ended."""
        self.step, self.source = step, source
        counters = state.counters()
        reason: str | None = None
        if found is None:
            position = Position(counters.epoch)
            self.begin = (counters.step, counters.samples)
            self.start = position
            self.tick = Tick(state, {}, counters.step, counters.epoch, counters.samples, -1)
            state, reason = self.attend(self.tick, "start")
        else:
            self.start = position = found.position
            state, reason = self.take_over(found)
        if reason is None:
            reason = self.turn(state, step, source, limits, position)
        tick = self.tick
        assert tick is not None, "it was set above"
        state = tick.state
        signalled = self.signals.reason is not None and reason == self.signals.reason
        if self.saver is not None and (self.saver.on_signal or not signalled):
            # A limit is looked at anew by whoever goes on; what a hook or the data said holds.
            self.save(self.snapshot(None if signalled else self.ended))
        last = History(self.records).last()
        outcome = self.hooks(state, self.event("end", tick, self.clock(tick), metrics=last, reason=reason))
        self.extra = self.extra | dict(outcome.metrics or {})
        for record in self.record(tick):
            self.records.append(record)
            self.emit(record)
        return outcome.state, reason

    def turn(
        self, state: TrainState, step: Callable[..., Any], source: Epochs, limits: Limits, position: Position
    ) -> str:
        """Step after step, until a limit, a hook or a signal ends it; `self.tick` is the last one."""
        # The loop's clock is this one: what was done before the first step counts for `until(seconds=...)`, too.
        position = dataclasses.replace(position, clock=position.clock._replace(seconds=self.seconds()))
        ticks = loop(
            state,
            step,
            source,
            epochs=limits.epochs,
            steps=limits.steps,
            until=limits.until,
            epoch_ends=True,
            start=position,
        )
        begin, add, hooks, show, signals = self.begin[0], self.meter.add, bool(self.hooks), self.progress, self.signals
        refresh = math.inf if show is None else time.perf_counter()
        try:
            while signals.reason is None:
                try:
                    tick = next(ticks)
                except StopIteration as ended:
                    reason: str = ended.value
                    self.ended = None if reason in _LIMITS else reason
                    return reason
                except Exception:
                    if signals.reason is None or not (self.tick is not None and valid(self.tick.state)):
                        raise  # also where the step had consumed its state: there is nothing to end with
                    break  # a data worker that got the Ctrl-C as well, say
                self.tick = tick
                if tick.end:
                    self.done += 1
                else:
                    add(tick.metrics)
                    if self.unchecked:
                        self.first_loss(tick)
                if hooks or tick.end or tick.step - begin >= self.due:
                    old = tick.state
                    new, stop = self.attend(tick, "epoch" if tick.end else "step")
                    if new is not old:
                        ticks.send(new)  # which puts it into the tick, too
                    if stop is not None:
                        return stop
                if show is not None and time.perf_counter() >= refresh:
                    now = time.perf_counter()
                    show.refresh(tick.step, self.epochs(tick), tick.samples, now - self.began)
                    refresh = now + show.interval
            assert signals.reason is not None, "the loop ends with a reason"
            return signals.reason
        finally:
            ticks.close()

    def attend(self, tick: Tick, kind: str, hooked: tuple[TrainState, str | None] | None = None) -> Attended:
        """What is due at this point: hooks, evaluation, hooks, record, checkpoint, sinks. Gives the state and a reason to stop.

        Args:
            tick: the newest one.
            kind: `"start"`, `"step"` or `"epoch"`.
            hooked: what the first hooks gave, where another session had come so far.
        """
        now, before = self.clock(tick), self.asked
        self.attending, self.hooked, self.before = kind, hooked, (self.extra, self.hooks.before)
        if tick.ran():  # else the session before has found out
            self.final = kind == "step" and self.depends(before, now) and tick.last()
        if hooked is None:
            hooked = tick.state, None
            if self.hooks and self.hooks.listens(kind, now):
                hooked = self.happens(tick.state, self.event(kind, tick, now, metrics=tick.metrics))
            if kind != "epoch":
                self.hooks.passed(now)
            self.hooked, self.before = hooked, (self.extra, self.hooks.before)
        state, stop = hooked
        due = [(name, *rest) for name, (*rest, cadence) in self.evaluators.items() if cadence.fires(before, now)]
        if due and self.progress is not None and before is not None:
            self.progress.refresh(tick.step, self.epochs(tick), tick.samples, now.seconds)
        results: list[Record] = []
        try:
            for name, step, source in due:
                metrics = run(state, step, source, f"the evaluator {name!r}", self.signals)
                if self.saver is not None:
                    self.saver.check_metrics(name, metrics)
                results.append(Record(tick.step, self.epochs(tick), tick.samples, self.seconds(), name, metrics))
        except Stopped:  # by a signal: whoever goes on begins with the evaluation
            return state, self.signals.reason
        if results and self.hooks.listens("evaluation", now):
            named = {name: value for record in results for name, value in record.named().items()}
            state, why = self.happens(state, self.event("evaluation", tick, now, metrics=named))
            stop = stop or why
        records = self.recorded(tick, kind, before, now) + results
        self.records.extend(records)
        self.attending, self.ended = None, stop
        tick.state = state
        self.asked = now
        self.preserve(tick, kind, before, now, stop)
        self.due = min(cadence.next_step(now) for cadence in self.cadences())
        for record in records:
            self.emit(record)
        return state, stop

    def recorded(self, tick: Tick, kind: str, before: Clock | None, now: Clock) -> list[Record]:
        """The record of training that is due now. That of an epoch's last step is made at the epoch's end, which comes next."""
        if before is None or not (tick.end or self.log.fires(before, now)):
            return []
        return [] if self.final else self.record(tick)

    def preserve(self, tick: Tick, kind: str, before: Clock | None, now: Clock, stop: str | None) -> None:
        """The checkpoint and the copy that are due now."""
        if self.saver is not None and (self.owed or self.saver.every.fires(before, now)):
            self.owed = self.final
            if not self.owed:
                self.save(self.snapshot(stop))
        if self.every is not None and self.every.fires(before, now):
            shot = self.snapshot(stop)
            self.kept = Snapshot(shot.state.copy(), shot.position, shot.notes, tuple(shot.records), shot.ended)

    def cadences(self) -> list[Cadence]:
        found = [self.log, *(cadence for _, _, cadence in self.evaluators.values())]
        found += [] if self.every is None else [self.every]
        return found if self.saver is None else [*found, self.saver.every]

    def happens(self, state: TrainState, event: Event) -> tuple[TrainState, str | None]:
        outcome = self.hooks(state, event)
        self.extra = self.extra | dict(outcome.metrics or {})
        return outcome.state, outcome.stop

    def event(
        self, kind: str, tick: Tick, now: Clock, *, metrics: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> Event:
        return Event(kind, tick.step, self.epochs(tick), tick.samples, now, metrics or {}, reason)

    def clock(self, tick: Tick) -> Clock:
        return Clock(tick.step - self.begin[0], self.done, tick.samples - self.begin[1], self.seconds())

    def epochs(self, tick: Tick) -> int:
        return tick.epoch + 1 if tick.end else tick.epoch

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def record(self, tick: Tick) -> list[Record]:
        """Bring the metrics since the last record to the host."""
        if not self.meter and not self.extra:
            return []
        metrics = {**self.meter.fetch(), **self.extra}
        waited, self.waited = tick.waited - self.waited, tick.waited
        self.extra = {}
        return [Record(tick.step, self.epochs(tick), tick.samples, self.seconds(), "train", metrics, waited)]

    def emit(self, record: Record) -> None:
        if self.progress is not None:
            self.progress.record(record)
        for sink in self.sinks:
            sink(record)

    def depends(self, before: Clock | None, now: Clock) -> bool:
        """Whether something is due that waits for the epoch's end where this is its last step."""
        return self.log.fires(before, now) or (self.saver is not None and self.saver.every.fires(before, now))

    # -- as a value -----------------------------------------------------------------------------------------------------------

    def position(self, tick: Tick) -> Position:
        """Where the run goes on after this tick."""
        position = tick.position() if tick.ran() else self.start
        return dataclasses.replace(position, clock=self.clock(tick))

    def snapshot(self, ended: str | None = None) -> Snapshot:
        """The run as it is now. What is happening at this tick, if anything is, will be done again by whoever goes on."""
        tick = self.tick
        assert tick is not None, "a run has a tick from its start on"
        extra, hooks = (self.extra, self.hooks.before) if self.attending is None else self.before
        state, pending = tick.state, None
        if self.attending is not None:
            pending = {"kind": self.attending, "metrics": pack_metrics(tick.metrics), "final": self.final}
            pending["hooked"] = self.hooked is not None
            if self.hooked is not None:
                state, pending["stop"] = self.hooked
        asked = self.asked
        notes = {
            "meter": self.meter.plain(),
            "extra": dict(extra),
            "asked": None if asked is None else asked._asdict(),
            "hooks": hooks._asdict(),
            "owed": self.owed,
            "waited": tick.waited - self.waited,
            "streams": self.streams.state(),
            "pending": pending,
            "begin": list(self.begin),
            "shapes": self.step.shapes() if isinstance(self.step, CompiledStep) else [],
        }
        return Snapshot(state, self.position(tick), notes, self.records, ended)

    def take_over(self, found: Snapshot) -> tuple[TrainState, str | None]:
        """Go on where another session was; gives the state and, where that one was at its end, the reason."""
        notes, clock, counters = found.notes, found.position.clock, found.state.counters()
        device = found.state.device
        self.begin = (counters.step - clock.steps, counters.samples - clock.samples)
        self.done, self.began = clock.epochs, time.perf_counter() - clock.seconds
        self.records, self.extra = list(found.records), dict(notes["extra"])
        self.meter.take(notes["meter"], device)
        self.asked = None if notes["asked"] is None else Clock(**notes["asked"])
        self.hooks.passed(Clock(**notes["hooks"]))
        self.owed, self.waited, self.unchecked = notes["owed"], -notes["waited"], clock.steps == 0
        self.streams.take(notes["streams"])
        self.saved = counters.step
        if isinstance(self.step, CompiledStep):
            self.step.rehearse(notes["shapes"])
        pending = notes["pending"]
        self.unsettled = pending is not None
        end = pending is not None and pending["kind"] == "epoch"
        epoch = counters.epoch - 1 if end else counters.epoch
        tick = Tick(found.state, {}, counters.step, epoch, counters.samples, found.position.data["batch"] - 1, end=end)
        self.tick = tick
        if pending is None:
            if self.asked is not None:
                self.due = min(cadence.next_step(self.asked) for cadence in self.cadences())
            self.ended = found.ended
            return found.state, found.ended
        tick.metrics = unpack_metrics(pending["metrics"], device)
        counted = found.position.data["batch"] == self.source.length
        self.final = pending["kind"] == "step" and (pending["final"] or counted)
        return self.attend(tick, pending["kind"], (found.state, pending["stop"]) if pending["hooked"] else None)

    def save(self, shot: Snapshot) -> None:
        """Hand a snapshot to the checkpointer, unless this step has one already."""
        step = shot.state.counters().step
        if self.saver is None:
            return
        if step != self.saved:
            self.saver.save(shot)
            self.saved = step
        elif self.unsettled and self.attending is None:
            self.saver.amend(shot)
        self.unsettled = self.attending is not None

    def first_loss(self, tick: Tick) -> None:
        """The one look at a value before the first log point: a run that begins with NaN is wrong from the start."""
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
        self.unchecked = False

    # -- when it goes wrong ---------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, given: TrainState | None) -> None:
        """Let an exception carry the newest state that is valid; and save it, where that is asked for."""
        self.note(error, given)
        tick = self.tick
        if tick is None:
            return
        self.settle(error)
        failure = self.newest(tick, given, self.where(tick))
        if self.saver is not None and self.saver.on_exception and isinstance(error, Exception):
            shot = self.rescued(error, failure)
            if shot is not None and (self.saved is None or shot.state.counters().step >= self.saved):
                try:
                    self.save(shot)
                    self.saver.wait()
                except Exception as second:  # the first error is the one to raise
                    annotate(error, f"ftrain: the checkpoint on exception could not be written: {second}")
                else:
                    failure.path = self.saver.path
        put(error, "ftrain", failure)  # found by whoever catches it

    def where(self, tick: Tick) -> tuple[int, int, int]:
        """The newest complete step, and epoch and position of the batch that is being worked on."""
        if self.attending is not None or tick.batch < 0:
            return tick.step, tick.epoch, max(tick.batch, 0)
        return (tick.step, tick.epoch + 1, 0) if tick.end else (tick.step, tick.epoch, tick.batch + 1)

    def settle(self, error: BaseException) -> None:
        """Let the save in the background come to its end, so that what is said about checkpoints is true."""
        if self.saver is None or self.saved is None:
            return
        try:
            self.saver.wait()
        except Exception as second:  # the first error is the one to raise
            annotate(error, f"ftrain: the checkpoint of step {self.saved} could not be written: {second}")
            self.saved = self.saver.newest()

    def newest(self, tick: Tick, given: TrainState | None, where: tuple[int, int, int]) -> Failure:
        """The newest state there is."""
        state = tick.state
        if not self.unchecked and valid(state):
            return Failure("step", lambda: state, tick.step, where)
        saver = self.saver
        saved = None if saver is None else saver.newest()
        kept = self.kept
        if kept is not None and (saved is None or kept.state.counters().step >= saved):
            return Failure("snapshot", lambda: kept.state, kept.state.counters().step, where)
        if saver is not None and saved is not None:
            step = saved
            found = Failure("checkpoint", lambda: saver.load(step), saved, where)
            found.path = saver.path
            return found
        if given is not None:
            return Failure("start", lambda: given, given.counters().step, where)
        return Failure(None, None, None, where)

    def rescued(self, error: Exception, failure: Failure) -> Snapshot | None:
        """What to save of a run that failed."""
        if isinstance(error, LossError):
            return None  # wrong from the start
        if failure.origin == "snapshot":
            return self.kept
        if failure.origin != "step":
            return None
        return self.snapshot(self.ended)

    def note(self, error: BaseException, given: TrainState | None) -> None:
        """Say where it happened (PEP 678)."""
        tick = self.tick
        if tick is None or tick.batch < 0:
            where = "before the first step was complete"
        else:
            batch = "the end of the epoch" if tick.end else f"batch {tick.batch}"
            where = f"after step {tick.step} was complete (epoch {tick.epoch}, {batch})"
        kept = "was given away (donate=True)" if given is None else "is unchanged"
        annotate(error, f"ftrain: raised in ft.fit, {where}. The state given to ft.fit {kept}.")

    def close(self, status: str, *, failed: bool) -> None:
        """Close what can be closed, each whatever the others do; the first failure is raised."""
        failures: list[BaseException] = []
        if self.saver is not None:
            try:
                self.saver.close(failed or self.signals.reason is not None)
            except Exception as error:
                failures.append(error)
        for _, source, _ in self.evaluators.values():
            source.close()
        for one in (self.progress, *self.sinks):
            close = getattr(one, "close", None)
            if close is not None:
                try:
                    close(status)
                except Exception as error:  # raised below, once all are closed
                    failures.append(error)
        if failures and not failed:  # else an error is on its way already
            tick = self.tick
            if tick is not None and valid(tick.state):
                state = tick.state
                put(failures[0], "ftrain", Failure("step", lambda: state, tick.step, self.where(tick)))
            raise failures[0]


def valid(state: TrainState) -> bool:
    """Whether a state's memory is its own still."""
    return "_donated_at" not in state.__dict__ and state._version == state.step._version


def put(error: BaseException, name: str, value: Any) -> None:
    """Set an attribute, also of an exception whose class refuses that (a frozen dataclass)."""
    BaseException.__setattr__(error, name, value)


def annotate(error: BaseException, note: str) -> None:
    """`add_note` for any exception."""
    put(error, "__notes__", [*getattr(error, "__notes__", ()), note])
