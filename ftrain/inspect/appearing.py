"""The checkpoints of a folder that another process may be writing to: which are due, and what they hold. Only read, without a lock.

Laws
----
- A checkpoint that is there when it is looked for is given once; one that was deleted and made anew counts as another.
- One that is deleted before it was read as a whole is left out, with a warning. What is given is what was saved, bit by bit.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint.paths import Rename, Select
from ..checkpoint.restoring import choose
from ..checkpoint.store import Store
from ..errors import CheckpointError, CheckpointWarning, explain
from ..loops import Clock, Position
from ..state import TrainState

__all__ = ["Appearing", "Found", "Steps"]

Steps = Sequence[int] | str
COUNTERS = ("step", "epoch", "samples", "seed")


class Found(NamedTuple):
    """One checkpoint.

    Attributes:
        step: its step.
        state: what it holds.
        clock: how far the run was.
        ended: why the run is over after it, where a hook or the data said so.
    """

    step: int
    state: TrainState
    clock: Clock
    ended: str | None


class Appearing:
    """The checkpoints of a folder, as they appear.

    Args:
        path: the folder; it need not exist yet.
        steps: which: `"all"`, `"latest"`, `"best"`, or a list of steps.
        after: only those of later steps.
        by: the metric for `"best"`.
        mode: `"min"` or `"max"`.

    Raises:
        CheckpointError: the path is a file, or another program's folder.

    >>> import tempfile, torch, ftrain as ft
    >>> from ftrain.inspect.appearing import Appearing
    >>> state = ft.init(torch.nn.Linear(1, 1), ft.optim.sgd(0.1))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     found = Appearing(path, "all")
    ...     print(found.due())
    ...     ft.save(path, state, step=3)
    ...     print(found.due(), found.load(3, state).step, found.due())
    []
    [3] 3 []
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        steps: Steps = "all",
        *,
        after: int | None = None,
        by: str | None = None,
        mode: str = "min",
    ) -> None:
        self.path, self.steps, self.after, self.by, self.mode = path, steps, after, by, mode
        self.store = Store(path, write=False)
        self.there: dict[int, Any] = {}  # what tells the checkpoints that were there at the last look from others
        self.done: dict[int, Any] = {}  # the same of those that were given, or given up

    def look(self) -> list[int]:
        """The steps that there are and can be read, ascending."""
        saved, there = self._listed()
        if not self.there or any(there.get(step) != mark for step, mark in self.there.items()):
            # What the store knows of a step that is gone would be believed of one that comes in its place.
            self.store.close()
            self.store = Store(self.path, write=False)
            saved, there = self._listed()
        self.there = there
        return saved

    def due(self) -> list[int]:
        """The steps to be given now, ascending.

        Raises:
            RestoreError, LimitError: `"best"` of checkpoints of which none is the best.
            CheckpointError: one that was named is damaged.
        """
        saved = self.look()
        for step, cause in self.store.damaged.items():
            if self.wanted(step) and self.there.get(step) not in (None, self.done.get(step)):
                self._give_up(step, cause)
        if self.steps == "latest":
            saved = saved[-1:]
        elif self.steps == "best":
            saved = [choose(self.store, "best", self.by, self.mode)] if saved else []
        elif not isinstance(self.steps, str):
            for step in self.steps:
                if self.wanted(step) and step not in self.there and step not in self.done and saved[-1:] > [step]:
                    self._gone(step)
        return [step for step in saved if self.wanted(step) and self.done.get(step) != self.there[step]]

    def wanted(self, step: int) -> bool:
        """Whether a step is among those that are meant."""
        return (self.after is None or step > self.after) and (isinstance(self.steps, str) or step in self.steps)

    def complete(self) -> bool:
        """Whether all that were named were given, or given up; False where none is named."""
        return not isinstance(self.steps, str) and all(step in self.done for step in self.steps if self.wanted(step))

    def ended(self) -> str | None:
        """Why the run is over, where its newest checkpoint says so."""
        newest = max(self.there, default=None)
        try:
            document = {} if newest is None else self.store.document(newest)
        except CheckpointError:  # it is gone, or damaged: that is said where it is due
            return None
        ended: str | None = (document.get("run") or {}).get("ended")
        return ended

    def load(
        self,
        step: int,
        like: TrainState,
        *,
        select: Select | None = None,
        rename: Rename | None = None,
        cast: bool = False,
    ) -> Found | None:
        """A checkpoint that is due; None, with a warning, where it is gone. For the arguments see `ftrain.restore`.

        Raises:
            RestoreError: it is not like `like`.
            CheckpointError: it was named, and is damaged.
        """
        try:
            state, _ = self.store.load(step, like, select=select, rename=rename, cast=cast)
            if select is not None or rename is not None:
                state = self._counted(step, state)
            run = self.store.document(step).get("run") or {}
            plain = self.store.plain(step)
        except CheckpointError as error:
            if self.store.step_path(step).exists():
                self._give_up(step, str(error))
            else:
                self._gone(step)
            return None
        self.done[step] = self.there.get(step)
        counters = state.counters()
        if "position" in plain:
            clock = Position.of(plain["position"]).clock
        else:
            clock = Clock(step, counters.epoch, counters.samples)
        return Found(step, state, clock, run.get("ended"))

    def _counted(self, step: int, state: TrainState) -> TrainState:
        """A state with the counters and the seed of the checkpoint: evaluation draws its random numbers from them."""
        own: Mapping[str, Tensor] = {name: getattr(state, name) for name in COUNTERS}
        found, report = self.store.load(step, own, select=list(COUNTERS), strict=False)
        return state.replace(**{name: found[name] for name in report.taken})

    def _listed(self) -> tuple[list[int], dict[int, Any]]:
        """The steps that can be read, and what tells each that there is, damaged or not, from another of its number."""
        saved = self.store.saved
        there: dict[int, Any] = {}
        for step in [*saved, *self.store.damaged]:
            try:
                found = os.stat(self.store.step_path(step))
            except FileNotFoundError:
                continue  # deleted a moment ago
            there[step] = (found.st_ino, found.st_mtime_ns)
        return [step for step in saved if step in there], there

    def _gone(self, step: int) -> None:
        self.done[step] = self.there.get(step)
        warnings.warn(
            explain(
                f"the checkpoint of step {step} was deleted before it was read, and is left out.",
                where=str(self.store.step_path(step)),
                cause="what the run keeps: ft.Checkpoints(keep=...)",
                fix="keep=None, or ft.keep(latest=...) of more, in the run",
            ),
            CheckpointWarning,
            stacklevel=2,
        )

    def _give_up(self, step: int, cause: str) -> None:
        """A damaged checkpoint is an error where it was named, and left out where it was one among all."""
        if not isinstance(self.steps, str):
            raise CheckpointError(cause)
        self.done[step] = self.there.get(step)
        text = explain(
            f"the checkpoint of step {step} is damaged, and is left out.",
            where=str(self.store.step_path(step)),
            cause=cause.replace("\n  fix:", "\n  or:"),
        )
        warnings.warn(text, CheckpointWarning, stacklevel=2)
