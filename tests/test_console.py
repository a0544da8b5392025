"""The progress display: in a terminal (recorded, and a real one), in Jupyter (a real kernel), and as plain lines."""

import contextlib
import fcntl
import io
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest

import ftrain
from ftrain.sinks import Progress, Record, console

user_prints = print
PARENT = str(Path(ftrain.__file__).parents[1])


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """A common terminal of 100 columns, whatever the one is that runs the tests."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")


class Terminal(io.StringIO):
    """A recorded terminal."""

    def isatty(self):
        return True


class CodePage(io.TextIOWrapper):
    """A terminal, or with `tty=False` a file, with a limited encoding."""

    def __init__(self, encoding, tty):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.tty = tty

    def isatty(self):
        return self.tty

    def getvalue(self):
        return self.buffer.getvalue().decode(self.encoding)


def screen(text, width=100):
    """What a terminal of that width shows after `text`: its lines, without trailing blanks. Unknown codes fail."""
    lines, column = [[]], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", text):
        if token == "\n":
            lines.append([])
            column = 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[-1].clear()
        elif token.startswith("\x1b"):
            assert token.endswith("m"), f"unexpected code {token!r}"
        else:
            if column == width:
                lines.append([])
                column = 0
            lines[-1].extend(" " * (column + 1 - len(lines[-1])))
            lines[-1][column] = token
            column += 1
    return ["".join(line).rstrip() for line in lines]


def train(step, seconds, epoch=0, **metrics):
    return Record(step, epoch, 64 * step, seconds, "train", metrics)


def val(step, seconds, epoch=0, **metrics):
    return Record(step, epoch, 64 * step, seconds, "val", metrics)


# --------------------------------------------------------------------------------------------------------- plain lines


def test_a_file_gets_a_line_for_each_record_and_none_for_a_refresh():
    out = io.StringIO()
    shown: Progress = console(epochs=3, steps_per_epoch=150, stream=out)
    shown.refresh(1, 0, 64, 5.0)  # the first step compiles
    shown.refresh(51, 0, 3264, 5.5)
    assert out.getvalue() == ""
    shown.record(train(150, 6.49, 1, loss=0.312071, acc=0.91))
    shown.record(val(150, 9.0, 1, loss=0.5, f1=1e-7))
    shown.record(train(300, 10.5, 2, loss=0.2))
    shown.close("epochs")
    assert out.getvalue().splitlines() == [
        "step 150/450  epoch 1  loss 0.3121  acc 0.91  100 steps/s",
        "step 150/450  epoch 1  val/loss 0.5  val/f1 1e-07",
        "step 300/450  epoch 2  loss 0.2  100 steps/s",
    ]


def test_the_length_may_be_unknown():
    out = io.StringIO()
    shown = console(epochs=3, stream=out)
    shown.record(train(10, 20.0, loss=1.0))
    assert out.getvalue() == "step 10  epoch 0  loss 1  2 s/step\n"


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({"steps": 50}, "step 110/150"),
        ({"steps": 50, "epochs": 1, "steps_per_epoch": 30}, "step 110/130"),
        ({"steps": 50, "epochs": 9, "steps_per_epoch": 30}, "step 110/150"),
    ],
    ids=["steps", "epochs are less", "steps are less"],
)
def test_steps_are_the_states_and_the_nearer_limit_ends_the_run(limits, count):
    out = io.StringIO()
    shown = console(start=100, stream=out, **limits)
    shown.record(train(110, 1.0))
    assert out.getvalue() == f"{count}  epoch 0  10 steps/s\n"


def test_metrics_are_written_compactly_and_arrays_left_out():
    out = io.StringIO()
    metrics = {"nan": float("nan"), "inf": -float("inf"), "big": 123456.0, "count": 3, "f32": np.float32(0.1)}
    console(stream=out).record(val(1, 1.0, **metrics, matrix=np.eye(2), name="x"))
    expected = "val/nan nan  val/inf -inf  val/big 1.235e+05  val/count 3  val/f32 0.1"
    assert out.getvalue() == f"step 1  epoch 0  {expected}\n"


@pytest.mark.parametrize("status", ["interrupted", "error", "early_stop: val/loss"])
def test_an_early_end_is_said(status):
    out = io.StringIO()
    shown = console(steps=100, stream=out)
    shown.refresh(50, 0, 0, 3661.0)
    shown.close(status)
    shown.close(status)
    shown.refresh(51, 0, 0, 3662.0)
    shown.record(train(51, 3662.0))
    assert out.getvalue() == f"stopped at step 50/100 after 1:01:01: {status}\n"


@pytest.mark.parametrize("status", ["epochs", "steps", "until", "data"])
def test_an_end_as_planned_is_not(status):
    out = io.StringIO()
    console(stream=out).close(status)
    assert out.getvalue() == ""


def test_a_code_page_without_the_characters():
    out = CodePage("cp1252", tty=False)
    console(stream=out).record(train(1, 1.0, 损失=1.0, größe=2.0))
    assert out.getvalue() == f"step 1  epoch 0  ?? 1  größe 2  1 steps/s{os.linesep}"


@pytest.mark.parametrize("interval", [-1.0, float("nan")])
def test_an_interval_must_make_sense(interval):
    with pytest.raises(ValueError, match=r"interval between refreshes makes no sense(?s:.*)expected: seconds >= 0"):
        console(interval=interval)


def test_without_any_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    shown = console(steps=3)
    shown.record(train(1, 1.0))
    shown.close("error")


@pytest.mark.parametrize(
    "environment", [{"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, {"GITHUB_ACTIONS": "true", "CI": "1"}], ids=str
)
def test_colours_asked_for_make_no_terminal_of_a_file(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    console(steps=3, stream=out).record(train(1, 1.0, loss=2.0))
    assert out.getvalue() == "step 1/3  epoch 0  loss 2  1 steps/s\n"


def test_a_terminal_that_cannot_redraw_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    shown = console(steps=3, stream=out)
    shown.refresh(1, 0, 0, 1.0)
    shown.record(train(1, 1.0, loss=2.0))
    assert out.getvalue() == "step 1/3  epoch 0  loss 2  1 steps/s\n"


# ---------------------------------------------------------------------------------------------------------------- rate


def rates(*reports):
    """The rate that the line of the last report states."""
    out = io.StringIO()
    shown = console(stream=out)
    for report in reports:
        if isinstance(report, Record):
            shown.record(report)
        else:
            shown.refresh(report[0], 0, 0, report[1])
    return out.getvalue().splitlines()[-1].split("  ")[-1]


def test_the_rate_is_that_of_the_last_seconds():
    slow = [(10 * i, float(i)) for i in range(1, 100)]  # 10 steps/s
    fast = [(990 + 50 * i, 99.0 + i) for i in range(1, 17)]  # 50 steps/s, for longer than the window
    assert rates(*slow, train(990, 99.0)) == "10 steps/s"
    assert rates(*slow, *fast, train(1840, 116.0)) == "50 steps/s"


def test_the_first_step_counts_only_while_there_is_no_other():
    assert rates(train(1, 30.0)) == "30 s/step"
    assert rates((1, 30.0), train(101, 31.0)) == "100 steps/s"


def test_evaluation_is_no_training():
    assert rates((10, 1.0), (20, 2.0), val(20, 60.0), (30, 61.0), train(40, 62.0)) == "10 steps/s"
    assert rates(val(0, 60.0), (10, 61.0), train(20, 62.0)) == "10 steps/s"


def test_the_rate_when_steps_are_few_or_repeat():
    assert rates((1, 100.0), (2, 200.0), train(3, 300.0)) == "100 s/step"
    assert rates((1, 1.0), (2, 2.0), train(2, 2.5)) == "1 steps/s"
    assert rates((1, 1.0), (11, 2.0), (1, 3.0), train(11, 4.0)) == "10 steps/s"  # rolled back
    assert rates(train(0, 0.0, loss=1.0)) == "loss 1"
    assert rates((1, 1.0), train(12346, 2.0)) == "12345 steps/s"


# ------------------------------------------------------------------------------------------------- a recorded terminal


@pytest.fixture
def attach(monkeypatch):
    """Makes stdout and stderr a recorded terminal; to be called in the test, since pytest sets them after its fixtures."""

    def now():
        out = Terminal()
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        return out

    return now


def test_one_line_is_redrawn_with_evaluations_above_it(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(10, 0, 640, 1.0)
    assert screen(terminal.getvalue()) == ["━━━───────────────────────────  10/100  epoch 0  10 steps/s  0:09 left"]
    shown.record(train(50, 5.0, loss=0.25, accuracy=0.912345))
    last = f"{'━' * 15}{'─' * 15}  50/100  epoch 0  loss 0.25  accuracy 0.9123  10 steps/s  0:05 left"
    assert screen(terminal.getvalue()) == [last]
    shown.record(val(50, 8.0, 1, loss=0.5))
    shown.refresh(60, 1, 0, 9.0)
    row = "step 50/100  epoch 1  val/loss 0.5"
    last = f"{'━' * 18}{'─' * 12}  60/100  epoch 1  loss 0.25  accuracy 0.9123  10 steps/s  0:04 left"
    assert screen(terminal.getvalue()) == [row, last]
    shown.refresh(100, 2, 0, 13.0)
    shown.close("steps")
    shown.close("steps")
    shown.refresh(101, 2, 0, 14.0)
    last = "━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  100/100  epoch 2  loss 0.25  accuracy 0.9123  10 steps/s  0:13"
    assert screen(terminal.getvalue()) == [row, last, ""]
    assert "\x1b[?25" not in terminal.getvalue(), "the cursor was never hidden"


def test_a_run_of_unknown_length_has_no_bar(attach):
    terminal = attach()
    shown = console(epochs=2)
    shown.refresh(10, 0, 640, 2.0)
    assert screen(terminal.getvalue()) == ["10  epoch 0  5 steps/s  0:02"]


def test_a_resumed_run_shows_the_states_steps_and_its_own_share(attach):
    terminal = attach()
    shown = console(start=1000, steps=100)
    shown.refresh(1050, 7, 0, 5.0)
    assert screen(terminal.getvalue()) == ["━━━━━━━━━━━━━━━───────────────  1050/1100  epoch 7  10 steps/s  0:05 left"]
    shown.refresh(1111, 7, 0, 11.1)  # more than was said
    assert screen(terminal.getvalue()) == [f"{'━' * 30}  1111/1100  epoch 7  10 steps/s"]


def test_the_epoch_that_a_record_completed_stays_completed(attach):
    terminal = attach()
    shown = console(steps=20)
    shown.record(train(10, 1.0, 1))
    shown.refresh(10, 0, 0, 1.1)  # the tick at the end of an epoch still counts it as under way
    assert "  10/20  epoch 1  " in screen(terminal.getvalue())[0]
    shown.refresh(5, 0, 0, 1.2)  # rolled back
    assert "  5/20  epoch 0  " in screen(terminal.getvalue())[0]


def test_records_at_every_step_are_not_all_drawn(attach):
    terminal = attach()
    shown = console(steps=1000)
    for step in range(1, 101):
        shown.record(train(step, step * 0.01, loss=1.0))
    assert 8 <= terminal.getvalue().count("epoch") <= 11  # in a second, at 0.1 seconds each
    shown.close("interrupted")
    assert "  100/1000  epoch 0  " in screen(terminal.getvalue())[0]


def test_an_early_end_is_said_below_the_line(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(60, 0, 0, 6.0)
    shown.close("interrupted")
    last = f"{'━' * 18}{'─' * 12}  60/100  epoch 0  10 steps/s  0:06"
    assert screen(terminal.getvalue()) == [last, "stopped at step 60/100 after 0:06: interrupted", ""]


def test_nothing_is_shown_of_a_run_that_did_nothing(attach):
    terminal = attach()
    console(steps=100).close("error")
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (80, "━━━━━─────  50/100  epoch 0  loss 0.25  a 1  b 2  10 steps/s  0:05 left"),
        (60, "━━━━━─────  50/100  loss 0.25  a 1  10 steps/s  0:05 left"),
        (40, "50/100  epoch 0  loss 0.25  0:05 left"),
        (20, "50/100  loss 0.25"),
        (5, "50/1"),
        (1, "5"),
    ],
)
def test_what_has_no_room_is_left_out(attach, monkeypatch, width, line):
    terminal = attach()
    monkeypatch.setenv("COLUMNS", str(width))
    shown = console(steps=100)
    for _ in range(3):
        shown.record(train(50, 5.0, loss=0.25, a=1, b=2))
        shown.refresh(50, 0, 0, 5.0)
    assert screen(terminal.getvalue(), width) == [line]  # never wrapped: that could not be erased


@pytest.mark.parametrize(("width", "line"), [(20, "50/100  损失损 0.25"), (19, "━━━━━─────  50/100")], ids=str)
def test_wide_characters_take_two_columns(attach, monkeypatch, width, line):
    terminal = attach()
    monkeypatch.setenv("COLUMNS", str(width))
    console(steps=100).record(train(50, 0.0, 损失损=0.25))
    assert screen(terminal.getvalue()) == [line]  # 19 columns do not go into 18


def test_a_row_is_not_wrapped(attach, monkeypatch):
    terminal = attach()
    monkeypatch.setenv("COLUMNS", "20")
    console(steps=100).record(val(50, 0.0, loss=0.25, accuracy=0.5))
    assert terminal.getvalue().startswith("step 50/100  epoch 0  val/loss 0.25  val/accuracy 0.5\n")  # one may copy it


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_terminal_without_unicode_gets_an_ascii_bar(encoding):
    out = CodePage(encoding, tty=True)
    shown = console(steps=100, stream=out)
    for step in (0, 50, 100):
        shown.refresh(step, 0, 0, 0.0)
    shown.record(val(100, 0.0, 损失=1.0))
    shown.close("steps")
    bars = re.findall(r"\[[=> ]*\]", re.sub(r"\x1b\[\d*m", "", out.getvalue()))
    assert bars == [f"[{' ' * 28}]", f"[{'=' * 14}>{' ' * 13}]", *[f"[{'=' * 28}]"] * 3]
    assert "val/?? 1" in out.getvalue()


def test_no_color_is_honoured(attach, monkeypatch):
    terminal = attach()
    monkeypatch.setenv("NO_COLOR", "1")
    console(steps=2).refresh(1, 0, 0, 0.0)
    assert "\x1b[3" not in terminal.getvalue()
    assert screen(terminal.getvalue()) == [f"{'━' * 15}{'─' * 15}  1/2  epoch 0"]


# --------------------------------------------------------------------------------------------- beside the user's output


def test_prints_arrive_unchanged_and_the_line_comes_back_below(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(10, 0, 0, 1.0)
    long = "x" * 130 + " [bold]not markup[/bold] \x1b[31mred\x1b[0m"
    user_prints(long)
    user_prints("to stderr", file=sys.stderr)
    assert screen(terminal.getvalue())[-2:] == ["to stderr", ""]
    shown.refresh(20, 0, 0, 2.0)
    assert f"\r\x1b[2K{long}\nto stderr\n" in terminal.getvalue()
    assert screen(terminal.getvalue())[-2:] == [
        "to stderr",
        f"{'━' * 6}{'─' * 24}  20/100  epoch 0  10 steps/s  0:08 left",
    ]


def test_a_line_that_the_user_has_begun_is_left_alone(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(10, 0, 0, 1.0)
    user_prints("wait", end="", flush=True)
    shown.refresh(20, 0, 0, 2.0)
    sys.stdout.writelines([".", "."])
    shown.refresh(30, 0, 0, 3.0)
    assert screen(terminal.getvalue()) == ["wait.."]
    shown.record(val(30, 3.5, loss=1.0))  # a row begins a line of its own
    user_prints("and", end=" ")
    shown.close("steps")
    rows = ["wait..", "step 30/100  epoch 0  val/loss 1", "and"]
    assert screen(terminal.getvalue()) == [*rows, f"{'━' * 9}{'─' * 21}  30/100  epoch 0  10 steps/s  0:04", ""]


def test_another_progress_bar_goes_first(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(10, 0, 0, 1.0)
    sys.stderr.write("\r 50%|##   |")
    shown.refresh(20, 0, 0, 2.0)
    assert screen(terminal.getvalue()) == [" 50%|##   |"]
    sys.stderr.write("\r           \r")  # as tqdm(leave=False) ends
    shown.refresh(30, 0, 0, 3.0)
    assert screen(terminal.getvalue()) == [f"{'━' * 9}{'─' * 21}  30/100  epoch 0  10 steps/s  0:07 left"]


def test_a_flush_takes_the_line_away(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(10, 0, 0, 1.0)
    sys.stdout.flush()  # as before `input()` and `subprocess.run`
    assert screen(terminal.getvalue()) == [""]


def test_one_run_inside_another(attach):
    terminal = attach()
    outer, inner = console(steps=100), None
    outer.refresh(10, 0, 0, 1.0)
    inner = console(steps=4)
    inner.refresh(1, 0, 0, 0.1)
    user_prints("hello")
    inner.refresh(2, 0, 0, 0.2)
    outer.refresh(20, 0, 0, 2.0)
    assert screen(terminal.getvalue()) == ["hello", f"{'━' * 15}{'─' * 15}  2/4  epoch 0  10 steps/s  0:00 left"]
    inner.close("steps")
    outer.refresh(30, 0, 0, 3.0)
    lines = ["hello", f"{'━' * 15}{'─' * 15}  2/4  epoch 0  10 steps/s  0:00"]
    assert screen(terminal.getvalue()) == [*lines, f"{'━' * 9}{'─' * 21}  30/100  epoch 0  10 steps/s  0:07 left"]
    outer.close("steps")
    assert sys.stdout is terminal
    assert sys.stderr is terminal


def test_the_standard_streams_are_given_back(attach):
    terminal = attach()
    shown = console(steps=100)
    assert sys.stdout is terminal
    shown.refresh(1, 0, 0, 1.0)
    stand_in = sys.stdout
    assert stand_in is not terminal
    assert stand_in.getvalue() == terminal.getvalue()
    shown.close("error")
    assert sys.stdout is terminal
    assert sys.stderr is terminal
    size = len(terminal.getvalue())
    stand_in.write("late")  # somebody kept it
    assert terminal.getvalue()[size:] == "late"


def test_a_stream_that_the_user_redirects_meanwhile_stays_redirected(attach):
    terminal = attach()
    shown = console(steps=100)
    shown.refresh(1, 0, 0, 1.0)
    with contextlib.redirect_stdout(io.StringIO()) as inside:
        user_prints("captured")
        shown.close("steps")
        assert sys.stdout is inside
    assert inside.getvalue() == "captured\n"
    user_prints("after")  # through what stood in: it only passes on
    assert screen(terminal.getvalue())[-2:] == ["after", ""]


def test_other_streams_are_not_touched(attach):
    terminal = attach()
    out = Terminal()
    shown = console(steps=100, stream=out)
    shown.refresh(1, 0, 0, 1.0)
    assert sys.stdout is terminal
    user_prints("hello")
    assert "hello" not in out.getvalue()
    shown.close("steps")
    assert screen(out.getvalue())[-1] == ""


def test_threads_may_print(attach):
    terminal = attach()
    shown = console(steps=10_000)

    def chat(name):
        for i in range(200):
            sys.stdout.write(f"{name} {i}\n")

    threads = [threading.Thread(target=chat, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for step in range(200):
        shown.refresh(step, 0, 0, 0.1 * step)
    for thread in threads:
        thread.join()
    shown.close("steps")
    lines = screen(terminal.getvalue())
    for name in "ab":
        assert [line for line in lines if line.startswith(name)] == [f"{name} {i}" for i in range(200)]


# ------------------------------------------------------------------------------------------------------ broken streams


class Broken(Terminal):
    """Fails with `error` from when it is told to."""

    def __init__(self, error, tty):
        super().__init__()
        self.error, self.tty, self.failing = error, tty, False

    def isatty(self):
        return self.tty

    def write(self, text):
        if self.failing:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "file"])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "hung up"), ValueError("closed file")], ids=repr)
def test_a_stream_that_breaks_ends_the_display_not_the_run(error, tty):
    out = Broken(error, tty)
    shown = console(steps=10, stream=out)
    shown.refresh(1, 0, 0, 1.0)
    shown.record(val(1, 1.0, loss=1.0))
    before = out.getvalue()
    assert "val/loss 1" in before
    out.failing = True
    shown.refresh(2, 0, 0, 2.0)
    shown.record(train(2, 2.0, loss=1.0))
    shown.record(val(2, 2.0, loss=1.0))
    out.failing = False  # gone is gone
    shown.close("error")
    assert out.getvalue() == before


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_closed_stream(kind):
    out = kind()
    shown = console(steps=10, stream=out)
    shown.refresh(1, 0, 0, 1.0)
    out.close()
    shown.record(val(1, 1.0, loss=1.0))
    shown.refresh(2, 0, 0, 2.0)
    shown.close("steps")
    console(stream=out).record(train(1, 1.0))  # closed from the beginning


# ------------------------------------------------------------------------------------------------------ a real terminal


def in_a_terminal(code, width=60, kill=None):
    """What a program shows in a real terminal of that width."""
    pid_end, terminal_end = os.openpty()
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"PYTHONPATH": PARENT}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stdin=terminal_end,
        stdout=terminal_end,
        stderr=terminal_end,
        env=environment,
    ) as program:
        os.close(terminal_end)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(pid_end, 4096):
                shown += part
                if kill and b"ready" in shown:
                    program.send_signal(kill)
        os.close(pid_end)
    return shown.decode(), program.returncode


PROGRAM = """
import os, subprocess, sys, time
from ftrain.sinks import Record, console
shown = console(steps=100)
try:
    shown.refresh(10, 0, 640, 1.0)
    print("printed")
    shown.refresh(20, 0, 640, 2.0)
    sys.stdout.flush()
    subprocess.run(["echo", "from a subprocess"], check=True)
    shown.record(Record(50, 1, 640, 5.0, "val", {"loss": 0.5}))
    END
