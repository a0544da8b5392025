"""Numbers, shapes and tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

__all__ = ["as_html", "as_text", "bytes_of", "count", "shape", "size"]


def size(number: float) -> str:
    """Bytes in a few characters.

    >>> from ftrain.inspect.tables import size
    >>> size(512), size(2_500_000)
    ('512 B', '2.5 MB')
    """
    return _scaled(number, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(number: float, unit: str = "") -> str:
    """A number in a few characters.

    >>> from ftrain.inspect.tables import count
    >>> count(512), count(28_672, "FLOP")
    ('512', '28.7 kFLOP')
    """
    return _scaled(number, tuple(f"{prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P"))).strip()


def _scaled(number: float, units: Sequence[str]) -> str:
    at = 0
    while number >= 999.95 and at < len(units) - 1:
        number, at = number / 1000, at + 1
    return f"{number:.0f} {units[at]}" if at == 0 else f"{number:.1f} {units[at]}"


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of tensors, each storage once.

    >>> import torch
    >>> from ftrain.inspect.tables import bytes_of
    >>> x = torch.zeros(10)
    >>> bytes_of([x, x[:5]])
    40
    """
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> str:
    """A table in plain text.

    Args:
        head: the titles of the columns.
        rows: the cells.
        right: which columns are set to the right.

    >>> from ftrain.inspect.tables import as_text
    >>> print(as_text(["name", "n"], [["a", "1"], ["b", "20"]], frozenset({1})))
    name   n
    a      1
    b     20
    """
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def as_html(head: Sequence[str], rows: Sequence[Sequence[str]], below: str = "") -> str:
    """A table in HTML, for a notebook.

    >>> from ftrain.inspect.tables import as_html
    >>> as_html(["a"], [["<1>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;1&gt;</td></tr></table>'
    """
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    # Spaces that indent a name would be lost.
    lines += ["".join(f"<td>{escape(cell).replace('  ', '&nbsp;&nbsp;')}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{body}</table>" + (f"<pre>{escape(below)}</pre>" if below else "")


def shape(value: Any) -> str:
    """The shapes of a tree of tensors, written as the tree is.

    >>> import torch
    >>> from ftrain.inspect.tables import shape
    >>> shape({"a": torch.zeros(2, 3), "b": (torch.zeros(()), 1)})
    '{a: [2, 3], b: ([], int)}'
    """
    if isinstance(value, Tensor):
        return f"[{', '.join(str(n) for n in value.shape)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shape(one)}" for key, one in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(shape(one) for one in value)})"
    if isinstance(value, list):
        return f"[{', '.join(shape(one) for one in value)}]"
    return "None" if value is None else type(value).__name__
