"""Figures of matplotlib as values: they belong to no pyplot state and to no GUI, and display themselves in Jupyter.

Needs matplotlib, which ftrain does not install and imports only here, when a figure is made.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["new", "save"]


def new(where: str, size: tuple[float, float]) -> Figure:
    """An empty figure that displays itself in Jupyter, and elsewhere only when it is asked to.

    Args:
        where: who draws, for the error.
        size: width and height in inches.

    Raises:
        ImportError: matplotlib is not installed.

    >>> from ftrain import figure
    >>> figure.new("a test", size=(6, 4)).axes
    []
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            explain(
                "plots need matplotlib, and it cannot be imported.",
                where=where,
                got=f"{type(error).__name__}: {error}",
                fix="pip install 'ftrain[plot]'",
            )
        ) from error

    class Displayed(Figure):
        """Jupyter shows figures that pyplot made; this one was not."""

        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            width, height = (int(inches * self.dpi) for inches in self.get_size_inches())
            png = io.BytesIO()
            self.savefig(png, format="png", dpi=2 * self.dpi)  # two pixels for one, for sharp screens
            return png.getvalue(), {"width": width, "height": height}

    return Displayed(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def save(figure: Figure, path: str | Path | None) -> None:
    """Save a figure in the format of the suffix, with the directories that are missing; None saves nothing.

    >>> from ftrain import figure
    >>> figure.save(figure.new("a test", size=(6, 4)), "plots/empty.png")
    """
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
