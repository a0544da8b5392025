"""The progress display of `fit`: one line in a terminal, one display updated in place in Jupyter, log lines elsewhere.

Three laws:

* It is given host numbers only and reads no clock: rate and remaining time come from the `seconds` that `fit` passes.
* What the user prints, to stdout or stderr, arrives unchanged and in order; the line steps aside and comes back below it.
* It never ends a run: a stream that is closed, broken, narrow or without Unicode costs the display, not the training.

The cursor is never hidden, so that there is nothing to restore, not even after `kill -9`.
"""

from __future__ import annotations

import html
import math
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO, cast

from ..errors import explain
from .record import Record

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Progress", "console"]

WINDOW = 15.0  # seconds over which the rate is taken
ROWS = 20  # evaluations that the notebook's table shows; all of them are in the history
BAR = 10  # columns of the shortest bar; it grows in these units, so that its end does not jitter
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and what moves the cursor
ENDS = {"epochs", "steps", "until", "data"}  # statuses of a run that went as planned, not worth a word


class Progress(Protocol):
    """What `fit` calls to show how far it is.

    Attributes:
        interval: seconds between refreshes; `fit` calls `refresh` at most that often.

    >>> from ftrain.sinks import Progress
    >>> class Plain:
    ...     interval = 1.0
    ...
    ...     def refresh(self, step, epoch, samples, seconds):
    ...         print("at", step)
    ...
    ...     def record(self, record):
    ...         print(record.metrics)
    ...
    ...     def close(self, status):
    ...         print(status)
    >>> plain: Progress = Plain()
    >>> plain.refresh(1, 0, 8, 0.1)
    at 1
    >>> plain.close("steps")
    steps
    """

    interval: float

    def refresh(self, step: int, epoch: int, samples: int, seconds: float) -> None:
        """Show the counters, which are host numbers; `seconds` is the time since `fit` began."""

    def record(self, record: Record) -> None:
        """Show a log point or the result of an evaluation."""

    def close(self, status: str) -> None:
        """Leave the screen tidy; called once, on every exit, with the reason for it or `"error"`."""


def console(
    *,
    start: int = 0,
    steps: int | None = None,
    epochs: int | None = None,
    steps_per_epoch: int | None = None,
    stream: TextIO | None = None,
    interval: float | None = None,
) -> Progress:
    """Show the progress of a run in the way that suits the place where it runs.

    In a terminal it is a line (bar, steps, epochs completed, training metrics, steps per second, training time left),
    with evaluations as rows above it. In Jupyter it is one display that is updated in place, with evaluations as a table.
    Elsewhere (a file, CI) each record is a line. The rate is that of the last 15 seconds, evaluations left out.

    Args:
        start: the state's step when the run begins.
        steps: how many more steps are to run, where known.
        epochs: how many more epochs are to run, where known.
        steps_per_epoch: the length of an epoch in steps, where known.
        stream: where to write; default: the notebook, or `sys.stdout`.
        interval: seconds between refreshes; default: 0.1 in a terminal, 0.5 in a notebook.

    Returns:
        The display, with nothing shown yet.

    Raises:
        ValueError: `interval` is negative or NaN.

    >>> from ftrain.sinks import Record, console
    >>> progress = console(epochs=3, steps_per_epoch=150)
    >>> progress.refresh(75, 0, 4800, 0.5)
    >>> progress.record(Record(150, 1, 9600, 1.0, "train", {"loss": 0.31207, "accuracy": 0.91}))
    step 150/450  epoch 1  loss 0.3121  accuracy 0.91  150 steps/s
    >>> progress.close("epochs")
    """
    if interval is not None and not interval >= 0:
        raise ValueError(
            explain(
                "the interval between refreshes makes no sense.",
                where="ftrain.sinks.console(interval=...)",
                expected="seconds >= 0, or None",
                got=repr(interval),
                fix="ftrain.sinks.console(interval=0.5)",
            )
        )
    totals = [steps, epochs * steps_per_epoch if epochs is not None and steps_per_epoch is not None else None]
    end = min((start + total for total in totals if total is not None), default=None)
    if stream is None and _in_notebook():
        return _Notebook(start, end, 0.5 if interval is None else interval)
    stream = cast("TextIO | None", sys.stdout) if stream is None else stream  # None under pythonw
    if stream is not None and _is_terminal(stream):
        return _Terminal(start, end, 0.1 if interval is None else interval, stream)
    return _Lines(start, end, 1.0 if interval is None else interval, stream)


