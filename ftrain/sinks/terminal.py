"""The progress line of a terminal, which steps aside for what the user prints."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

from .line import BAR, ESCAPES, Display, Field, bar, encodable
from .record import Record

if TYPE_CHECKING:
    from rich.text import Text


class Terminal(Display):
    """A line that is redrawn below whatever else is printed.

    Not `rich.live`: its stand-in for stdout wraps what it is given anew, and ends partial lines.
    """

    def __init__(self, start: int, end: int | None, interval: float, stream: TextIO) -> None:
        super().__init__(start, end, interval)
        from rich.console import Console

        class Screen(Console):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would end the process

        self._stream = stream
        self._screen = Screen(file=stream, force_terminal=True, force_jupyter=False)
        self._ascii = self._screen.legacy_windows or "?" in encodable("━╸─", stream)
        self.lock = threading.RLock()
        self._aside: dict[str, _Aside] = {}  # what stands in for sys.stdout and sys.stderr meanwhile
        self._begun = False
        self._drawn = False  # the line is on the screen, and the cursor at its end
        self._partial = False  # the user's last line has no end yet
        self._gone = False

    def yield_to(self, text: str) -> None:
        """Take the line away because the user is about to write `text`."""
        self._put()
        visible = ESCAPES.sub("", text)
        if visible.strip(" \r"):
            self._partial = not visible.endswith("\n")
        elif visible.endswith("\r"):  # as other progress bars do when they clear theirs
            self._partial = False

    def _draw(self) -> None:
        with self.lock:
            self._begin()
            if not self._partial:
                self._put(self._line())
                self._drawn = not self._gone

    def _add(self, record: Record) -> None:
        if record.split != "train":
            with self.lock:
                self._begin()
                self._put(self._text(self._row(record)), "\n")

    def _finish(self, status: str) -> None:
        with self.lock:
            if self._begun:
                self._put(self._line(), "\n")
            if self._begun and status:
                self._put(self._text(self._stopped(status)), "\n")
            for name, aside in self._aside.items():
                if getattr(sys, name) is aside:  # otherwise somebody stands in for us, and we only pass on
                    setattr(sys, name, aside.stream)

    def _begin(self) -> None:
        """Stand in for the standard streams, if the line is on the terminal that shows them."""
        if self._begun:
            return
        self._begun = True
        for name in ("stdout", "stderr") if self._stream in (sys.stdout, sys.stderr) else ():
            stream = getattr(sys, name)
            if stream is not None and is_terminal(stream):
                self._aside[name] = _Aside(stream, self)
                setattr(sys, name, self._aside[name])

    def _text(self, text: str) -> Text:
        from rich.text import Text

        return Text(encodable(text, self._stream))

    def _line(self) -> Text:
        """The fields for which there is room, and a bar of 10, 20 or 30 columns."""
        from rich.cells import cell_len

        done, fields = self._done(), self._fields()
        if done is not None:
            fields.insert(0, Field(4, " " * BAR))
        room = self._screen.width - 1  # a terminal may wrap after its last column
        kept: set[int] = set()
        for i in sorted(range(len(fields)), key=lambda i: fields[i].rank):
            width = cell_len(fields[i].text) + 2 * bool(kept)
            if width <= room or not kept:
                kept.add(i)
                room -= width
        line = self._text("")
        texts = [field.text for i, field in enumerate(fields) if i in kept]
        if done is not None and 0 in kept:
            filled, rest = bar(done, BAR + min(max(room, 0) // BAR, 2) * BAR, self._ascii)
            line.append(filled, "green").append(rest, "dim")
            texts[0] = ""
        line.append_text(self._text("  ".join(texts)))
        line.truncate(max(self._screen.width - 1, 1))
        return line

    def _put(self, text: Text | None = None, end: str = "") -> None:
        """Write in place of the line, in one piece; what ends a line may be longer than the screen is wide."""
        from rich.control import Control
        from rich.segment import ControlType

        if self._gone or (text is None and not self._drawn):
            return
        try:
            with self._screen:
                if self._drawn:
                    self._screen.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
                elif self._partial and end:
                    self._screen.print()
                    self._partial = False
                if text is not None:
                    self._screen.print(text, end=end, soft_wrap=True)
        except (OSError, ValueError):  # closed, or hung up
            self._gone = True
        self._drawn = False


class _Aside:
    """Stands in for a standard stream: what is written goes through as it is, once the line has stepped aside."""

    def __init__(self, stream: TextIO, line: Terminal) -> None:
        self.stream, self._line, self._pid = stream, line, os.getpid()

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:  # a forked worker owns neither the line nor, perhaps, a free lock
            return self.stream.write(text)
        with self._line.lock:
            self._line.yield_to(text)
            return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        # `input()` and callers of subprocesses flush before something that we do not see writes to the terminal.
        if os.getpid() == self._pid:
            with self._line.lock:
                self._line.yield_to("")
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def is_terminal(stream: TextIO) -> bool:
    """Whether a line can be redrawn there. FORCE_COLOR alone, as many CI systems set it, makes no terminal."""
    try:
        if not stream.isatty():
            return False
    except (AttributeError, OSError, ValueError):
        return False
    from rich.console import Console

    rich = Console(file=stream, force_jupyter=False)
    return rich.is_terminal and not rich.is_dumb_terminal
