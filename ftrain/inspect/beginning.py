"""Where a replay begins, as a checkpointer that only reads: at a checkpoint of the run, or at its first state.

Law: nothing is written to the folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.journal import Journal
from ..checkpoint.resuming import check_run, read_run
from ..errors import CheckpointError, RestoreError, explain
from ..loops.cadences import Cadence, Clock, Moment
from ..loops.snapshot import Snapshot
from ..state import TrainState

__all__ = ["Beginning", "Never"]


class Never(Cadence):
    """The cadence of what does not happen."""

    def fires(self, before: Clock | None, now: Clock) -> bool:
        return False

    def moments(self, now: Clock) -> list[Moment]:
        return []

    def __repr__(self) -> str:
        return "never"


class Beginning:
    """A checkpointer that hands out the nearest checkpoint before a step, and keeps nothing. See `ftrain.types.Saver`.

    Args:
        path: the folder of the run.
        at: the step that is to be come to.
        given: how many steps the state has taken that the run is given; where no checkpoint is near enough, it begins with that.

    Attributes:
        step: of the checkpoint; None: begin with the state that is given.
        begun: how many steps the state had taken with which the run began, where that is known.

    Raises:
        CheckpointError: there is no run in the folder, or neither a checkpoint nor the state lies before the step.
    """

    on_exception = on_signal = False

    def __init__(self, path: str, at: int, given: int) -> None:
        from ..checkpoint.store import Store

        self.path, self.every = path, Never()
        self.found: Snapshot | None = None
        self.begun: int | None = None
        with Store(path, write=False) as store:
            if not store.saved:
                raise store.nothing()
            documents = {step: document for step in store.saved if "run" in (document := store.document(step))}
            before = [step for step in documents if step < at]
            if not documents or not (before or given < at):
                raise _too_late(path, at, given, list(documents))
            self.step = before[-1] if before else None
            self._after = None if before else min(documents)
            # What the newest checkpoint knows of the journal is on the disk; what comes after it may be half a line.
            self._journal = Journal(Path(store.path) / "history.jsonl")
            self._size = documents[max(documents)]["run"]["journal"]

    def open(
        self,
        like: TrainState,
        *,
        resume: Any,
        facts: Mapping[str, Any],
        evaluators: Sequence[str],
        optimizers: Sequence[str] = (),
    ) -> Beginning:
        from ..checkpoint.store import Store

        about = {"data": dict(facts), "optimizers": list(optimizers)}
        with Store(self.path, write=False) as store:
            if self.step is not None:
                self.found, _ = read_run(store, self._journal, self.step, like, about)
                self.begun = self.found.notes["begin"][0]
            elif self._after is not None:
                check_run(store, self._after, like, about)
                try:
                    self.begun = store.plain(self._after)["notes"]["begin"][0]
                except CheckpointError:  # it is damaged; the run is begun without it, and its losses are compared
                    self.begun = None
        return self

    def check_first(self, step: int) -> None:
        """Raise unless this is the step at which the run began, where it is begun with the state that was given.

        Raises:
            RestoreError: it is another one, so that the batches would not be those of the run.
        """
        if self.step is None and self.begun is not None and step != self.begun:
            raise RestoreError(
                explain(
                    "ft.replay: this is not the state with which the run began.",
                    where=self.path,
                    expected=f"a state that has taken {self.begun} steps, since no checkpoint lies before the step",
                    got=f"one that has taken {step}",
                    fix="ft.replay(path, at, state, step, data, ...)   # with the state that ft.fit was given",
                )
            )

    def recorded(self, at: int) -> float | None:
        """The loss that the run recorded of this step alone; None where its records do not tell.

        Raises:
            CheckpointError: they cannot be read.
        """
        records = [one for one in self._journal.read(self._size) if one.split == "train" and "loss" in one.metrics]
        places = [i for i, one in enumerate(records) if one.step == at]
        if len(places) != 1:  # none; or a hook went back, and the step was done twice
            return None
        before = records[places[0] - 1].step if places[0] else self.begun
        loss = records[places[0]].metrics["loss"]
        return loss if before == at - 1 and isinstance(loss, float) else None

    def save(self, snapshot: Snapshot, /) -> None:
        """Nothing is written."""

    def amend(self, snapshot: Snapshot, /) -> None:
        """Nothing is written."""

    def undo(self, step: int, /) -> None:
        """Nothing is deleted."""

    def check_metrics(self, evaluator: str, metrics: Mapping[str, Any], /) -> None:
        """Nothing is kept, so nothing depends on a metric."""

    def newest(self) -> int | None:
        """None, that could be loaded for an exception."""
        return None

    def load(self, step: int, /) -> TrainState:
        raise AssertionError("newest() is None")

    def wait(self) -> None:
        """Nothing is on its way."""

    def close(self, cut: bool = False, /) -> None:
        """Nothing is open."""


def _too_late(path: str, at: int, given: int, runs: list[int]) -> CheckpointError:
    return CheckpointError(
        explain(
            f"ft.replay: there is no checkpoint before step {at}, from which it could be come to.",
            where=path,
            expected=f"the checkpoint of a run, of a step below {at}, or the state with which the run began",
            got=f"checkpoints of steps {', '.join(map(str, runs))}, and a state that has taken {given}"
            if runs
            else "states that ft.save put there",
            cause="the older ones were deleted" if runs else None,
            fix="ft.Checkpoints(path, every=ft.at(0) | ft.every(steps=100), keep=None)   # keeps all",
        )
    )
