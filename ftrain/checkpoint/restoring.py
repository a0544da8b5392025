"""`restore` and `compare`: from a checkpoint into a tree of the same kind."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import RestoreError, RestoreWarning, explain
from ..state import TrainState, check_state
from .entries import Entry, best
from .paths import Rename, Select
from .report import Report

if TYPE_CHECKING:
    from .store import Store

__all__ = ["choose", "compare", "restore"]


def restore(
    path: str | os.PathLike[str],
    *,
    like: Any,
    step: int | str = "latest",
    by: str | None = None,
    mode: str = "min",
    select: Select | None = None,
    rename: Rename | None = None,
    strict: bool = True,
    cast: bool = False,
    report: Callable[[Report], object] | None = None,
) -> Any:
    """Restore a checkpoint into a tree of the same kind as `like`: structure, devices, dtypes and memory layout.

    The paths of leaves are their keys joined with `/`: `params/fc.weight`, `opt/0/mu/fc.weight`, `step`;
    `print(ft.checkpoint.compare(path, like=state))` shows what differs, without reading any array.

    Args:
        path: a folder of checkpoints.
        like: a state or any pytree. Its values are not used (it may lie on the meta device, then the result lies on the CPU), but for
            the leaves that are not taken from the checkpoint. It is not changed.
        step: a step, `"latest"`, or `"best"` by a metric.
        by: the metric for `"best"`; may be left out where the checkpoints have only one.
        mode: `"min"` or `"max"`. NaN is worse than any number; of equals the newer is the better.
        select: which leaves of `like` are taken from the checkpoint, the others stay as they are: patterns as in `fnmatch` (a name
            stands for all below it: `"params"`), or a predicate `path -> bool`. Where `like` is one part of what was saved, its
            name: `restore(path, like=state.params, select="params")`.
        rename: what the leaves of the checkpoint are called in `like`: `{"params/encoder.*": "params/backbone.*"}` for paths,
            subtrees and patterns, or a function `path -> path`; None drops a leaf.
        strict: any difference is an error, before anything is read. False: what fits is taken.
        cast: convert a tensor whose dtype differs; else that is a difference.
        report: called with the `Report`, in place of the warning.

    Returns:
        A tree like `like`, in memory of its own but for leaves that were not taken.

    Raises:
        RestoreError: the differences, all of them; or `select`, `rename`, `step` or `by` make no sense.
        CheckpointError: there is no such step (those that there are are named), or it is damaged.
        LimitError: no checkpoint has the metric `by`, or an unknown mode.

    Warns:
        RestoreWarning: with `strict=False`, where something was left out.

    >>> import tempfile, torch, ftrain as ft
    >>> state = ft.init(torch.nn.Linear(3, 2), ft.optim.sgd(0.1), seed=0)
    >>> with tempfile.TemporaryDirectory() as path:
    ...     ft.save(path, state)
    ...     other = ft.init(torch.nn.Linear(3, 2), ft.optim.adam(0.1), seed=1)
    ...     warm = ft.restore(path, like=other, select="params")
    >>> torch.equal(warm.params["weight"], state.params["weight"]), warm.seed.item()
    (True, 1)
    """
    with _opened(path, like, "ft.restore") as store:
        chosen = choose(store, step, by, mode)
        made, found = store.load(chosen, like, select=select, rename=rename, strict=strict, cast=cast)
    if report is not None:
        report(found)
    elif not found.fits:
        warnings.warn(str(found), RestoreWarning, stacklevel=2)
    return made


def compare(
    path: str | os.PathLike[str],
    *,
    like: Any,
    step: int | str = "latest",
    by: str | None = None,
    mode: str = "min",
    select: Select | None = None,
    rename: Rename | None = None,
    cast: bool = False,
) -> Report:
    """What `restore` with these arguments would take, and what differs. No array is read.

    Args:
        path: a folder of checkpoints.
        like: a state or any pytree; only structure, shapes and dtypes are looked at.
        step: as for `ftrain.restore`, and so are the others.
        by: the metric for `"best"`.
        mode: `"min"` or `"max"`.
        select: which leaves of `like` are meant.
        rename: what the leaves of the checkpoint are called in `like`.
        cast: whether dtypes may differ.

    Returns:
        The `Report`; `print` shows it.

    Raises:
        RestoreError: `select`, `rename`, `step` or `by` make no sense.
        CheckpointError: there is no such step, or it is damaged.

    >>> import tempfile, torch, ftrain as ft
    >>> with tempfile.TemporaryDirectory() as path:
    ...     ft.save(path, {"w": torch.zeros(2)})
    ...     report = ft.checkpoint.compare(path, like={"w": torch.zeros(3), "b": torch.zeros(3)})
    >>> report.differences()
    ['missing in the checkpoint: b', 'w: shape [2] in the checkpoint, [3] in like']
    """
    with _opened(path, like, "ft.checkpoint.compare") as store:
        return store.compare(choose(store, step, by, mode), like, select=select, rename=rename, cast=cast)


def _opened(path: str | os.PathLike[str], like: Any, what: str) -> Store:
    if isinstance(like, TrainState):
        check_state(like, what)
    from .store import Store

    return Store(path, write=False)


def choose(store: Store, step: int | str, by: str | None, mode: str) -> int:
    """The step that is meant by a number, `"latest"` or `"best"`."""
    saved = store.saved
    whole = isinstance(step, int) and not isinstance(step, bool)
    if not whole and step not in ("latest", "best"):
        raise RestoreError(explain(f"ft.restore: step={step!r} is no step.", expected='a number, "latest" or "best"'))
    if step != "best" and (by is not None or mode != "min"):
        raise RestoreError(
            explain('ft.restore: by= and mode= go with step="best".', got=f"step={step!r}, by={by!r}, mode={mode!r}")
        )
    if whole:
        return int(step)  # the store says which there are, if this one is not
    if not saved:
        raise store.nothing()
    if step == "latest":
        return saved[-1]
    entries = [Entry(one, metrics=_metrics(store.document(one))) for one in saved]
    names = sorted({name for entry in entries for name in entry.metrics})
    if by is None and len(names) != 1:
        raise RestoreError(
            explain(
                'ft.restore: step="best", but by which metric?',
                where=store.path,
                expected=f"one of: {', '.join(names) or 'none: no checkpoint has metrics'}",
                fix=f'ft.restore(path, like=..., step="best", by="{names[0] if names else "val/loss"}")',
            )
        )
    return best(entries, names[0] if by is None else by, mode).step


def _metrics(document: dict[str, Any]) -> dict[str, Any]:
    """Those given to `ft.save`, or those of a run."""
    run = document.get("run") or {}
    found: dict[str, Any] = document.get("metrics") or run.get("metrics") or {}
    return found
