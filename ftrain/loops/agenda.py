"""When something is due: the cadences of a run, asked together, and when it is worth asking them again.

Laws
----
- Nothing that is due is missed: between two questions no cadence can fire before one of the bounds of `due` is reached.
- A reason to stop is kept until the run has done what it does at least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .cadences import Cadence, Clock, Moment, bounds
from .calling import Hooks

__all__ = ["Agenda"]


class Agenda:
    """The cadences of one run.

    Args:
        hooks: those of the run; each is asked for its own moments.
        log: when training is recorded.
        evaluators: when each of the evaluators runs.
        snapshot: when a copy of the state is kept, if at all.
        at_least: before this fires, a hook's reason to stop is not heeded.
    """

    def __init__(
        self,
        hooks: Hooks,
        log: Cadence,
        evaluators: Sequence[Cadence] = (),
        *,
        snapshot: Cadence | None = None,
        at_least: Cadence | None = None,
    ) -> None:
        self.hooks, self.log, self.evaluators = hooks, log, tuple(evaluators)
        self.snapshot, self.at_least = snapshot, at_least
        self.saving: Cadence | None = None  # when checkpoints are made
        self.asked: Clock | None = None  # when the cadences were last asked
        # The first step at which one of them may fire, or a hook that is not called at every step; and the first second, sample
        # and token at which one may that waits for those.
        self.due = Moment(0.0, math.inf, math.inf, math.inf)
        self.back = False  # whether hooks went back since that was found out, so that some may fire sooner
        self.held: str | None = None  # a reason to stop that has to wait

    def reached(self, now: Clock) -> bool:
        """Whether it is time to ask."""
        step, second, sample, token = self.due
        return now.steps >= step or now.seconds >= second or now.samples >= sample or now.tokens >= token

    def close(self, now: Clock) -> None:
        """All was asked at this clock: find out when something may be due next."""
        self.asked = now
        moments = self.hooks.moments(self.hooks.before or now)
        for cadence in self._cadences():
            moments.extend(cadence.moments(now))
        self.due = bounds(moments, now)
        self.back = False

    def hold(self, stop: str | None, before: Clock | None, now: Clock) -> str | None:
        """A reason to stop, once the run has done what it does at least."""
        stop = self.held or stop
        if stop is None or self.at_least is None or self.at_least.fires(before, now):
            self.held = None
            return stop
        self.held = stop
        return None

    def saves(self, before: Clock | None, now: Clock) -> bool:
        """Whether a checkpoint is due."""
        return self.saving is not None and self.saving.fires(before, now)

    def waits(self, before: Clock | None, now: Clock) -> bool:
        """Whether something is due that waits for the epoch's end where this is its last step."""
        return self.log.fires(before, now) or self.saves(before, now)

    def _cadences(self) -> list[Cadence]:
        held = None if self.held is None else self.at_least
        found = [self.log, self.snapshot, self.saving, held, *self.evaluators]
        return [cadence for cadence in found if cadence is not None]