finally:
    shown.close("error")
"""
BAR = "━━━━━━━━━━──────────  50/100  epoch 1  10 steps/s"


def test_in_a_real_terminal():
    shown, code = in_a_terminal(PROGRAM.replace("END", "pass"))
    row, stopped = "step 50/100  epoch 1  val/loss 0.5", "stopped at step 50/100 after 0:05: error"
    assert screen(shown, 60) == ["printed", "from a subprocess", row, f"{BAR}  0:05", stopped, ""]
    assert code == 0


def test_an_exception_leaves_a_tidy_terminal():
    shown, code = in_a_terminal(PROGRAM.replace("END", "1 / 0"))
    lines = screen(shown, 60)
    at = lines.index("stopped at step 50/100 after 0:05: error")
    assert lines[at - 1 : at + 2] == [f"{BAR}  0:05", lines[at], "Traceback (most recent call last):"]
    assert lines[-2:] == ["ZeroDivisionError: division by zero", ""]
    assert code == 1


def test_a_killed_run_leaves_the_cursor_visible():
    end = 'shown.refresh(60, 1, 0, 6.0); os.write(2, b"ready"); time.sleep(60)'
    shown, code = in_a_terminal(PROGRAM.replace("END", end), kill=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert "\x1b[?25l" not in shown


FORK = """
import signal, threading, warnings
    held, done = threading.Event(), threading.Event()
    def hold():
        with shown.lock:
            held.set()
            done.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    warnings.simplefilter("ignore")  # of a fork beside threads
    if not (pid := os.fork()):
        signal.alarm(10)
        print("worker")
        sys.stdout.flush()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    done.set()
    thread.join()
    assert status == 0
