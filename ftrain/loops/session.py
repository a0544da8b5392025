"""What `fit` keeps while it runs: records, metrics that are not recorded yet, what is due and when; and how it goes on elsewhere.

Law: a session that took over another's snapshot does what that one would have done.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import rng
from ..data import Epochs
from ..errors import LossError, explain
from ..sinks import History, Record
from ..state import TrainState
from ..steps.compile import CompiledStep
from ..types import Saver
from .agenda import Agenda
from .cadences import Cadence, Clock
from .calling import Hooks
from .evaluate import Prepared, Stopped, run, with_params
from .events import Event
from .failing import annotate, newest, note, put, valid
from .limits import Limits
from .loop import loop
from .meter import pack_metrics, unpack_metrics
from .position import Position
from .recording import Recorder
from .signals import Signals
from .snapshot import Failure, Snapshot
from .ticks import Tick

__all__ = ["Session"]

_LIMITS = ("epochs", "steps", "until")
Sink = Callable[[Record], None]
Attended = tuple[TrainState, str | None]  # the state to go on with, and a reason to stop


class Session:
    """One call of `fit`."""

    def __init__(
        self,
        log: Cadence,
        evaluators: dict[str, Prepared],
        hooks: Hooks,
        sinks: Sequence[Sink],
        *,
        snapshot: Cadence | None = None,
        signals: Signals,
        streams: rng.Isolated,
        at_least: Cadence | None = None,
        tokens: Callable[[Any], int] | None = None,
    ) -> None:
        self.evaluators, self.hooks, self.told = evaluators, hooks, Recorder(sinks)
        cadences = [one.every for one in evaluators.values()]
        self.agenda = Agenda(hooks, log, cadences, snapshot=snapshot, at_least=at_least)
        self.signals, self.streams, self.tokens = signals, streams, tokens
        self.saver: Saver | None = None
        self.began = time.perf_counter()
        self.begin = (0, 0)  # the state's counts of steps and samples when the run began
        self.done = 0  # epochs completed in this run
        self.final = False  # whether this is the last step of its epoch, where something that is due depends on it
        self.ended: str | None = None  # why the run is over, where a hook or the data said so
        self.owed = False  # a checkpoint that was due at the last step of an epoch, and is made at the epoch's end
        self.tick: Tick | None = None
        self.start = Position(0)  # where this process began
        self.step: Any = None
        self.source: Any = None
        self.unchecked = True
        self.spoilt: LossError | None = None  # the first loss is not finite, and a hook may know what to do
        self.undone = False  # whether hooks went back, and what was kept of the steps in between is there still
        # What is happening at this tick, and what was there before it: where it does not come to its end, it is done again.
        self.attending: str | None = None
        self.before: tuple[dict[str, Any], Clock | None] = ({}, None)
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
            self.attending = "start"  # whoever goes on from here begins with it
            if self.rehearse(state):
                state, reason = self.attend(self.tick, "start")
            else:
                reason = self.signals.reason
        else:
            self.start = found.position
            state, reason = self.take_over(found)
            assert self.tick is not None, "it was taken over"
            # What was pending was done by now, and hooks may have gone back in it.
            position = dataclasses.replace(found.position, clock=self.clock(self.tick))
        if reason is None:
            reason = self.turn(state, step, source, limits, position)
        tick = self.tick
        assert tick is not None, "it was set above"
        state = tick.state
        signalled = self.signals.reason is not None and reason == self.signals.reason
        if self.saver is not None and (self.saver.on_signal or not signalled):
            # A limit is looked at anew by whoever goes on; what a hook or the data said holds.
            with self.told.spent.on("checkpoint"):
                saved = self.save(self.snapshot(None if signalled else self.ended))
            if saved:
                self.look(state, "saved", tick)
        last = History(self.told.records).last()
        if self.hooks.listens("end", self.clock(tick)):
            state, _ = self.happens(tick, state, "end", metrics=last, reason=reason)
        for record in self.record(tick):
            self.told.add(record)
        return state, reason

    def rehearse(self, state: TrainState) -> bool:
        """The evaluations that are tried before the first step; False where a signal ended them."""
        try:
            for name, one in self.evaluators.items():
                if one.sanity:
                    limit = one.sanity if one.limit is None else min(one.sanity, one.limit)
                    self.evaluate(state, name, one._replace(limit=limit))
        except Stopped:
            return False
        return True

    def evaluate(self, state: TrainState, name: str, one: Prepared) -> dict[str, Any]:
        """What one evaluator gives; raises where the run depends on a metric that is not among it."""
        own = with_params(state, one.step, one.params, f"the evaluator {name!r}")
        metrics = run(own, one.step, one.source, f"the evaluator {name!r}", signals=self.signals, limit=one.limit)
        if self.saver is not None:
            self.saver.check_metrics(name, metrics)
        return metrics

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
            tokens=self.tokens,
            epoch_ends=True,
            start=position,
        )
        begin, add, steady, show, signals = (
            self.begin[0],
            self.told.meter.add,
            self.hooks.steady,
            self.told.progress,
            self.signals,
        )
        agenda, first, refresh = self.agenda, self.begin[1], math.inf if show is None else time.perf_counter()
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
                step_, second, sample, token = agenda.due
                if (
                    steady
                    or tick.end
                    or tick.step - begin >= step_
                    or tick.samples - first >= sample
                    or tick.tokens >= token
                    or (second < math.inf and self.seconds() >= second)
                ):
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
        now, before = self.clock(tick), self.agenda.asked
        self.attending, self.hooked, self.before = kind, hooked, (self.told.extra, self.hooks.before)
        due = kind != "step" or hooked is not None or self.agenda.reached(now)
        if tick.ran():  # else the session before has found out
            self.final = due and kind == "step" and self.agenda.waits(before, now) and tick.last()
        if hooked is None:
            hooked, asked = (tick.state, None), now
            ask = due or self.agenda.back
            if self.hooks and self.hooks.listens(kind, now, due=ask):
                hooked = self.happens(tick, tick.state, kind, now, due=ask, metrics=tick.metrics)
                if due or hooked[0] is not tick.state or hooked[1] is not None:
                    now = self.clock(tick)
                    asked = now._replace(seconds=asked.seconds)  # what fell due while the hooks ran comes the next time
            spoilt, self.spoilt = self.spoilt, None
            if spoilt is not None and not self.undone and hooked[1] is None:
                raise spoilt
            self.hooks.passed(asked)
            self.hooked, self.before = hooked, (self.told.extra, self.hooks.before)
        state, stop = hooked
        if not (due or stop or self.undone):  # a hook that is called at every step was, and that was all
            self.attending, tick.state = None, state
            return state, None
        return self.evaluated(tick, kind, before, now, hooked)

    def evaluated(self, tick: Tick, kind: str, before: Clock | None, now: Clock, hooked: Attended) -> Attended:
        """The second half of `attend`: from the evaluation on."""
        state, stop = hooked
        due = {name: one for name, one in self.evaluators.items() if one.every.fires(before, now)}
        if due and self.told.progress is not None and before is not None:
            self.told.progress.refresh(tick.step, self.epochs(tick), tick.samples, now.seconds)
        results: list[Record] = []
        try:
            with self.told.spent.on("evaluation"):
                for name, one in due.items():
                    metrics = self.evaluate(state, name, one)
                    results.append(self.tell(tick, name, metrics))
        except Stopped:  # by a signal: whoever goes on begins with the evaluation
            return state, self.signals.reason
        if results and self.hooks.listens("evaluation", now):
            named = {name: value for record in results for name, value in record.named().items()}
            state, why = self.happens(tick, state, "evaluation", metrics=named)
            stop = stop or why
            # What falls due while this goes on comes the next time; only a hook that went back changes the moment.
            now = self.clock(tick)._replace(seconds=now.seconds)
        records = self.recorded(tick, kind, before, now) + results
        self.told.records.extend(records)
        stop = self.agenda.hold(stop, before, now)
        self.attending, self.ended = None, stop
        tick.state = state
        self.agenda.asked = now
        with self.told.spent.on("checkpoint"):
            saved = self.preserve(tick, kind, before, now, stop)
        if saved:
            self.look(state, "saved", tick)
        self.agenda.close(now)
        for record in records:
            self.told.emit(record)
        return state, stop

    def recorded(self, tick: Tick, kind: str, before: Clock | None, now: Clock) -> list[Record]:
        """The record of training that is due now. That of an epoch's last step is made at the epoch's end, which comes next."""
        if before is None or not (tick.end or self.agenda.log.fires(before, now)):
            return []
        return [] if self.final else self.record(tick)

    def preserve(self, tick: Tick, kind: str, before: Clock | None, now: Clock, stop: str | None) -> bool:
        """The checkpoint and the copy that are due now; gives whether a checkpoint was made."""
        saved, undone = False, self.undone
        self.undone = False
        if undone:
            self.undo(tick.step)
        if self.saver is not None and (self.owed or undone or self.agenda.saves(before, now)):
            self.owed = self.final
            if not self.owed:
                saved = self.save(self.snapshot(stop))
        copying = self.agenda.snapshot
        if copying is not None and copying.fires(before, now):
            shot = self.snapshot(stop)
            self.kept = Snapshot(shot.state.copy(), shot.position, shot.notes, tuple(shot.records), shot.ended)
        return saved

    def undo(self, step: int) -> None:
        """Let go of what was kept of steps that did not happen."""
        if self.kept is not None and self.kept.state.counters().step > step:
            self.kept = None
        if self.saver is not None and self.saved is not None and self.saved > step:
            self.saver.undo(step)
            self.saved = self.saver.newest()

    def happens(
        self, tick: Tick, state: TrainState, kind: str, now: Clock | None = None, *, due: bool = True, **about: Any
    ) -> Attended:
        """Call the hooks; where one goes back to an earlier state, the steps in between did not happen."""
        with self.told.spent.on("hooks"):
            new, metrics, stop = self.hooks(state, self.event(kind, tick, now, **about), due=due)
        if new.step is not state.step or new.samples is not state.samples:
            step, _, samples, _ = new.counters()
            if step < tick.step and kind != "start":
                self.told.meter.drop(tick.step - step)
                self.agenda.back = self.undone = True
            tick.step, tick.samples = step, samples
            if kind == "start":  # this is where the run begins
                self.begin = (step, samples)
        if metrics:
            self.told.take(metrics)
        return new, stop

    def look(self, state: TrainState | None, kind: str, tick: Tick, **about: Any) -> None:
        """Call the hooks that want to see this; they cannot change anything."""
        if self.hooks.listens(kind, self.clock(tick)):
            path = None if self.saver is None else self.saver.path
            with self.told.spent.on("hooks"):
                self.hooks(state, self.event(kind, tick, path=path, **about))  # type: ignore[arg-type]

    def event(
        self, kind: str, tick: Tick, now: Clock | None = None, *, metrics: Mapping[str, Any] | None = None, **about: Any
    ) -> Event:
        epochs, now = self.epochs(tick), self.clock(tick) if now is None else now
        frozen = types.MappingProxyType(metrics or {})
        about["evaluators"] = tuple(self.evaluators)
        return Event(kind, tick.step, epochs, tick.samples, now, frozen, tokens=tick.tokens, **about)

    def clock(self, tick: Tick) -> Clock:
        steps, samples = tick.step - self.begin[0], tick.samples - self.begin[1]
        return Clock(steps, self.done, samples, self.seconds(), tick.tokens, 0 if tick.end else tick.batch + 1)

    def epochs(self, tick: Tick) -> int:
        return tick.epoch + 1 if tick.end else tick.epoch

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def record(self, tick: Tick) -> list[Record]:
        """Bring the metrics since the last record to the host."""
        return self.told.make(functools.partial(self.tell, tick, "train"), tick.waited, self.seconds())

    def tell(self, tick: Tick, split: str, metrics: Mapping[str, Any], **times: Any) -> Record:
        epochs, seconds = self.epochs(tick), self.seconds()
        return Record(tick.step, epochs, tick.samples, seconds, split, metrics, tokens=tick.tokens, **times)

    # -- as a value -----------------------------------------------------------------------------------------------------------

    def position(self, tick: Tick) -> Position:
        """Where the run goes on after this tick."""
        position = tick.position() if tick.ran() else self.start
        return dataclasses.replace(position, clock=self.clock(tick))

    def snapshot(self, ended: str | None = None) -> Snapshot:
        """The run as it is now. What is happening at this tick, if anything is, will be done again by whoever goes on."""
        tick = self.tick
        assert tick is not None, "a run has a tick from its start on"
        extra, hooks = (self.told.extra, self.hooks.before) if self.attending is None else self.before
        state, pending = tick.state, None
        if self.attending is not None:
            pending = {"kind": self.attending, "metrics": pack_metrics(tick.metrics), "final": self.final}
            pending["hooked"] = self.hooked is not None
            if self.hooked is not None:
                state, pending["stop"] = self.hooked
        asked = self.agenda.asked
        notes = {
            "told": self.told.plain(extra, tick.waited),
            "asked": None if asked is None else asked._asdict(),
            "hooks": None if hooks is None else hooks._asdict(),
            "held": self.agenda.held,
            "owed": self.owed,
            "unchecked": self.unchecked,
            "streams": self.streams.state(),
            "pending": pending,
            "begin": list(self.begin),
            "shapes": self.step.shapes() if isinstance(self.step, CompiledStep) else [],
        }
        return Snapshot(state, self.position(tick), notes, self.told.records, ended)

    def take_over(self, found: Snapshot) -> tuple[TrainState, str | None]:
        """Go on where another session was; gives the state and, where that one was at its end, the reason."""
        notes, clock, counters = found.notes, found.position.clock, found.state.counters()
        device = found.state.device
        self.begin = (counters.step - clock.steps, counters.samples - clock.samples)
        self.done, self.began = clock.epochs, time.perf_counter() - clock.seconds
        self.told.resume(notes["told"], found.records, device)
        asked = None if notes["asked"] is None else Clock(**notes["asked"])
        self.agenda.asked, self.agenda.held = asked, notes["held"]
        self.hooks.passed(None if notes["hooks"] is None else Clock(**notes["hooks"]))
        self.owed, self.unchecked = notes["owed"], notes["unchecked"]
        self.streams.take(notes["streams"])
        self.saved = counters.step
        if isinstance(self.step, CompiledStep):
            self.step.rehearse(notes["shapes"])
        pending = notes["pending"]
        self.unsettled = pending is not None
        end = pending is not None and pending["kind"] == "epoch"
        epoch = counters.epoch - 1 if end else counters.epoch
        batch = found.position.data["batch"] - 1
        tick = Tick(found.state, {}, counters.step, epoch, counters.samples, batch, end=end, tokens=clock.tokens)
        self.tick = tick
        if pending is None:
            if asked is not None:
                self.agenda.close(asked)
            self.ended = found.ended
            return found.state, found.ended
        tick.metrics = unpack_metrics(pending["metrics"], device)
        counted = found.position.data["batch"] == self.source.length
        self.final = pending["kind"] == "step" and (pending["final"] or counted)
        return self.attend(tick, pending["kind"], (found.state, pending["stop"]) if pending["hooked"] else None)

    def save(self, shot: Snapshot) -> bool:
        """Hand a snapshot to the checkpointer, unless there is one of this step or (where hooks went back) a later one."""
        step = shot.state.counters().step
        if self.saver is None:
            return False
        fresh = self.saved is None or step > self.saved
        if fresh:
            self.saver.save(shot)
            self.saved = step
        elif step == self.saved and self.unsettled and self.attending is None:
            self.saver.amend(shot)
        self.unsettled = self.attending is not None
        return fresh

    def first_loss(self, tick: Tick) -> None:
        """The one look at a value before the first log point: a run that begins with NaN is wrong from the start."""
        loss = tick.metrics.get("loss")
        value = None if loss is None else float(loss.compute())  # sync: once in a run
        if value is None or math.isfinite(value):
            self.unchecked = False
            return
        if guarded((tick.state.opt, tick.state.extra)):
            return  # the step skips such batches by itself; the next loss is the first one
        error = LossError(
            explain(
                f"the loss is {value} at the first step.",
                where=f"step {tick.step}, the first batch",
                expected="a finite number",
                cause="inputs that are not normalised or hold NaN, a log or division by zero, or half precision",
                fix="loss_fn(ft.to_module(model, state), batch)   # look at it eagerly, with torch.autograd.set_detect_anomaly",
            )
        )
        if not self.hooks.steady:
            raise error
        self.spoilt = error

    # -- when it goes wrong ---------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, given: TrainState | None) -> None:
        """Let an exception carry the newest state that is valid; and save it, where that is asked for."""
        tick = self.tick
        note(error, tick, given)
        if tick is None:
            return
        self.settle(error)
        found = {"unchecked": self.unchecked, "kept": self.kept, "saver": self.saver, "given": given}
        failure = newest(tick, self.where(tick), **found)  # type: ignore[arg-type]
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
        self.witness(error, failure, tick)

    def witness(self, error: BaseException, failure: Failure, tick: Tick) -> None:
        """Let the hooks see that the run failed, with the newest state that is in memory."""
        now = self.clock(tick)
        if self.hooks.listens("exception", now):
            state = None if failure.origin == "checkpoint" else failure.state
            path = None if self.saver is None else self.saver.path
            for second in self.hooks.witness(state, self.event("exception", tick, now, path=path, error=error)):
                annotate(
                    error, f"ftrain: a hook failed at the 'exception' event: {second}"
                )  # the first is the one to raise

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

    def rescued(self, error: Exception, failure: Failure) -> Snapshot | None:
        """What to save of a run that failed."""
        if isinstance(error, LossError):
            return None  # wrong from the start
        if failure.origin == "snapshot":
            return self.kept
        if failure.origin != "step":
            return None
        return self.snapshot(self.ended)

    def close(self, status: str, *, failed: bool) -> None:
        """Close what can be closed, each whatever the others do; the first failure is raised."""
        failures: list[BaseException] = []
        if self.saver is not None:
            try:
                self.saver.close(failed or self.signals.reason is not None)
            except Exception as error:
                failures.append(error)
        for evaluator in self.evaluators.values():
            evaluator.source.close()
        for one in (self.told.progress, *self.told.sinks):
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


def guarded(node: Any) -> bool:
    """Whether a part of a state counts batches that were skipped: of `with_skip`, `skip_nonfinite`, a loss scale."""
    if isinstance(node, tuple) and "skipped" in getattr(node, "_fields", ()):
        return True
    children = node.values() if isinstance(node, dict) else node if isinstance(node, (tuple, list)) else ()
    return any(guarded(child) for child in children)
