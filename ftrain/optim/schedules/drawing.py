"""The picture of a schedule. Needs matplotlib, which ftrain does not install."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import figure
from .checks import refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(
    schedule: Callable[[Tensor], Tensor], steps: int, path: str | Path | None, *, log: bool, name: str, title: str
) -> Figure:
    """The values at the steps 0, 1, ..., `steps` as a line; see `ScheduleFn.plot`."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise refuse(
            "schedule.plot: how many steps are to be drawn?",
            expected="a positive integer",
            got=steps,
            fix="schedule.plot(1000)",
        )
    at = torch.arange(steps + 1)
    values = schedule(at).detach()
    drawn = figure.new("schedule.plot", size=(6, 3.5))
    axes = drawn.add_subplot()
    good = torch.isfinite(values) & ((values > 0) if log else torch.ones_like(values, dtype=torch.bool))
    axes.plot(at, torch.where(good, values, torch.nan), linewidth=1.5)
    if log and bool(good.any()):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(name)
    axes.set_title(title, fontsize="small", wrap=True)
    axes.grid(which="both", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.save(drawn, path)
    return drawn