"""


def test_a_forked_worker_may_print_whoever_holds_the_lock():
    shown, code = in_a_terminal(PROGRAM.replace("    END", FORK.replace("\nimport", "    import").rstrip()))
    assert code == 0, shown
    assert "worker\r\n" in shown


# ------------------------------------------------------------------------------------------------------------- Jupyter


CELL = """
from ftrain.sinks import Record, console
shown = console(steps=100)
shown.refresh(10, 0, 640, 1.0)
print("printed")
shown.record(Record(50, 0, 640, 5.0, "train", {"loss": 0.25}))
for epoch in range(1, 23):
    shown.record(Record(50 + epoch, epoch, 640, 5.0 + epoch, "val", {"loss": 0.5, "<b>": float("nan")}))
    shown.record(Record(50 + epoch, epoch, 640, 5.0 + epoch, "test", {"loss": 0.75}))
shown.refresh(72, 22, 640, 27.0)
shown.close("interrupted")
"""


class Kernel(nbclient.NotebookClient):
    """Keeps the kernel's messages."""

    def process_message(self, msg, cell, cell_index):
        self.__dict__.setdefault("messages", []).append(msg)
        return super().process_message(msg, cell, cell_index)


@pytest.fixture(scope="module")
def notebook():
    """A notebook run by a real kernel: its first cell, and the messages that the kernel sent."""
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(CELL)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PARENT)
        patch.setenv("FORCE_COLOR", "1")  # which rich would take for a terminal
        kernel = Kernel(book, timeout=60, kernel_name="python3")
        kernel.execute()
    return book.cells[0], kernel.messages


