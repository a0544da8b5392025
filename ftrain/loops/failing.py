"""What an exception that leaves `fit` is told: where it happened, and the newest state that there is."""

from __future__ import annotations

from typing import Any

from ..state import TrainState
from ..types import Saver
from .snapshot import Failure, Snapshot
from .ticks import Tick

__all__ = ["annotate", "newest", "note", "put", "valid"]


def newest(
    tick: Tick,
    where: tuple[int, int, int],
    *,
    unchecked: bool,
    kept: Snapshot | None,
    saver: Saver | None,
    given: TrainState | None,
) -> Failure:
    """The newest state there is.

    Args:
        tick: the newest one.
        where: newest complete step, and epoch and position of the batch that is being worked on.
        unchecked: whether no step was seen to give a finite loss yet.
        kept: the copy of `fit(snapshot=...)`.
        saver: the checkpoints of the run.
        given: the state given to `fit`, where it is valid still.
    """
    state = tick.state
    if not unchecked and valid(state):
        return Failure("step", lambda: state, tick.step, where)
    saved = None if saver is None else saver.newest()
    if kept is not None and (saved is None or kept.state.counters().step >= saved):
        return Failure("snapshot", lambda: kept.state, kept.state.counters().step, where)
    if saver is not None and saved is not None:
        found = Failure("checkpoint", lambda: saver.load(saved), saved, where)
        found.path = saver.path
        return found
    if given is not None:
        return Failure("start", lambda: given, given.counters().step, where)
    return Failure(None, None, None, where)


def note(error: BaseException, tick: Tick | None, given: TrainState | None) -> None:
    """Say where it happened (PEP 678)."""
    if tick is None or tick.batch < 0:
        where = "before the first step was complete"
    else:
        batch = "the end of the epoch" if tick.end else f"batch {tick.batch}"
        where = f"after step {tick.step} was complete (epoch {tick.epoch}, {batch})"
    kept = "was given away (donate=True)" if given is None else "is unchanged"
    annotate(error, f"ftrain: raised in ft.fit, {where}. The state given to ft.fit {kept}.")


def valid(state: TrainState) -> bool:
    """Whether a state's memory is its own still."""
    return "_donated_at" not in state.__dict__ and state._version == state.step._version


def put(error: BaseException, name: str, value: Any) -> None:
    """Set an attribute, also of an exception whose class refuses that (a frozen dataclass)."""
    BaseException.__setattr__(error, name, value)


def annotate(error: BaseException, text: str) -> None:
    """`add_note` for any exception."""
    put(error, "__notes__", [*getattr(error, "__notes__", ()), text])
