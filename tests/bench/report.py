"""Tables, bars and the files under docs/benchmarks/."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rounds import Samples, Spread, ratio

ROOT = Path(__file__).parents[2]


class Bar(NamedTuple):
    """A bound that an issue sets, and what was measured. It is printed, never asserted: machines differ."""

    text: str
    bound: float
    measured: Spread | None
    cpu: Spread | None = None  # the same by processor time
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """UNSURE where wall and processor time lie on two sides of the bound: then others had the core, more or less evenly."""
        if self.measured is None:
            return "not measured"
        sides = {self._holds(one.median) for one in (self.measured, self.cpu) if one is not None}
        return "UNSURE" if len(sides) == 2 else "PASS" if sides == {True} else "FAIL"

    def _holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def row(self) -> list[str]:
        bound = f"{'>=' if self.at_least else '<='} {self.bound:.2f}"
        if self.measured is None:
            return [self.text, bound, "-", "-", "-", self.verdict]
        found = self.measured
        spread = "-" if found.low == found.high else f"{found.low:.2f} .. {found.high:.2f}"
        cpu = "-" if self.cpu is None else f"{self.cpu.median:.2f}"
        return [self.text, bound, f"{found.median:.2f}", spread, cpu, self.verdict]


class Table(NamedTuple):
    """A heading, a sentence or two, and rows; the first `text` columns are text, the others are numbers."""

    heading: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    text: int = 1

    def plain(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: list[str]) -> str:
            padded = [
                cell.ljust(width) if i < self.text else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        note = textwrap.fill(self.note, 120)
        return "\n".join([self.heading, note, "", line(self.columns), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        def line(cells: list[str]) -> str:
            return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

        rule = line([*["---"] * self.text, *["---:"] * (len(self.columns) - self.text)])
        return "\n".join([f"## {self.heading}", "", self.note, "", line(self.columns), rule, *map(line, self.rows)])


def times(heading: str, note: str, found: dict[str, Samples], yardstick: str, unit: str = "us") -> Table:
    """One row for each contender."""
    scale = {"us": 1.0, "ms": 1e-3}[unit]
    digits = 1 if unit == "ms" else 0
    rows = []
    for samples in found.values():
        step, over = Spread.of(samples.step), ratio(samples.step, found[yardstick].step)
        busy = ratio(samples.cpu, samples.step).median
        rows.append(
            [
                samples.label,
                f"{step.median * scale:.{digits}f}",
                f"{step.low * scale:.{digits}f} .. {step.high * scale:.{digits}f}",
                f"{over.median:.2f}",
                f"{over.low:.2f} .. {over.high:.2f}",
                f"{min(busy, 1):.0%}",
                f"{Spread.of(samples.set_up).median:.1f}" if samples.set_up else "-",
                f"{samples.first_call:.1f}",
            ]
        )
    columns = [
        "",
        f"{unit}/step",
        "quartiles",
        "x yardstick",
        "quartiles",
        "on CPU",
        "set-up ms",
        "first call s",
    ]
    return Table(heading, note, columns, rows)


def bars(found: Sequence[Bar]) -> Table:
    note = (
        "Medians over the rounds of the ratio within a round, with its quartiles. `by CPU` is the same ratio of processor times, which says "
        "more where the table above shows that others had the core; where the two disagree about a bar it says UNSURE."
    )
    return Table("Bars", note, ["", "bound", "median", "quartiles", "by CPU", ""], [bar.row() for bar in found])


def machine(packages: Sequence[str], **more: object) -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "cpu": f"{model}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f} when it began",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name in packages if (version := _version(name))),
        **more,
    }


def _version(package: str) -> str | None:
    if package == "ftrain":  # may run from the source tree
        import ftrain

        return ftrain.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--", "ftrain") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def text(about: dict[str, Any], tables: Sequence[Table]) -> str:
    head = "\n".join(f"{name:<9} {value}" for name, value in about.items())
    return "\n\n".join([head, *(table.plain() for table in tables)])


def write(
    path: Path, title: str, about: dict[str, Any], tables: Sequence[Table], *, bars: Sequence[Bar], data: dict[str, Any]
) -> list[Path]:
    """Write `path.md` and `path.json`; the JSON has every sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "\n".join(f"- {name}: {f'`{value}`' if name == 'command' else value}" for name, value in about.items())
    markdown, numbers = path.with_suffix(".md"), path.with_suffix(".json")
    markdown.write_text(
        "\n\n".join([f"# {title}", head, *(table.markdown() for table in tables)]) + "\n", encoding="utf-8"
    )
    verdicts = [{**bar._asdict(), "verdict": bar.verdict} for bar in bars]
    everything = {"about": about, "bars": verdicts, **data}
    numbers.write_text(json.dumps(_rounded(everything), indent=1) + "\n", encoding="utf-8")
    return [markdown, numbers]


def samples(found: dict[str, Samples]) -> dict[str, Any]:
    return {key: asdict(one) for key, one in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Spread):
        return _rounded(value._asdict())
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
