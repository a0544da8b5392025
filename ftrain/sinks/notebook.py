"""The progress display of a notebook: one output, updated in place."""

from __future__ import annotations

import html
from collections import deque
from typing import Any

from .line import ROWS, Display, numbers
from .record import Record


class Notebook(Display):
    """One display that is updated in place: a bar, the line, and a table of evaluations."""

    def __init__(self, start: int, end: int | None, interval: float) -> None:
        super().__init__(start, end, interval)
        self._handle: Any = None
        self._rows: dict[int, dict[str, str]] = {}  # by step
        self._texts: deque[str] = deque(maxlen=ROWS)  # the same for frontends without HTML

    def _add(self, record: Record) -> None:
        if record.split != "train":
            row = self._rows.setdefault(record.step, {"step": f"{record.step}", "epoch": f"{record.epoch}"})
            row |= numbers(record.named())
            self._texts.append(self._row(record))

    def _finish(self, status: str) -> None:
        if self._handle is not None or self._rows:
            self._draw(status)

    def _draw(self, status: str = "") -> None:
        from IPython.display import display

        line = "  ".join(field.text for field in self._fields())
        if status:
            line += f"\n{self._stopped(status)}"
        shown = {"text/html": self._html(line), "text/plain": "\n".join([*self._texts, line])}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)

    def _html(self, line: str) -> str:
        done = self._done()
        bar = "" if done is None else f'<progress value="{done:.4f}" style="width: 14em"></progress>&ensp;'
        line = f'<div style="white-space: pre-wrap">{bar}{html.escape(line)}</div>'
        rows = list(self._rows.values())
        if not rows:
            return line
        names = list(dict.fromkeys(name for row in rows for name in row))
        earlier = f'<tr><td colspan="{len(names)}">{len(rows) - ROWS} earlier</td></tr>' if len(rows) > ROWS else ""
        table = [f"<tr>{_cells('th', names)}</tr>{earlier}"]
        table += [f"<tr>{_cells('td', [row.get(name, '') for name in names])}</tr>" for row in rows[-ROWS:]]
        return f"{line}<table>{''.join(table)}</table>"


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
