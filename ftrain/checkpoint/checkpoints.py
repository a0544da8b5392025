"""`Checkpoints`: what `fit` saves to, when, and what is kept of it.

Laws
----
- A run that is stopped anywhere and goes on from its newest checkpoint ends in the state and the records of one that was not.
- Whatever happens while a checkpoint is being written or another is being deleted, the newest complete one can be restored.
- Nothing is deleted that was not written by this run.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CheckpointWarning, explain
from ..loops import Snapshot
from ..loops.cadences import Cadence
from ..loops.units import every
from ..sinks import Record
from ..state import TrainState
from .entries import Entry
from .journal import Journal
from .keeping import Keep, keep
from .resuming import damaged, read_run

if TYPE_CHECKING:
    from .store import Store

__all__ = ["Checkpoints"]


@dataclass(frozen=True)
class Checkpoints:
    """Where `fit` saves, when, and which checkpoints are kept. A folder holds the checkpoints of one run.

    A checkpoint has everything that the run needs to go on exactly: state, place in the data, metrics that were not recorded yet,
    memory of hooks, random streams, clocks and records. It is written in the background, from a copy in host memory. A run goes on
    with the model, optimizer, wrappers, hooks with memory, data and seed that it had; anything else is an error that lists what
    differs. (Not seen are another learning rate, another loss, or other data of the same size.)

    Args:
        path: the folder; made where there is none.
        every: when, e.g. `ft.every(steps=1000) | ft.every(seconds=600)`. What is due at the last step of an epoch is saved at the end
            of that epoch, after evaluation. The end of the run is saved, too.
        keep: which are kept, e.g. `ft.keep(latest=2) | ft.keep(best=3, by="val/loss")`; all others are deleted once a newer one is
            complete. None keeps all.
        on_exception: also save when an exception ends the run: its newest valid state, see `fit(snapshot=...)`.
        on_signal: also save when Ctrl-C, SIGTERM or SIGUSR1 ends the run.
        background: write while the training goes on; False: it waits.
        config: anything that JSON can hold, to be kept with each checkpoint.

    Raises:
        CheckpointError: the path is a file, or an argument is another kind of thing.

    >>> import tempfile, torch, ftrain as ft
    >>> model, tx = torch.nn.Linear(1, 1), ft.optim.sgd(0.1)
    >>> step = ft.train_step(model, lambda model, batch: model(batch).square().mean(), tx)
    >>> state, data = ft.init(model, tx), [torch.ones(4, 1)] * 5
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ckpt = ft.Checkpoints(folder, every=ft.every(steps=2), keep=ft.keep(latest=2))
    ...     quiet = {"progress": False, "compile": False, "checkpoint": ckpt, "resume": "auto"}
    ...     first = ft.fit(state, step, data, epochs=1, **quiet)
    ...     second = ft.fit(state, step, data, epochs=2, **quiet)
    ...     print([entry.step for entry in ckpt.entries()], second.state.counters().step)
    [8, 10] 10
    """

    path: str | os.PathLike[str]
    every: Cadence = field(default_factory=lambda: every(epochs=1))
    keep: Keep | None = field(default_factory=lambda: keep(latest=2))
    on_exception: bool = True
    on_signal: bool = True
    background: bool = True
    config: Any = None

    def __post_init__(self) -> None:
        for name, kind, good in (
            ("path", (str, os.PathLike), '"run/ckpt"'),
            ("every", Cadence, "every=ft.every(epochs=1)"),
            ("keep", (Keep, type(None)), "keep=ft.keep(latest=2)"),
            ("on_exception", bool, "on_exception=True"),
            ("on_signal", bool, "on_signal=True"),
            ("background", bool, "background=True"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise CheckpointError(
                    explain(
                        f"ft.Checkpoints: {name}={value!r} makes no sense.", got=type(value).__name__, fix=f"{good}"
                    )
                )
        if Path(self.path).exists() and not Path(self.path).is_dir():
            raise CheckpointError(
                explain(
                    "ft.Checkpoints: the path is a file.",
                    where=str(self.path),
                    expected="a folder, or nothing yet",
                    fix=f'ft.Checkpoints("{Path(self.path).parent / "checkpoints"}")',
                )
            )
        _check_config(self.config)

    def entries(self) -> list[Entry]:
        """What checkpoints there are, oldest first.

        >>> import tempfile, ftrain as ft
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ft.Checkpoints(folder).entries()
        []
        """
        if not Path(self.path).is_dir():
            return []
        from .store import Store

        store = Store(self.path, write=False)
        try:
            return [_entry(step, store.document(step)) for step in store.saved]
        finally:
            store.close()

    def open(
        self,
        like: TrainState,
        *,
        resume: Any,
        facts: Mapping[str, Any],
        evaluators: Sequence[str],
        optimizers: Sequence[str] = (),
    ) -> RunCheckpoints:
        """Begin a run, or go on with one; `fit` calls this.

        Raises:
            CheckpointError: the folder is another run's, is being written to, or has no such checkpoint.
            RestoreError: what is there is of another kind; the differences are listed.
        """
        _check_resume(resume)
        for name in () if self.keep is None else self.keep.by():
            evaluator, slash, _ = name.partition("/")
            if slash and evaluators and evaluator not in evaluators:
                raise CheckpointError(
                    explain(
                        f"ft.Checkpoints: what to keep depends on {name!r}, but there is no evaluator {evaluator!r}.",
                        expected=f"one of the evaluators: {', '.join(evaluators)}",
                        got=repr(self.keep),
                        fix=f'by="{evaluators[0]}/loss"',
                    )
                )
        from .store import Store

        store = Store(self.path, write=True)
        try:
            about = {"data": dict(facts), "optimizers": list(optimizers)}
            return RunCheckpoints(self, store, like, resume, about=about, evaluators=evaluators)
        except BaseException:
            store.close()
            raise


class RunCheckpoints:
    """The checkpoints of one run that goes on: a `ftrain.types.Saver`."""

    def __init__(
        self,
        given: Checkpoints,
        store: Store,
        like: TrainState,
        resume: Any,
        *,
        about: dict[str, Any],
        evaluators: Sequence[str],
    ) -> None:
        self.every, self.on_exception, self.on_signal = given.every, given.on_exception, given.on_signal
        self.path = store.path  # absolute: the process may change its folder
        self.given, self.store, self.like, self.about = given, store, like, about
        self.evaluators, self.warned = tuple(evaluators), False
        self.journal = Journal(Path(store.path) / "history.jsonl")
        self.written = 0  # records in the journal
        self.size = 0  # bytes in the journal
        self.names: set[str] = set()  # of the metrics that appeared
        self.found: Snapshot | None = None
        step = self._which(resume)
        self.entries = [_entry(one, store.document(one)) for one in store.saved]
        # What ft.save put here is the user's own, to keep and to delete.
        self.runs = {one for one in store.saved if "run" in store.document(one)}
        if step is None:
            self.journal.begin()
        else:
            self.found = self._restore(step)

    def save(self, snapshot: Snapshot) -> None:
        """Save a snapshot, delete what is not kept any more."""
        self._sweep()
        self.size = self.journal.append(snapshot.records[self.written :], self.size)
        for record in snapshot.records[self.written :]:
            self.names |= record.named().keys()
        self._look_for_metrics(snapshot.records[self.written :])
        self.written = len(snapshot.records)
        counters, clock = snapshot.state.counters(), snapshot.position.clock
        document = {
            "run": {
                "seed": counters.seed,
                "epoch": counters.epoch,
                "seconds": clock.seconds,
                "records": self.written,
                "journal": self.size,
                "ended": snapshot.ended,
                "metrics": _numbers(snapshot),
            },
            **self.about,
            "config": self.given.config,
        }
        plain = {"position": snapshot.position.plain(), "notes": dict(snapshot.notes)}
        self.store.save(counters.step, snapshot.state, document, plain=plain, block=not self.given.background)
        self.entries.append(_entry(counters.step, document))
        self.runs.add(counters.step)

    def _look_for_metrics(self, records: Sequence[Record]) -> None:
        """Say early that what is kept goes by a metric that training does not give. No error, since a hook may give it later."""
        if self.warned or self.given.keep is None or not any(record.split == "train" for record in records):
            return
        self.warned = True
        for name in self.given.keep.by():
            if name not in self.names and name.partition("/")[0] not in self.evaluators:
                near = difflib.get_close_matches(name, sorted(self.names), n=1, cutoff=0.0)
                warnings.warn(
                    explain(
                        f"ft.Checkpoints: the best are kept by {name!r}, which is not among the metrics so far.",
                        expected=f"one of: {', '.join(sorted(self.names))}",
                        got=repr(self.given.keep),
                        fix=f'by="{near[0]}"' if near else None,
                    ),
                    CheckpointWarning,
                    stacklevel=2,
                )

    def amend(self, snapshot: Snapshot) -> None:
        """Give the checkpoint of this step the metrics that it could not have, since its evaluation was interrupted."""
        from .store import RESERVED

        step = snapshot.state.counters().step
        if step in self.store.foreign:
            return
        document = {name: part for name, part in self.store.document(step).items() if name not in RESERVED}
        document["run"] = {**document["run"], "metrics": _numbers(snapshot)}
        self.store.amend(step, document)
        self.entries = [_entry(step, document) if entry.step == step else entry for entry in self.entries]

    def undo(self, step: int) -> None:
        """Delete what this run saved of steps after this one, the newest first: they did not happen."""
        self.store.wait()
        for one in [one for one in reversed(self.store.saved) if one > step]:
            if one in self.runs and one not in self.store.foreign:
                self.store.delete(one)
                self.entries = [entry for entry in self.entries if entry.step != one]
                self.runs.discard(one)

    def check_metrics(self, evaluator: str, metrics: Mapping[str, Any]) -> None:
        """Raise where what to keep goes by a metric of this evaluator that it does not give."""
        if self.given.keep is not None:
            self.given.keep.check(self.names | {f"{evaluator}/{name}" for name in metrics})

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        saved = self.store.saved
        return saved[-1] if saved else None

    def load(self, step: int) -> TrainState:
        """The state of a checkpoint."""
        state, _ = self.store.load(step, self.like)
        restored: TrainState = state
        return restored

    def wait(self) -> None:
        """Return when all that was saved is complete."""
        self.store.wait()

    def close(self, cut: bool = False) -> None:
        """Wait, delete what is not kept, and let others write to the folder."""
        try:
            self.store.wait()
            self._sweep()
        finally:
            self.store.close()
        if cut or self.given.keep is None or not self.entries:
            return
        for name in self.given.keep.by():
            if not any(name in entry.metrics for entry in self.entries):
                seen = sorted({found for entry in self.entries for found in entry.metrics})
                warnings.warn(
                    explain(
                        f"ft.Checkpoints: no checkpoint has the metric {name!r}, so none was kept for being the best.",
                        expected="checkpoints at the steps at which it is evaluated",
                        got=f"checkpoints with {', '.join(seen) or 'no metrics'}",
                        fix="Checkpoints(every=...) and Evaluator(every=...) of the same cadence",
                    ),
                    CheckpointWarning,
                    stacklevel=3,
                )

    def _sweep(self) -> None:
        """Delete what is not kept. Only of what is complete, so that the newest is never waited for."""
        if self.given.keep is None:
            return
        complete = set(self.store.saved) - set(self.store.foreign)
        known = [entry for entry in self.entries if entry.step in complete and entry.step in self.runs]
        kept = self.given.keep.kept(known)
        for entry in known:
            if entry.step not in kept:
                self.store.delete(entry.step)
                self.entries.remove(entry)

    # -- going on -------------------------------------------------------------------------------------------------------------

    def _which(self, resume: Any) -> int | None:
        """The step to go on with."""
        saved = self.store.saved
        for broken, cause in self.store.damaged.items():
            raise damaged(self.store, broken, saved, cause)
        if resume is None:
            if saved:
                raise CheckpointError(
                    explain(
                        "the folder has checkpoints of a run already, and this one would begin anew.",
                        where=self.path,
                        expected='a folder without checkpoints, or resume="auto"',
                        got=f"checkpoints at steps {_listed(saved)}",
                        fix='ft.fit(..., resume="auto")   # goes on with it\n'
                        f'ft.Checkpoints("{self.path}-2")   # or begin elsewhere',
                    )
                )
            return None
        if not saved:
            if resume == "auto":
                return None
            raise CheckpointError(
                explain(
                    f"ft.fit: resume={resume!r}, but there are no checkpoints.",
                    where=self.path,
                    got="an empty folder",
                    fix='resume="auto"   # begins where there is none',
                )
            )
        if resume in ("auto", "latest"):
            return saved[-1]
        step = int(resume)
        if step not in saved:
            raise CheckpointError(
                explain(
                    f"ft.fit: there is no checkpoint of step {step}.",
                    where=self.path,
                    expected=f"one of {_listed(saved)}",
                    got=f"resume={resume!r}",
                )
            )
        if step != saved[-1]:
            raise CheckpointError(
                explain(
                    f"ft.fit: the checkpoint of step {step} is not the newest, and going on from it would mix two runs.",
                    where=self.path,
                    expected=f"step {saved[-1]}, the newest",
                    got=f"resume={resume!r}",
                    fix=f"shutil.copytree({str(self.store.step_path(step))!r}, {self.path + '-fork/' + str(step)!r})\n"
                    f"shutil.copy({str(self.journal.path)!r}, {self.path + '-fork'!r})\n"
                    f'ft.Checkpoints("{self.path}-fork"), resume="latest"   # goes on from there, as a run of its own',
                )
            )
        return step

    def _restore(self, step: int) -> Snapshot:
        found, self.size = read_run(self.store, self.journal, step, self.like, self.about)
        self.written = len(found.records)
        self.journal.cut(self.size)
        for record in found.records:
            self.names |= record.named().keys()
        return found


def _numbers(snapshot: Snapshot) -> dict[str, float]:
    return {name: value for name, value in snapshot.metrics().items() if isinstance(value, (int, float))}


def _entry(step: int, document: Mapping[str, Any]) -> Entry:
    run = document.get("run") or {}
    return Entry(
        step, run.get("epoch", 0), run.get("seconds", 0.0), run.get("metrics") or document.get("metrics") or {}
    )


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "...", *shown[-8:]])


def _check_resume(resume: Any) -> None:
    whole = isinstance(resume, int) and not isinstance(resume, bool)
    if resume is not None and resume not in ("auto", "latest") and not whole:
        raise CheckpointError(
            explain(
                f"ft.fit: resume={resume!r} makes no sense.",
                expected='"auto", "latest", a step, or None',
                got=type(resume).__name__,
                fix='resume="auto"',
            )
        )


def _check_config(config: Any) -> None:
    import json

    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            explain(
                "ft.Checkpoints: the config cannot be written as JSON.",
                expected="dicts, lists, numbers, texts",
                got=str(error),
                fix="config=dataclasses.asdict(config)",
            )
        ) from None
