"""What is known of a checkpoint without opening it, and which of several is the best.

Laws
----
- The order is total: numbers by the mode, then NaN, then no value at all; of equals the newer is the better.
- It depends on the entries alone, not on the order in which they are given.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import LimitError, explain

__all__ = ["Entry", "best", "check_mode", "never_appears", "ordered", "rank"]

MODES = ("min", "max")


@dataclass(frozen=True)
class Entry:
    """What is known of one checkpoint without opening its arrays.

    Attributes:
        step: the state's step; no two checkpoints of a run have the same.
        epoch: epochs completed by then.
        seconds: time since the run began, all its processes together.
        metrics: the metrics recorded at this step, by full name (`"val/loss"`).

    >>> from ftrain.checkpoint.entries import Entry
    >>> Entry(step=100, epoch=1, seconds=8.5, metrics={"val/loss": 0.3}).metrics["val/loss"]
    0.3
    """

    step: int
    epoch: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, Any] = field(default_factory=dict, hash=False)


def best(entries: Iterable[Entry], by: str, mode: str = "min") -> Entry:
    """The best entry by a metric. NaN is worse than any number, no value is worse still; of equals the newer one.

    Args:
        entries: what there is.
        by: full name of the metric.
        mode: `"min"` or `"max"`.

    Raises:
        LimitError: there are no entries, none has this metric (those that they have are named), or an unknown mode.

    >>> from ftrain.checkpoint.entries import Entry, best
    >>> best([Entry(10, metrics={"val/loss": 0.2}), Entry(20, metrics={"val/loss": 0.3})], "val/loss").step
    10
    """
    check_mode(mode, "best")
    found = ordered(entries)
    if not found:
        raise LimitError(explain("there are no checkpoints, so there is no best one.", got="none"))
    if not any(_value(entry, by) is not None for entry in found):
        known = {name for entry in found for name in entry.metrics}
        raise never_appears("best", by, known, f"{len(found)} checkpoints")
    return min(found, key=lambda entry: rank(entry, by, mode))


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """The entries by their steps, which must differ."""
    found = sorted(entries, key=lambda entry: entry.step)
    for one, two in itertools.pairwise(found):
        if one.step == two.step:
            raise LimitError(
                explain("two checkpoints are of one step.", where=f"step {one.step}", expected="one", got="two")
            )
    return found


def rank(entry: Entry, by: str, mode: str) -> tuple[int, float, int]:
    """Sorts the best first: numbers, then NaN, then no value; of equals the newer."""
    value = _value(entry, by)
    if value is None or math.isnan(value):
        return (2 if value is None else 1, 0.0, -entry.step)
    return 0, value if mode == "min" else -value, -entry.step


def _value(entry: Entry, by: str) -> float | None:
    value = entry.metrics.get(by)
    if value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise LimitError(
            explain(
                f"the metric {by!r} is not a number, so there is no best checkpoint.",
                where=f"the checkpoint of step {entry.step}",
                expected="a number",
                got=type(value).__name__,
                cause="a metric of type Collect gives all values",
                fix="go by a mean of it",
            )
        ) from None


def check_mode(mode: object, what: str) -> None:
    """Raise unless the mode is one of the two that there are."""
    if mode not in MODES:
        raise LimitError(
            explain(
                f"{what}: mode={mode!r} is unknown.",
                expected="'min' (less is better) or 'max' (more is)",
                got=repr(mode),
                fix="mode='max'" if isinstance(mode, str) and "a" in mode else "mode='min'",
            )
        )


def never_appears(what: str, by: str, known: set[str], where: str) -> LimitError:
    """The error for a metric that none of the known ones is."""
    near = difflib.get_close_matches(by, sorted(known), n=1, cutoff=0.0)
    return LimitError(
        explain(
            f"{what}: the metric {by!r} never appears, so there is no best checkpoint.",
            where=where,
            expected=f"one of: {', '.join(sorted(known)) or 'none, no metric was recorded at a checkpoint'}",
            got=f"by={by!r}",
            fix=f"by={near[0]!r}"
            if near
            else 'ft.fit(..., evals={"val": ft.Evaluator(...)}), and by="val/loss"; save where it evaluates',
        )
    )
