"""A run as a checkpoint has it: the value from which `fit` goes on, and the errors where it cannot. Nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, RestoreError, explain
from ..loops import Position, Snapshot
from ..state import TrainState
from .journal import Journal

if TYPE_CHECKING:
    from .store import Store

__all__ = ["check_run", "damaged", "read_run"]


def read_run(
    store: Store, journal: Journal, step: int, like: TrainState, about: Mapping[str, Any]
) -> tuple[Snapshot, int]:
    """The run at a checkpoint, and how many bytes of the journal are its records.

    Args:
        store: the folder.
        journal: the records of the run.
        step: which checkpoint.
        like: a state of the kind that the run has.
        about: `data`, the facts of the data, and `optimizers`, the rules, of the run that is to go on.

    Raises:
        RestoreError: the checkpoint holds no run, or one of another kind; the differences are listed.
        CheckpointError: it is damaged.
    """
    check_run(store, step, like, about)
    run = store.document(step)["run"]
    try:
        (state, _), plain = store.load(step, like), store.plain(step)
    except CheckpointError as error:
        raise damaged(store, step, store.saved, str(error)) from error
    records = journal.read(run["journal"])
    return Snapshot(state, Position.of(plain["position"]), plain["notes"], records, run["ended"]), run["journal"]


def check_run(store: Store, step: int, like: TrainState, about: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint is of the run that is to go on. Arguments as for `read_run`.

    Raises:
        RestoreError: the checkpoint holds no run, or one of another kind; the differences are listed.
        CheckpointError: its record is damaged.
    """
    document = store.document(step)
    run = document.get("run")
    if run is None:
        raise RestoreError(
            explain(
                "this checkpoint holds a state, but no run that could go on.",
                where=f"{store.path}, step {step}",
                cause="it was written by ft.save",
                fix=f"state = ft.restore({store.path!r}, like=state); ft.fit(state, ..., checkpoint=ft.Checkpoints(other))",
            )
        )
    differences = [
        f"{name}: {there!r} in the checkpoint, {here!r} now"
        for name, there, here in (
            ("seed", run["seed"], like.counters().seed),
            *(
                (f"data {name}", document["data"].get(name), about["data"].get(name))
                for name in dict.fromkeys((*document["data"], *about["data"]))
            ),
        )
        if there != here
    ]
    rules, ours = document["optimizers"], about["optimizers"]
    if rules and ours and rules != ours:  # none is known of a step that was written by hand
        differences.append(f"optimizer: {', '.join(rules)} in the checkpoint, {', '.join(ours)} now")
    report = store.compare(step, like)
    if differences or not report.fits:
        lines = [*differences, *report.differences()]
        raise RestoreError(
            explain(
                "the checkpoint is of another run: it cannot go on with this state and data.",
                where=f"{store.path}, step {step}",
                got="\n".join(lines),
                cause="another model, optimizer, dataset or seed than the one that was saved",
                fix="ft.Checkpoints(other_path)   # begin a new run, from ft.restore(path, like=..., strict=False) perhaps",
            )
        )


def damaged(store: Store, step: int, saved: Sequence[int], cause: str) -> CheckpointError:
    """The error for a checkpoint that should have been gone on from."""
    before = [one for one in saved if one < step]
    return CheckpointError(
        explain(
            f"the run cannot go on with the checkpoint of step {step}, which is damaged.",
            where=str(store.step_path(step)),
            cause=cause.split("\n  fix:", maxsplit=1)[0],
            fix=f"shutil.rmtree({str(store.step_path(step))!r})   # "
            + (f"then it goes on with step {before[-1]}" if before else "there is no earlier one, so it begins anew"),
        )
    )