def _in_notebook() -> bool:
    # Only a process that has IPython imported can be a kernel; its terminal shell has no `kernel`.
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return getattr(get_ipython() if get_ipython else None, "kernel", None) is not None


def _is_terminal(stream: TextIO) -> bool:
    """Whether a line can be redrawn there. FORCE_COLOR alone, as many CI systems set it, makes no terminal."""
    try:
        if not stream.isatty():
            return False
    except (AttributeError, OSError, ValueError):
        return False
    from rich.console import Console

    rich = Console(file=stream, force_jupyter=False)
    return rich.is_terminal and not rich.is_dumb_terminal


# ------------------------------------------------------------------------------------------------------ numbers as text


def _numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that are numbers, written compactly; arrays from `Collect` are left out."""
    return {name: f"{float(value):.4g}" for name, value in metrics.items() if isinstance(value, Real)}


def _time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _per_second(rate: float) -> str:
    if rate < 1:
        return f"{1 / rate:.3g} s/step"
    return f"{rate:.0f} steps/s" if rate >= 100 else f"{rate:.3g} steps/s"


class _Speed:
    """Steps per second of training over the last `WINDOW` seconds."""

    def __init__(self, start: int) -> None:
        self._last = (start, 0.0)  # what was reported last: step, seconds
        self._points = deque([(0, 0.0)])  # steps and seconds of training alone, summed

    def report(self, step: int, seconds: float, training: bool) -> None:
        steps, spent = step - self._last[0], seconds - self._last[1]
        if training and steps == 0:
            return  # the time belongs to the step under way
        self._last = (step, seconds)
        if not training or steps < 0 or spent < 0:  # an evaluation, or a return to an earlier state
            return
        points = self._points
        points.append((points[-1][0] + steps, points[-1][1] + spent))
        if len(points) == 3 and points[0] == (0, 0.0):
            points.popleft()  # the first step, which compiles, counts only while there is no other
        while len(points) > 2 and points[-1][1] - points[1][1] >= WINDOW:
            points.popleft()

    def rate(self) -> float:
        """0 when unknown."""
        (steps, seconds), (now_steps, now_seconds) = self._points[0], self._points[-1]
        return (now_steps - steps) / (now_seconds - seconds) if now_seconds > seconds else 0.0


class _Field(NamedTuple):
    """A part of the line, and its rank: the lowest stay when there is no room for all."""

    rank: int
    text: str


def _bar(done: float, width: int, plain: bool) -> tuple[str, str]:
    """The part that is done and the rest, told apart without colours too; `[===>   ]` where `plain`."""
    if plain:
        whole = int(done * (width - 2))
        return f"[{'=' * whole}", f"{'>' * (0 < whole < width - 2)}".ljust(width - 2 - whole) + "]"
    halves = int(done * width * 2)
    filled = "━" * (halves // 2) + "╸" * (halves % 2)
    return filled, "─" * (width - len(filled))


# -------------------------------------------------------------------------------------------------------- the displays


class _Display:
    """What the displays share: the newest numbers, and how they read."""

    def __init__(self, start: int, end: int | None, interval: float) -> None:
        self.interval = interval
        self._start, self._end = start, end
        self._step, self._epoch, self._seconds = start, 0, 0.0
        self._metrics: dict[str, str] = {}  # of training, the newest of each
        self._speed = _Speed(start)
        self._drawn_at = -math.inf  # when a record was last drawn, in seconds of the run
        self._closed = False

    def refresh(self, step: int, epoch: int, samples: int, seconds: float) -> None:
        if not self._closed:
            self._see(step, epoch, seconds, True)
            self._draw()

    def record(self, record: Record) -> None:
        if self._closed:
            return
        training = record.split == "train"
        self._see(record.step, record.epoch, record.seconds, training)
        if training:
            self._metrics |= _numbers(record.metrics)
        self._add(record)
        if record.seconds - self._drawn_at >= self.interval:  # someone may log every step
            self._drawn_at = record.seconds
            self._draw()

    def close(self, status: str) -> None:
        if not self._closed:
            self._closed = True
            self._finish("" if status in ENDS else status)

    def _see(self, step: int, epoch: int, seconds: float, training: bool) -> None:
        # A refresh at the end of an epoch may still count it as under way when its record does not.
        self._epoch = max(epoch, self._epoch) if step == self._step else epoch
        self._step, self._seconds = step, seconds
        self._speed.report(step, seconds, training)

    def _count(self) -> str:
        return f"{self._step}" if self._end is None else f"{self._step}/{self._end}"

    def _row(self, record: Record) -> str:
        fields = [f"step {self._count()}", f"epoch {record.epoch}"]
        fields += [f"{name} {text}" for name, text in _numbers(record.named()).items()]
        rate = self._speed.rate()
        return "  ".join([*fields, _per_second(rate)] if rate and record.split == "train" else fields)

    def _stopped(self, status: str) -> str:
        return f"stopped at step {self._count()} after {_time(self._seconds)}: {status}"

    def _fields(self) -> list[_Field]:
        """The line without its bar."""
        rate = self._speed.rate()
        fields = [_Field(0, self._count()), _Field(5, f"epoch {self._epoch}")]
        fields += [_Field(5 + i if i else 1, f"{name} {text}") for i, (name, text) in enumerate(self._metrics.items())]
        if rate:
            fields.append(_Field(3, _per_second(rate)))
        if self._closed or self._end is None:
            fields.append(_Field(2, _time(self._seconds)))
        elif rate and self._step < self._end:
            fields.append(_Field(2, f"{_time((self._end - self._step) / rate)} left"))
        return fields

    def _done(self) -> float | None:
        """The share of this run that is done, where its length is known."""
        if self._end is None or self._end <= self._start:
            return None
        return min(max((self._step - self._start) / (self._end - self._start), 0.0), 1.0)

    def _draw(self) -> None: ...
    def _add(self, record: Record) -> None: ...
    def _finish(self, status: str) -> None: ...


def _encodable(text: str, stream: TextIO) -> str:
    """The text with `?` for what the stream cannot write, as a Windows code page cannot."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a StringIO has none
    return text.encode(encoding, "replace").decode(encoding)