def test_a_notebook_gets_one_display_updated_in_place(notebook):
    cell, messages = notebook
    kinds = [message["msg_type"] for message in messages]
    assert kinds.count("display_data") == 1
    assert kinds.count("update_display_data") >= 3
    identities = {m["content"]["transient"]["display_id"] for m in messages if m["msg_type"].endswith("display_data")}
    assert len(identities) == 1
    assert [(output["output_type"], output.get("name")) for output in cell.outputs] == [
        ("display_data", None),
        ("stream", "stdout"),
    ]
    assert cell.outputs[1]["text"] == "printed\n"  # and nothing on stderr


def test_what_the_notebook_shows_in_the_end(notebook):
    data = notebook[0].outputs[0]["data"]
    page = data["text/html"]
    assert page.startswith('<div style="white-space: pre-wrap"><progress value="0.7200" ')
    line = "72/100  epoch 22  loss 0.25  10 steps/s  0:27\nstopped at step 72/100 after 0:27: interrupted"
    assert f"{line}</div>" in page
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    heads = ["step", "epoch", "val/loss", "val/&lt;b&gt;", "test/loss"]
    assert rows[0] == "".join(f"<th>{head}</th>" for head in heads)
    assert rows[1] == '<td colspan="5">2 earlier</td>'
    assert len(rows) == 22
    assert rows[-1] == "<td>72</td><td>22</td><td>0.5</td><td>nan</td><td>0.75</td>"
    plain = data["text/plain"].splitlines()
    assert len(plain) == 22
    assert plain[-4:-2] == ["step 72/100  epoch 22  val/loss 0.5  val/<b> nan", "step 72/100  epoch 22  test/loss 0.75"]
    assert "\n".join(plain[-2:]) == line


def test_a_stream_is_honoured_in_a_notebook():
    # IPython being imported makes no notebook, and an explicit stream is used even in one.
    import IPython

    assert IPython.get_ipython() is None
    out = io.StringIO()
    console(stream=out).record(train(1, 1.0))
    assert out.getvalue() == "step 1  epoch 0  1 steps/s\n"
