"""What every progress display shows: counts, rate, time left, metrics, as fields and as plain lines."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, TextIO

from .record import Record

WINDOW = 15.0  # seconds over which the rate is taken
ROWS = 20  # evaluations that the notebook's table shows; all of them are in the history
BAR = 10  # columns of the shortest bar; it grows in these units, so that its end does not jitter
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and what moves the cursor
ENDS = {"epochs", "steps", "until", "data"}  # statuses of a run that went as planned, not worth a word


# ------------------------------------------------------------------------------------------------------ numbers as text


def numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
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


class Field(NamedTuple):
    """A part of the line, and its rank: the lowest stay when there is no room for all."""

    rank: int
    text: str


def bar(done: float, width: int, plain: bool) -> tuple[str, str]:
    """The part that is done and the rest, told apart without colours too; `[===>   ]` where `plain`."""
    if plain:
        whole = int(done * (width - 2))
        return f"[{'=' * whole}", f"{'>' * (0 < whole < width - 2)}".ljust(width - 2 - whole) + "]"
    halves = int(done * width * 2)
    filled = "━" * (halves // 2) + "╸" * (halves % 2)
    return filled, "─" * (width - len(filled))


# -------------------------------------------------------------------------------------------------------- the displays


class Display:
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
            self._metrics |= numbers(record.metrics)
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
        fields += [f"{name} {text}" for name, text in numbers(record.named()).items()]
        rate = self._speed.rate()
        return "  ".join([*fields, _per_second(rate)] if rate and record.split == "train" else fields)

    def _stopped(self, status: str) -> str:
        return f"stopped at step {self._count()} after {_time(self._seconds)}: {status}"

    def _fields(self) -> list[Field]:
        """The line without its bar."""
        rate = self._speed.rate()
        fields = [Field(0, self._count()), Field(5, f"epoch {self._epoch}")]
        fields += [Field(5 + i if i else 1, f"{name} {text}") for i, (name, text) in enumerate(self._metrics.items())]
        if rate:
            fields.append(Field(3, _per_second(rate)))
        if self._closed or self._end is None:
            fields.append(Field(2, _time(self._seconds)))
        elif rate and self._step < self._end:
            fields.append(Field(2, f"{_time((self._end - self._step) / rate)} left"))
        return fields

    def _done(self) -> float | None:
        """The share of this run that is done, where its length is known."""
        if self._end is None or self._end <= self._start:
            return None
        return min(max((self._step - self._start) / (self._end - self._start), 0.0), 1.0)

    def _draw(self) -> None: ...
    def _add(self, record: Record) -> None: ...
    def _finish(self, status: str) -> None: ...


def encodable(text: str, stream: TextIO) -> str:
    """The text with `?` for what the stream cannot write, as a Windows code page cannot."""
    encoding = getattr(stream, "encoding", None) or "utf-8"  # a StringIO has none
    return text.encode(encoding, "replace").decode(encoding)


class Lines(Display):
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
            self._stream.write(encodable(text, self._stream) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # closed, or a pipe that nobody reads
            self._stream = None