class _Lines(_Display):
    """A line for each record."""

    def __init__(self, start: int, end: int | None, interval: float, stream: TextIO | None) -> None:
        super().__init__(start, end, interval)
        self._stream = stream

    def _add(self, record: Record) -> None:
        self._write(self._row(record))

    def _finish(self, status: str) -> None:
        if status:
            self._write(self._stopped(status))

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(_encodable(text, self._stream) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # closed, or a pipe that nobody reads
            self._stream = None


class _Terminal(_Display):
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
        self._ascii = self._screen.legacy_windows or "?" in _encodable("━╸─", stream)
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
            if stream is not None and _is_terminal(stream):
                self._aside[name] = _Aside(stream, self)
                setattr(sys, name, self._aside[name])

    def _text(self, text: str) -> Text:
        from rich.text import Text

        return Text(_encodable(text, self._stream))

    def _line(self) -> Text:
        """The fields for which there is room, and a bar of 10, 20 or 30 columns."""
        from rich.cells import cell_len

        done, fields = self._done(), self._fields()
        if done is not None:
            fields.insert(0, _Field(4, " " * BAR))
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
            filled, rest = _bar(done, BAR + min(max(room, 0) // BAR, 2) * BAR, self._ascii)
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

    def __init__(self, stream: TextIO, line: _Terminal) -> None:
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


class _Notebook(_Display):
    """One display that is updated in place: a bar, the line, and a table of evaluations."""

    def __init__(self, start: int, end: int | None, interval: float) -> None:
        super().__init__(start, end, interval)
        self._handle: Any = None
        self._rows: dict[int, dict[str, str]] = {}  # by step
        self._texts: deque[str] = deque(maxlen=ROWS)  # the same for frontends without HTML

    def _add(self, record: Record) -> None:
        if record.split != "train":
            row = self._rows.setdefault(record.step, {"step": f"{record.step}", "epoch": f"{record.epoch}"})
            row |= _numbers(record.named())
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
